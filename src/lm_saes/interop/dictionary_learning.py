"""dictionary_learning: folders with `ae.pt` (a pickle of tensors; only tensors are read) and `config.json`.

- `AutoEncoder` and `GatedAutoEncoder` subtract their decoder bias before the encoder, as do the three of the TopK family; `AutoEncoderNew` and
  `JumpReluAutoEncoder` do not;
- `AutoEncoder` is loaded by the library with unit decoder columns, so its codes are h ||W_dec row||;
- BatchTopK and Matryoshka gate by a saved `threshold`; -1 means that it was never set, which lets everything positive through;
- the norm by which training divided the activations is already multiplied into biases and thresholds of a finished `ae.pt`, but not into those of
  a backup made during training, which is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_saes.errors import WeightsError
from lm_saes.interop.equations import ForeignEquations, Native, gated
from lm_saes.interop.files import read_json, read_torch, take

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES = (CONFIG, WEIGHTS)
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")
_COUNTS = ("k", "group_sizes")
_RESIDUAL = re.compile(r"resid_post_layer_(\d+)")


def recognises(folder: Path) -> bool:
    """Whether the folder has this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path) -> Native:
    """A finished dictionary of one of the library's seven classes.

    Raises:
        WeightsError: the files are damaged, or a backup made during training, or of an unknown class.
    """
    origin = str(folder)
    trainer = read_json(folder / CONFIG).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    tensors = read_torch(folder / WEIGHTS)
    if isinstance(tensors, dict) and "ae" in tensors:
        raise WeightsError(
            f"{origin}: {WEIGHTS} is a backup made during training, whose biases are not those of raw activations yet; wanted the finished one"
        )
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise WeightsError(f"{origin}: {WEIGHTS} must hold tensors by name")
    foreign = _equations(str(trainer.get("dict_class")), tensors, trainer, origin)
    residual = _RESIDUAL.fullmatch(str(trainer.get("submodule_name")))
    foreign.fields = {"hook_point_in": f"blocks.{residual[1]}.hook_resid_post"} if residual else {}
    foreign.provenance = {"format": NAME, "trainer": trainer}
    return foreign.native(origin)


def _equations(dict_class: str, tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], origin: str) -> ForeignEquations:
    def linear(bias: str, *more: str) -> list[Tensor]:
        W_enc, b_enc, W_dec, b_dec, *rest = take(tensors, (*_LINEAR, bias, *more), origin, ignored=(*_COUNTS, "threshold")).values()
        return [W_enc.T, b_enc, W_dec.T, b_dec, *rest]

    match dict_class:
        case "AutoEncoder":
            return ForeignEquations(*linear("bias"), act_fn="relu", subtracts_b_dec=True, codes_include_decoder_norm=True)
        case "AutoEncoderNew":
            return ForeignEquations(*linear("decoder.bias"), act_fn="relu")
        case "AutoEncoderTopK":
            return ForeignEquations(*linear("b_dec"), act_fn="topk", top_k=_k(tensors, trainer, origin), subtracts_b_dec=True)
        case "BatchTopKSAE":
            *weights, threshold = linear("b_dec", "threshold")
            return _by_threshold(weights, threshold, _k(tensors, trainer, origin))
        case "MatryoshkaBatchTopKSAE":
            *weights, threshold = take(tensors, (*_MATRICES, "threshold"), origin, ignored=_COUNTS).values()
            return _by_threshold(weights, threshold, _k(tensors, trainer, origin))
        case "JumpReluAutoEncoder":
            *weights, threshold = take(tensors, (*_MATRICES, "threshold"), origin).values()
            return ForeignEquations(*weights, act_fn="jumprelu", threshold=threshold)
        case "GatedAutoEncoder":
            names = ("encoder.weight", "gate_bias", "mag_bias", "r_mag", "decoder.weight", "decoder_bias")
            W_enc, b_gate, b_mag, r_mag, W_dec, b_dec = take(tensors, names, origin).values()
            foreign = gated(W_enc.T, b_gate, b_mag, r_mag, W_dec.T, b_dec)
            foreign.subtracts_b_dec = True
            return foreign
    raise WeightsError(f"{origin}: trainer.dict_class '{dict_class}' in {CONFIG} is not read; wanted one of the library's own classes")


def _by_threshold(weights: list[Tensor], threshold: Tensor, k: int) -> ForeignEquations:
    return ForeignEquations(*weights, act_fn="batchtopk", threshold=torch.clamp(threshold, min=0.0), top_k=k, subtracts_b_dec=True)


def _k(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], origin: str) -> int:
    k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
    if not isinstance(k, int):
        raise WeightsError(f"{origin}: neither {WEIGHTS} nor {CONFIG} says k")
    return k
