"""sparsify (EleutherAI): folders with `cfg.json` and `sae.safetensors`, one for each hook point.

- SAEs subtract b_dec before the encoder, transcoders (`transcode`) do not;
- the k largest of relu(z) are kept; `W_dec` is stored [F, D] as here, the encoder [F, D] as torch's linear layers are, `W_skip` [out, in];
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
        WeightsError: the files are damaged, or it has groupmax, which our equations do not hold.
    """
    cfg, origin = read_json(folder / CONFIG), str(folder)
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise WeightsError(f"{origin}: activation '{activation}' is not read; wanted topk")
    transcoder, skip = bool(cfg.get("transcode")), bool(cfg.get("skip_connection"))
    if skip and not transcoder:
        raise WeightsError(f"{origin}: an autoencoder with a skip connection is not read (the identity would reconstruct everything)")
    k = cfg.get("k")
    if not isinstance(k, int):
        raise WeightsError(f"{origin}: wanted a whole number for k, got {k!r}")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(("W_skip",) if skip else ()))
    W_enc, b_enc, W_dec, b_dec, *rest = take(read_safetensors(folder / WEIGHTS), names, origin).values()
    block = _BLOCK.fullmatch(folder.name)
    return ForeignEquations(
        W_enc.T, b_enc, W_dec, b_dec,
        act_fn="topk", top_k=k, W_skip=rest[0].T if skip else None, subtracts_b_dec=not transcoder,
        fields={"hook_point_in": f"blocks.{block[2]}.hook_resid_post"} if block and not transcoder else {},
        provenance={"format": NAME, "hookpoint": folder.name, "config": cfg},
    ).native(origin)  # fmt: skip
