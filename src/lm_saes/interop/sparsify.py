"""sparsify (EleutherAI): folders with `cfg.json` and `sae.safetensors`, one for each hook point.

- SAEs subtract b_dec before the encoder, transcoders (`transcode`) do not;
- the k largest of relu(z) are kept; `W_dec` is stored [F, D] as here, the encoder [F, D] as torch's linear layers are;
- a folder is named after the module whose output it reads, relative to the base model: `layers.10` (or `h.10`) is the residual stream after
  block 10. Other modules have no name here that holds for every model, so `hook_point_in` must be given for them.
"""

from __future__ import annotations

import re
from pathlib import Path

from lm_saes.errors import WeightsError
from lm_saes.interop.equations import ForeignEquations, Native
from lm_saes.interop.files import read_json, read_safetensors, take

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
FILES = (CONFIG, WEIGHTS)
_BLOCK = re.compile(r"(layers|h)\.(\d+)")


def recognises(folder: Path) -> bool:
    """Whether the folder has this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> Native:
    """An SAE or a transcoder with TopK.

    Raises:
        WeightsError: the files are damaged, or it has a skip connection or groupmax, which our equations do not hold.
    """
    cfg, origin = read_json(folder / CONFIG), str(folder)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise WeightsError(f"{origin}: activation '{activation}' is not read; wanted topk")
    if cfg.get("skip_connection"):
        raise WeightsError(f"{origin}: skip connections are not read")
    k = cfg.get("k")
    if not isinstance(k, int):
        raise WeightsError(f"{origin}: wanted a whole number for k, got {k!r}")
    W_enc, b_enc, W_dec, b_dec = take(read_safetensors(folder / WEIGHTS), ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), origin).values()
    transcoder, block = bool(cfg.get("transcode")), _BLOCK.fullmatch(folder.name)
    return ForeignEquations(
        W_enc.T, b_enc, W_dec, b_dec,
        act_fn="topk", top_k=k, subtracts_b_dec=not transcoder,
        fields={"hook_point_in": f"blocks.{block[2]}.hook_resid_post"} if block and not transcoder else {},
        provenance={"format": NAME, "hookpoint": folder.name, "config": cfg},
    ).native(origin)  # fmt: skip
