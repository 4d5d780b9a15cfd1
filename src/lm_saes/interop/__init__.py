"""Dictionaries of other libraries, read from their files and turned into our equations exactly. Nothing of those libraries is imported.

`SparseDictionary.from_pretrained` asks `read` about every folder that is not ours. One file for each format, each with `NAME`, `FILES` (what to
fetch from the hub), `recognises(folder)` and `read(folder)`; sae-lens' is written too. To read another format: write such a file, add it to
`FORMATS`, and add a golden file made by the library itself (tests/golden).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lm_saes.errors import ConfigError, LmSaesError, WeightsError
from lm_saes.interop import dictionary_learning, gemma_scope, sae_lens, sparsify
from lm_saes.interop.equations import Native

if TYPE_CHECKING:
    from lm_saes.models.sae import SparseAutoEncoder

FORMATS: tuple[ModuleType, ...] = (sae_lens, sparsify, dictionary_learning, gemma_scope)
FILES: tuple[str, ...] = tuple(dict.fromkeys(file for form in FORMATS for file in form.FILES))
"""All files that some format needs."""


def read(folder: Path, overrides: Mapping[str, Any]) -> Native | None:
    """The dictionary in a folder of one of `FORMATS`; None if it is none of them.

    Args:
        overrides: fields of the configuration that the caller sets; hook points among them are not asked of the files.

    Raises:
        WeightsError: the files are damaged, or hold what our equations do not.
        ConfigError: neither the files nor the caller say at which hook point the dictionary reads.
    """
    form = next((form for form in FORMATS if form.recognises(folder)), None)
    if form is None:
        return None
    try:
        native = form.read(folder)
    except LmSaesError:
        raise
    except Exception as error:  # their configurations may hold anything where a number or a name should be
        raise WeightsError(f"{folder} is not what {form.NAME} writes ({type(error).__name__}: {error})") from error
    return _with_hook_points(native, overrides, str(folder))


def from_saelens(source: Any, *, scaling_factor: float | None = None, **cfg_overrides: Any) -> SparseAutoEncoder:
    """A dictionary of sae-lens, in eval mode.

    Args:
        source: a folder that sae-lens wrote, or one of its objects (`SAE`, `TrainingSAE`, `Transcoder`).
        scaling_factor: what the input is multiplied by where the configuration says "expected_average_only_in".
        cfg_overrides: fields of the configuration, such as `device`, or `hook_point_in` where the folder does not say it.

    Raises:
        WeightsError: the files are damaged, or hold what our equations do not.
        ConfigError: an override is wrong, or the hook point is not known.
    """
    from lm_saes.models.pretrained import assemble
    from lm_saes.models.sae import SparseAutoEncoder

    if isinstance(source, str | Path):
        origin = str(source)
        native = sae_lens.read(Path(source), scaling_factor)
    else:
        origin = f"{type(source).__name__} of sae-lens"
        native = sae_lens.convert(
            source.cfg.to_dict(), {name: tensor.detach() for name, tensor in source.state_dict().items()}, scaling_factor, origin
        )
    native = _with_hook_points(native, cfg_overrides, origin)
    return assemble(SparseAutoEncoder, *native, origin=origin, device_mesh=None, fold_activation_scale=False, strict=True, overrides=cfg_overrides)


def to_saelens(dictionary: SparseAutoEncoder, folder: str | Path) -> None:
    """`lm_saes.interop.sae_lens.write`."""
    sae_lens.write(dictionary, folder)


def _with_hook_points(native: Native, overrides: Mapping[str, Any], origin: str) -> Native:
    if "hook_point_in" not in {**native.fields, **overrides}:
        raise ConfigError(f"{origin} does not say at which hook point it reads; pass hook_point_in (and hook_point_out for a transcoder)")
    return native


__all__ = ["FILES", "FORMATS", "Native", "from_saelens", "read", "to_saelens"]
