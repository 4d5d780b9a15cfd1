"""The errors that `lm_saes` raises for things a user can mend.

    LmSaesError
    ├── ConfigError            a value, a field or a file of the configuration (also a ValueError)
    ├── DeviceError            a device that this machine does not have
    ├── DataError              a dataset or corpus that is missing, empty or malformed
    ├── CacheError             activations on disk that are missing, damaged, unfinished or do not fit on the disk
    ├── LanguageModelError     a language model that cannot be found, opened or run
    │   └── HookPointError     a hook point that the model does not have, or of another width
    ├── RunFolderError         a run's folder: in use, used, or without a whole checkpoint
    ├── WeightsError           a saved dictionary that is missing, damaged or does not match its config
    ├── FoldingError           folding that does not exist or was done already
    └── NonFiniteError         NaN or infinity in activations, losses or gradients

Each message says what was wanted, what came, and how to fix it, in one line. The command line prints that line and exits with
code 2; a bug in the library keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmSaesError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(LmSaesError, ValueError):
    """A configuration value, field or file is wrong."""


class DeviceError(LmSaesError):
    """The device asked for does not exist here."""


class DataError(LmSaesError):
    """A dataset is missing, empty or malformed."""


class CacheError(LmSaesError):
    """Activations on disk are missing, damaged, not finished, or there is no room for them."""


class LanguageModelError(LmSaesError):
    """A language model cannot be found, opened or run."""


class HookPointError(LanguageModelError):
    """A hook point that the model does not have, or whose width is not the one configured."""


class RunFolderError(LmSaesError):
    """A run's folder is in use, was used before, or holds no whole checkpoint."""


class WeightsError(LmSaesError):
    """Saved weights are missing, damaged or do not match their configuration."""


class FoldingError(LmSaesError):
    """Folding was asked for where it does not exist, or twice."""


class NonFiniteError(LmSaesError):
    """NaN or infinity where numbers were expected."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `known`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
