"""Dictionaries on disk: a folder with `config.json` and `sae_weights.safetensors`, each written whole or not at all, read strictly."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from lm_saes import hub
from lm_saes.config import LanguageModelConfig, SparseDictionaryConfig
from lm_saes.config.base import dtype_name, validated
from lm_saes.config.dictionaries import CONFIG_FILE, read_dictionary_config
from lm_saes.devices import resolve_device
from lm_saes.errors import ConfigError, WeightsError
from lm_saes.files import flush, parse_json, read_json, write_whole
from lm_saes.tensor_files import fingerprint, read_safetensors, separate

if TYPE_CHECKING:
    from lm_saes.models.sparse_dictionary import SparseDictionary

WEIGHTS_FILE = "sae_weights.safetensors"
_MODE, _CHECKSUM = "norm_activation", "xxh3"
_RECORD = "lm_saes"
"""Key in the weights file's header, of a JSON object: the mode that the weights belong to, so that folded weights beside an unfolded config are found
out, and a checksum of the tensors. One key, since the header's order of several is not fixed and the same weights shall give the same bytes."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

DictionaryT = TypeVar("DictionaryT", bound="SparseDictionary")


def build(cls: type[DictionaryT], cfg: SparseDictionaryConfig, device_mesh: Any = None) -> DictionaryT:
    """See `SparseDictionary.from_config`."""
    if device_mesh is not None:
        raise ConfigError("device_mesh must be None: this version trains and runs a dictionary on one device")
    return _variant(cls, cfg.sae_type)[1](cfg)


def load(
    cls: type[DictionaryT], folder: str | Path, device_mesh: Any, fold_activation_scale: bool, strict: bool, overrides: Mapping[str, Any]
) -> DictionaryT:
    """See `SparseDictionary.from_pretrained`."""
    folder = local_folder(folder)
    table, tensors, provenance = _read(folder, overrides)
    return assemble(cls, table, tensors, provenance, str(folder / CONFIG_FILE), device_mesh, fold_activation_scale, strict, overrides)


def assemble(
    cls: type[DictionaryT],
    table: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: dict[str, Any],
    origin: str,
    device_mesh: Any,
    fold_activation_scale: bool,
    strict: bool,
    overrides: Mapping[str, Any],
) -> DictionaryT:
    """The dictionary of saved fields and tensors, in eval mode. `origin` names the configuration in errors."""
    asked = {name: value for name, value in overrides.items() if not (name == "dtype" and value is None)}
    cfg = validated(_variant(cls, table.get("sae_type"), origin)[0], {**table, **asked}, origin=origin)
    # On "meta" nothing is allocated or drawn that the saved tensors then replace, and no more is allocated than they are large.
    try:
        dictionary = build(cls, cfg.replace(device="meta"), device_mesh)
    except (RuntimeError, TypeError) as error:  # more elements than can be counted
        raise WeightsError(f"{origin} describes a dictionary of {cfg.d_sae} latents over {cfg.d_model} dimensions: {error}") from None
    _check(origin, dictionary.state_dict(), tensors, strict)
    if not strict:  # tensors may be missing; they keep their start
        dictionary = build(cls, cfg.replace(device="cpu"), device_mesh)
    # Copies: tensors of a file stand at any address, and some products sum in an order that depends on it (docs/reliability.md).
    dictionary.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=strict, assign=True)
    dtype = cfg.dtype if "dtype" in asked else _weight_dtype(dictionary)
    dictionary.to(device=resolve_device(cfg.device), dtype=dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    dictionary.cfg = cfg.replace(dtype=dtype_name(dtype))
    dictionary.provenance = provenance
    if fold_activation_scale and cfg.norm_activation != "inference":
        dictionary.fold_activation_scale()
    return dictionary.eval()


def _read(folder: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Fields, tensors and provenance of a folder of ours, or of another library's."""
    if not _says_ours(folder / CONFIG_FILE):
        from lm_saes import interop  # the one upward step: a folder that is not ours

        foreign = interop.read(folder, overrides)
        if foreign is not None:
            return foreign
    table, provenance = read_dictionary_config(folder)
    return table, read_weights(folder / WEIGHTS_FILE, table.get(_MODE)), provenance


def _says_ours(path: Path) -> bool:
    """Whether it is a configuration that this library wrote. (Other libraries have a `config.json` too.)"""
    try:
        table = read_json(path, WeightsError)
    except (OSError, WeightsError):  # what is wrong with it is said by whoever reads it
        return False
    return isinstance(table, dict) and "schema_version" in table


def local_folder(name_or_path: str | Path, token: str | None = None) -> Path:
    """The folder itself, or that of `"org/repo:folder"` on the Hugging Face hub, downloaded if need be.

    Raises:
        WeightsError: the hub has no such repository or cannot be reached.
    """
    name = str(name_or_path)
    if Path(name).is_dir() or hub.split_name(name) is None:
        return Path(name)
    from lm_saes import interop

    return hub.fetch(name, list(dict.fromkeys([CONFIG_FILE, WEIGHTS_FILE, *interop.FILES])), "the dictionary", WeightsError, token)


def upload(dictionary: SparseDictionary, repo_id: str, name: str, lm_config: LanguageModelConfig | None, token: str | None, private: bool) -> None:
    """See `SparseDictionary.upload_to_hf`."""
    with tempfile.TemporaryDirectory(prefix="lm-saes-upload-") as folder:
        save(dictionary, folder)
        if lm_config is not None:
            lm_config.save_lm_config(folder)
        hub.upload(Path(folder), repo_id, name, token, private, WeightsError)


def save(dictionary: SparseDictionary, folder: str | Path, fold_activation_scale: bool = False) -> None:
    """See `SparseDictionary.save_pretrained`. Both files are written beside their places, flushed to the disk, and then moved there."""
    if fold_activation_scale:
        dictionary = copy.deepcopy(dictionary)
        dictionary.fold_activation_scale()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        write_files(dictionary.cfg, dictionary.provenance, dictionary.state_dict(), work)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(work / name, folder / name)
        flush(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_files(cfg: SparseDictionaryConfig, provenance: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write both files of a dictionary whose tensors (`state_dict()`) are these, and flush them to the disk."""
    cfg.save_hyperparameters(folder, provenance)
    _write(cfg, tensors, folder / WEIGHTS_FILE)
    flush(folder / CONFIG_FILE)


def save_weights(dictionary: SparseDictionary, path: str | Path) -> None:
    """See `SparseDictionary.save_checkpoint`."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"weights are saved as .safetensors, got '{path.name}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda work: _write(dictionary.cfg, dictionary.state_dict(), work), locked=False)


def read_weights(path: Path, norm_activation: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU.

    Raises:
        WeightsError: no such file, not readable as safetensors, tensors that are not floating-point or not what was written, or weights of
            another normalisation than the config says.
    """
    if not path.is_file():
        raise WeightsError(f"no {path.name} in {path.parent}; a saved dictionary is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    tensors, metadata = read_safetensors(path, WeightsError)
    record = _record(metadata)
    if _CHECKSUM in record and record[_CHECKSUM] != fingerprint(tensors):
        raise WeightsError(f"{path} is damaged: its tensors are not what was written; copy or download it anew")
    mode = record.get(_MODE)
    if norm_activation is not None and mode is not None and mode != norm_activation:
        raise WeightsError(f"{path} holds weights of norm_activation '{mode}', its {CONFIG_FILE} says '{norm_activation}'; save the dictionary again")
    odd = [f"{name} ({str(tensor.dtype).removeprefix('torch.')})" for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if odd:
        raise WeightsError(f"{path}: wanted float16, bfloat16, float32 or float64, got {', '.join(odd)}")
    return tensors


def _record(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """What the header says of the tensors: nothing in files of other libraries, the mode alone in those of the first weeks."""
    try:
        record = parse_json(metadata[_RECORD])
    except (KeyError, ValueError):
        record = None
    return record if isinstance(record, dict) else metadata


def _check(origin: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], strict: bool) -> None:
    """Names and shapes, all differences in one line. Shapes must agree in any case."""
    faults = [
        f"{name} has shape {list(got[name].shape)}, wanted {list(wanted[name].shape)}"
        for name in wanted
        if name in got and got[name].shape != wanted[name].shape
    ]
    if not strict and "W_D" not in got:
        faults.append("W_D is missing, without which there is no dictionary")
    if strict:
        faults += [f"{name} is missing" for name in wanted if name not in got]
        faults += [f"{name} is unexpected" for name in got if name not in wanted]
    if faults:
        remedy = "" if not strict else "; check config.json, or pass strict_loading=False for missing or unexpected tensors"
        raise WeightsError(f"the weights do not match {origin}: {', '.join(faults)}{remedy}")


def _weight_dtype(dictionary: SparseDictionary) -> torch.dtype:
    """The narrowest type that holds all weights; thresholds, which are wider by rule, aside."""
    thresholds = {id(parameter) for parameter in dictionary.activation_function.parameters()}
    return functools.reduce(torch.promote_types, (parameter.dtype for parameter in dictionary.parameters() if id(parameter) not in thresholds))


def _write(cfg: SparseDictionaryConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = separate(tensors)
    record = {_MODE: cfg.norm_activation, _CHECKSUM: fingerprint(own)}
    save_file(own, path, metadata={_RECORD: json.dumps(record)})
    flush(path)


def _variant(cls: type[DictionaryT], sae_type: Any, origin: str = "") -> tuple[type[SparseDictionaryConfig], type[DictionaryT]]:
    from lm_saes.models import VARIANTS  # the table names the variants, which are built on this file

    if not isinstance(sae_type, str) or sae_type not in VARIANTS:
        where = f"{origin}: " if origin else ""
        raise ConfigError(f"{where}sae_type must be one of {', '.join(VARIANTS)}, got {sae_type!r}")
    cfg_class, variant = VARIANTS[sae_type]
    if not issubclass(variant, cls):
        raise ConfigError(f"sae_type '{sae_type}' is a {variant.__name__}, not a {cls.__name__}; call {variant.__name__}.from_pretrained")
    return cfg_class, variant
