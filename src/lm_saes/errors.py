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
import os
import re
from collections.abc import Iterable

LONGEST_MESSAGE = 2000
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
CREDENTIALS = re.compile(r"hf_[A-Za-z0-9]{20,}|(?<=://)[^/@\s]+(?=@)|(?i:(?<=signature=))[^&\s]+")
"""Tokens of the hub; names and passwords in addresses; signatures of addresses that are good for a while."""


def one_safe_line(text: str) -> str:
    """A message on one line of bounded length that a terminal shows as it is: what it would obey or cannot show is escaped, keys and passwords struck out.
    Messages quote files and libraries, which may hold anything."""
    text = text if len(text) <= 10 * LONGEST_MESSAGE else f"{text[: 5 * LONGEST_MESSAGE]} ... {text[-LONGEST_MESSAGE:]}"
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        text = text.replace(secret, "***") if len(secret) >= 8 else text
    text = " ".join(line.strip() for line in CREDENTIALS.sub("***", text).splitlines())
    text = "".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in text)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 300]} ... {text[-280:]}"


class LmSaesError(Exception):
    """Base of every error that a user can mend. Its message is one line (see `one_safe_line`)."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_safe_line(message))


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
