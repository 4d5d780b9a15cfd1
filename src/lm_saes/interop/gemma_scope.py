"""Gemma Scope: folders with `params.npz`, JumpReLU without subtraction of b_dec, thresholds as they are.

What a dictionary reads stands in no file, only in its place on the hub, "google/gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71": `res` is
the residual stream after the block, `mlp` the output of the MLP, `att` the input of attention's output projection, `transcoders` map the
normalised input of the MLP to its output. Elsewhere `hook_point_in` (and `hook_point_out`) must be given.
"""

from __future__ import annotations

import re
from pathlib import Path

from lm_saes.errors import WeightsError
from lm_saes.interop.equations import ForeignEquations, Native
from lm_saes.interop.files import read_npz, take

NAME = "gemma-scope"
WEIGHTS = "params.npz"
FILES = (WEIGHTS,)
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_RELEASE = re.compile(r"gemma-scope-[\w.]+-(?:pt|it)-(res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(\d+)")
_HOOKS = {
    "res": {"hook_point_in": "blocks.{}.hook_resid_post"},
    "mlp": {"hook_point_in": "blocks.{}.hook_mlp_out"},
    "att": {"hook_point_in": "blocks.{}.attn.hook_z"},
    "transcoders": {"hook_point_in": "blocks.{}.ln2.hook_normalized", "hook_point_out": "blocks.{}.hook_mlp_out"},
}


def recognises(folder: Path) -> bool:
    """Whether the folder has this format's file."""
    return (folder / WEIGHTS).is_file()


def read(folder: Path) -> Native:
    """A JumpReLU dictionary.

    Raises:
        WeightsError: the file is damaged, or it is one on embeddings, which scale their input.
    """
    path = str(folder.absolute())
    if re.search(r"(^|/)embedding(/|$)", path):
        raise WeightsError(f"{folder}: dictionaries on embeddings scale their input by the square root of the width, which is not read")
    tensors = {name[:1].upper() + name[1:] if name.startswith("w_") else name: tensor for name, tensor in read_npz(folder / WEIGHTS).items()}
    W_enc, b_enc, W_dec, b_dec, threshold = take(tensors, _NAMES, str(folder)).values()
    release, layer = _RELEASE.search(path), _LAYER.search(path)
    hooks = {name: hook.format(layer[1]) for name, hook in _HOOKS[release[1]].items()} if release and layer else {}
    provenance = {"format": NAME, **({"release": release[0]} if release else {})}
    return ForeignEquations(W_enc, b_enc, W_dec, b_dec, "jumprelu", threshold, fields=hooks, provenance=provenance).native(str(folder))
