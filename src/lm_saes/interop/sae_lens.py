"""sae-lens: folders with `cfg.json` and `sae_weights.safetensors`, of version 6 and before, read and written.

Their differences from ours, each folded into the weights (`equations.py`), so that codes and reconstructions stay what sae-lens computes:

- `apply_b_dec_to_input`, the default, subtracts b_dec before the encoder;
- `rescale_acts_by_decoder_norm` (TopK and what is trained by BatchTopK) returns codes multiplied by ||W_dec row||;
- `threshold` of JumpReLU is theta itself, not its logarithm. A BatchTopK dictionary is saved as JumpReLU with one constant theta;
- gated dictionaries become the JumpReLU dictionaries that they are;
- `normalize_activations`: "constant_norm_rescale" is our token-wise; "expected_average_only_in" multiplies the input by a factor that is not in
  the folder of a finished dictionary, but beside a checkpoint (`activation_scaler.json`) or in the caller's hand;
- `W_skip` is stored transposed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_saes.errors import ConfigError, WeightsError
from lm_saes.interop.equations import ForeignEquations, Native, gated
from lm_saes.interop.files import read_json, read_safetensors, take, write_folder

if TYPE_CHECKING:
    from lm_saes.models.sae import SparseAutoEncoder

NAME = "sae-lens"
CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
FILES = (CONFIG, WEIGHTS, SCALER)

_OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""Of versions before 6, which also had one flat table."""
_ACT_FN = {
    "standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "jumprelu", "batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu", "jumprelu_transcoder": "jumprelu", "skip_transcoder": "relu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
_BASE = ("W_enc", "b_enc", "W_dec", "b_dec")
_GATED = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")


def recognises(folder: Path) -> bool:
    """Whether the folder has this format's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(folder: Path, scaling_factor: float | None = None) -> Native:
    """A finished dictionary, or a checkpoint of sae-lens' training.

    Args:
        scaling_factor: what the input is multiplied by where the configuration says "expected_average_only_in".

    Raises:
        WeightsError: the files are damaged, or of an architecture or normalisation that our equations do not hold.
    """
    if scaling_factor is None and (folder / SCALER).is_file():
        scaling_factor = read_json(folder / SCALER).get("scaling_factor")
    return convert(read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS), scaling_factor, str(folder))


def convert(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], scaling_factor: float | None = None, origin: str = NAME) -> Native:
    """From sae-lens' configuration and state dict, see `read`."""
    table = _flat(cfg)
    architecture = str(table.get("architecture", "standard"))
    if architecture not in _ACT_FN:
        raise WeightsError(f"{origin}: architecture '{architecture}' is not read; those that are: {', '.join(_ACT_FN)}")
    transcoder = "transcoder" in architecture
    tensors = _without_unit_factor(tensors, origin)
    foreign = gated(*take(tensors, _GATED, origin).values()) if architecture == "gated" else _plain(architecture, table, tensors, origin)
    foreign.subtracts_b_dec = bool(table.get("apply_b_dec_to_input", not transcoder))
    foreign.codes_include_decoder_norm = bool(table.get("rescale_acts_by_decoder_norm", False))
    foreign.input_scale, norm = _normalisation(table, transcoder, scaling_factor, origin)
    if table.get("hook_head_index") is not None:
        raise WeightsError(f"{origin}: reads head {table['hook_head_index']} alone (hook_head_index); hook points here are all heads side by side")
    hooks = {"hook_point_in": table.get("hook_name"), "hook_point_out": table.get("hook_name_out") if transcoder else None}
    foreign.fields = {"norm_activation": norm, **{name: hook for name, hook in hooks.items() if hook}}
    if transcoder and not hooks["hook_point_out"]:
        foreign.fields["hook_point_out"] = ""
    foreign.provenance = {"format": NAME, "architecture": architecture, "metadata": dict(cfg.get("metadata") or _metadata(table))}
    return foreign.native(origin)


def write(dictionary: SparseAutoEncoder, folder: str | Path) -> None:
    """Write a dictionary as a folder that sae-lens' `SAE.load_from_disk` (version 6 and later) gives the same reconstructions from.

    The activation scale is folded in. Codes are the same too, except for TopK with `sparsity_include_decoder_norm`: sae-lens returns them
    multiplied by ||W_D row|| there.

    Raises:
        ConfigError: there is no such dictionary in sae-lens: a GLU encoder, a TopK transcoder, or a token-wise transcoder.
        FoldingError: the activation scale was not measured.
    """
    write_folder(folder, *_for_sae_lens(dictionary))


def _for_sae_lens(dictionary: SparseAutoEncoder) -> tuple[dict[str, dict[str, Any]], tuple[str, dict[str, Tensor]]]:
    cfg = dictionary.cfg
    transcoder, token_wise = cfg.hook_point_in != cfg.hook_point_out, cfg.norm_activation == "token-wise"
    for refused, what in (
        (cfg.use_glu_encoder, "an encoder with a gated linear unit"),
        (transcoder and cfg.act_fn == "topk", "a transcoder with TopK"),
        (transcoder and token_wise, "a transcoder with token-wise normalisation"),
    ):
        if refused:
            raise ConfigError(f"sae-lens has nothing like {what}, so this dictionary cannot be written for it; use save_pretrained")
    if not token_wise and cfg.norm_activation != "inference":
        dictionary = copy.deepcopy(dictionary)
        dictionary.fold_activation_scale()
    dtype, norm = dictionary.dtype, dictionary.decoder_norm().detach().double()
    b_D = torch.zeros(cfg.d_model, dtype=dtype, device=dictionary.device) if dictionary.b_D is None else dictionary.b_D
    tensors = {"W_enc": dictionary.W_E, "b_enc": dictionary.b_E, "W_dec": dictionary.W_D, "b_dec": b_D}
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    threshold = _thresholds(dictionary)
    if threshold is not None:
        # Ours is compared with h ||W_D row|| where the gate includes the norm, theirs with h. A row of norm zero never fires.
        threshold = torch.where(norm > 0, threshold / norm, torch.inf) if cfg.sparsity_include_decoder_norm else threshold
        tensors["threshold"] = threshold.to(dtype)
    kind = {"relu": "standard", "topk": "topk"}.get(cfg.act_fn, "jumprelu")
    architecture = kind
    if transcoder:
        architecture = ("jumprelu_" if kind == "jumprelu" else "") + ("skip_" if cfg.use_skip_connection else "") + "transcoder"
    model = dictionary.provenance.get("model")
    table = {
        "architecture": architecture,
        "d_in": cfg.d_model,
        "d_sae": cfg.d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "constant_norm_rescale" if token_wise else "none",
        "reshape_activations": "hook_z" if cfg.hook_point_in.endswith("hook_z") else "none",
        **({"d_out": cfg.d_model} if transcoder else {}),
        **({"k": cfg.top_k, "rescale_acts_by_decoder_norm": cfg.sparsity_include_decoder_norm} if kind == "topk" else {}),
        "metadata": {
            "sae_lens_version": "6.0.0",  # the version of the format; it is what makes the table be read as it stands
            "hook_name": cfg.hook_point_in,
            **({"hook_name_out": cfg.hook_point_out} if transcoder else {}),
            **({"model_name": model["model_name"]} if isinstance(model, dict) and "model_name" in model else {}),
        },
    }
    return {CONFIG: table}, (WEIGHTS, tensors)


def _thresholds(dictionary: SparseAutoEncoder) -> Tensor | None:
    """theta of each latent in gate space [F] in float64; None for activation functions without one."""
    if dictionary.cfg.act_fn == "batchtopk":
        threshold = dictionary.activation_function.threshold
        assert isinstance(threshold, Tensor)
        return threshold.double().expand(dictionary.cfg.d_sae)
    threshold = dictionary.learned_threshold()
    return None if threshold is None else threshold.detach().double()


def _flat(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """One table by the names of version 6: metadata beside the rest."""
    metadata = cfg.get("metadata")
    if isinstance(metadata, Mapping):
        return {**metadata, **{key: value for key, value in cfg.items() if key != "metadata"}}
    table = {_OLD_NAMES.get(key, key): value for key, value in cfg.items()}
    k = (table.get("activation_fn_kwargs") or {}).get("k")
    if table.get("activation_fn") == "topk" and k is not None:
        table |= {"architecture": "topk", "k": k, "activation_fn": "relu"}
    if isinstance(table.get("normalize_activations"), bool):
        table["normalize_activations"] = "expected_average_only_in" if table["normalize_activations"] else "none"
    return table


def _metadata(table: Mapping[str, Any]) -> dict[str, Any]:
    names = ("model_name", "hook_name", "hook_name_out", "context_size", "prepend_bos", "dataset_path", "sae_lens_version")
    return {name: table[name] for name in names if table.get(name) is not None}


def _without_unit_factor(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Without the factors of fine-tuning that versions before 6 wrote into every file, ones where there was no fine-tuning."""
    names = {"scaling_factor", "finetuning_scaling_factor"} & set(tensors)
    if any(not torch.allclose(tensors[name], torch.ones_like(tensors[name])) for name in names):
        raise WeightsError(f"{origin}: was fine-tuned by a factor on each code ({', '.join(sorted(names))}), which is not read")
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _plain(architecture: str, table: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: str) -> ForeignEquations:
    act_fn = _ACT_FN[architecture]
    activation = table.get("activation_fn", "relu")
    if activation != "relu":
        raise WeightsError(f"{origin}: activation function '{activation}' is not read; wanted relu, or topk with its k")
    logarithm = act_fn == "jumprelu" and "log_threshold" in tensors  # checkpoints of training, in some versions
    extra = {"jumprelu": ("log_threshold" if logarithm else "threshold",), "batchtopk": ("topk_threshold",)}.get(act_fn, ())
    skip = ("W_skip",) if "skip" in architecture else ()
    found = take(tensors, (*_BASE, *extra, *skip), origin)
    threshold = found[extra[0]] if extra else None
    k = table.get("k")
    if act_fn in {"topk", "batchtopk"} and (not isinstance(k, int | float) or k != int(k)):
        raise WeightsError(f"{origin}: wanted a whole number for k, got {k!r}")
    return ForeignEquations(
        *(found[name] for name in _BASE),
        act_fn=act_fn,
        threshold=threshold.double().exp() if threshold is not None and logarithm else threshold,
        W_skip=found["W_skip"].T if skip else None,  # theirs is [out, in]
        top_k=int(k) if act_fn in {"topk", "batchtopk"} and k is not None else None,
    )


def _normalisation(table: Mapping[str, Any], transcoder: bool, scaling_factor: float | None, origin: str) -> tuple[float, str]:
    """s, and our `norm_activation`."""
    match mode := table.get("normalize_activations") or "none":
        case "none":
            return 1.0, "inference"
        case "constant_norm_rescale" if not transcoder:
            return 1.0, "token-wise"
        case "expected_average_only_in" if scaling_factor:
            return float(scaling_factor), "inference"
        case "expected_average_only_in":
            raise WeightsError(
                f"{origin}: inputs must be multiplied by a factor that is not in the folder (expected_average_only_in);"
                " pass it: lm_saes.interop.from_saelens(folder, scaling_factor=...)"
            )
    raise WeightsError(f"{origin}: normalize_activations '{mode}'{' of a transcoder' if transcoder else ''} has no counterpart here")
