"""Text and JSON from files that anybody may have written: bounded in size and depth, strict, every fault said in one line. And files of our own,
written whole or not at all.

One reader for all JSON, one check for all names that stand in files. Tensors have theirs in `tensor_files.py`.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from lm_saes.errors import LmSaesError

LARGEST_TABLE = 64 * 2**20
"""Bytes of a JSON, TOML or YAML file. Ours have kilobytes; a parsed file takes many times its size."""
MOST_VALUES = 1_000_000
"""Values in a configuration, after the aliases of YAML are followed."""
DEEPEST = 64
"""Levels of a configuration."""
UNFINISHED = ".unfinished_"
"""What names begin with of files and folders that are being written or removed: whoever finds one after a crash may delete it."""


class _Refused(ValueError):
    """JSON that the parser would take and we do not."""


def parse_json(text: str | bytes, *, tolerant: bool = False) -> Any:
    """JSON as the standard has it: no NaN or infinity, no number beyond floats, no key twice in an object, no nesting beyond what the
    interpreter recurses into.

    Args:
        tolerant: take NaN, infinity and double keys (the last holds): for rows of text of which one field is read.

    Raises:
        ValueError: it is not JSON; the message is short.
    """
    strict: dict[str, Any] = {} if tolerant else {"object_pairs_hook": _object, "parse_float": _float, "parse_constant": _constant}
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, **strict)
    except RecursionError:
        raise _Refused("it is nested too deeply") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise _Refused("it holds a number of thousands of digits") from None
        raise


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return table


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _Refused(f"the number {digits[:20]} is too large")
    return number


def _constant(word: str) -> None:
    raise _Refused(f"{word} is not JSON")


def read_json(path: Path, error: type[LmSaesError], largest: int = LARGEST_TABLE) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file; the caller knows what to say.
        error: it is larger than `largest` bytes, or it is not JSON.
    """
    try:
        size = path.stat().st_size
        if size > largest:
            raise _Refused(f"it has {size:,} bytes, more than {largest:,}")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as fault:
        raise error(f"{path} cannot be read as JSON: {fault}") from None


def read_json_object(path: Path, error: type[LmSaesError], largest: int = LARGEST_TABLE) -> dict[str, Any]:
    """The object in a JSON file. Raises as `read_json`."""
    table = read_json(path, error, largest)
    if not isinstance(table, dict):
        raise error(f"{path} must hold a JSON object, got {type(table).__name__}")
    return table


def finite(value: Any) -> Any:
    """A table as JSON can hold it: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def values_within(value: Any, most: int = MOST_VALUES) -> None:
    """Count the values in nested tables and lists, as often as they are reached: a few lines of YAML can stand for billions.

    Raises:
        ValueError: there are more than `most`, or they are nested too deeply.
    """
    counted = 0
    waiting: list[Iterator[Any]] = [iter((value,))]
    while waiting:
        item = next(waiting[-1], waiting)
        if item is waiting:  # the sentinel: this level is done
            waiting.pop()
            continue
        counted += 1
        if counted > most:
            raise _Refused(f"it stands for more than {most:,} values")
        if len(waiting) > DEEPEST:
            raise _Refused("it is nested too deeply")
        if isinstance(item, dict):
            waiting.append(iter(item.values()))
        elif isinstance(item, list):
            waiting.append(iter(item))


def inside(folder: Path, name: object, error: type[LmSaesError], origin: str) -> Path:
    """The path of `name`, which a file (`origin`) gives, below `folder`. Links are followed: the hub's cache consists of them.

    Raises:
        error: it is not the relative name of something in that folder.
    """
    path = PurePath(name) if isinstance(name, str) and 0 < len(name) < 4096 and name.isprintable() and "\\" not in name else None
    if path is None or path.is_absolute() or path.drive or ".." in path.parts:
        raise error(f"{origin} names {name!r}, which is not in its folder; nothing outside {folder} is read")
    return folder / path


def write_whole(path: Path, write: Callable[[Path], Any], locked: bool = True) -> None:
    """Have `write(temporary path)` write a file, flush it to the disk and give it its name: after a crash it is there whole or not at all, or as it
    was before.

    Args:
        locked: nobody else writes the file at the same time. (Then what a crash leaves has one name, and is written over the next time.)
    """
    temporary = path.with_name(f"{UNFINISHED}{path.name}" + ("" if locked else f"_{os.getpid()}"))
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an error says. (The safetensors library has a type of its own for it.)"""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        words in str(error) for words in ("os error 28", "No space left")
    )


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest of the folders that it is in that exists."""
    return next(part for part in (path, *path.absolute().parents) if part.exists())


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows does it for files that are open for writing, and not for folders; some other
    file systems (mounted drives of the cloud) do not do it for folders either."""
    if not path.is_dir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as fault:
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES):
            raise
