"""One writer at a time: locks on folders, with the owner's name for whoever comes second.

    with exclusive(folder / ".lock", "the run in runs/a") as former: ...

The lock is the operating system's, on an open file, so it ends with its process, however that ends. Beside it stands `<name>.json`, which
says who holds it: {"host", "process", "since"}. It is removed when the lock is given back; where it is found without a lock, its owner died.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from lm_saes.errors import LmSaesError, RunFolderError
from lm_saes.files import disk_is_full, parse_json

LOCK_FILE = ".lock"


class Owner(NamedTuple):
    """Who holds a lock, or held it when it died."""

    host: str
    process: int
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


@contextmanager
def exclusive(path: Path, what: str, *, error: type[LmSaesError] = RunFolderError, wait: bool = False) -> Iterator[Owner | None]:
    """Hold the lock at `path` (in a folder that exists), or refuse.

    Args:
        what: what is locked, for the message: "the run in runs/a".
        error: what is raised.
        wait: wait for whoever holds it instead.

    Yields:
        The owner before this one, if it died without giving the lock back.

    Raises:
        error: another process, or another part of this one, holds the lock, and the message names it; or the folder cannot be written.
    """
    lock, owner_file = FileLock(path), path.with_name(f"{path.name}.json")
    try:
        lock.acquire(timeout=-1 if wait else 0)
        former = _owner(owner_file)
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        owner_file.write_text(json.dumps(Owner(socket.gethostname(), os.getpid(), since)._asdict()), encoding="utf-8")
    except Timeout:
        holder = _owner(owner_file)
        raise error(f"{what} is being written by {holder or 'another process'}; wait for it, stop it, or choose another folder") from None
    except OSError as fault:
        lock.release()
        why = (
            "the disk is full; free some space"
            if disk_is_full(fault)
            else f"{fault.strerror or fault} ({fault.filename or path}); choose another folder"
        )
        raise error(f"{what} cannot be written: {why}") from None
    try:
        yield former
    finally:
        with suppress(OSError):  # the folder may be gone
            owner_file.unlink()
        lock.release()


def _owner(path: Path) -> Owner | None:
    try:
        table = parse_json(path.read_bytes())
        return Owner(str(table["host"]), int(table["process"]), str(table["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
