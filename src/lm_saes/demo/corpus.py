"""The bundled corpus: the sources of the Python standard library, read from the running interpreter.

Every user of the package has this text on disk, it is under a permissive licence (PSF-2.0), and it is real: prose in docstrings,
code, tables and tests of one's patience. Folders that hold tests are left out. A file belongs to the held-out split when the SHA-256
of its path inside the library is 0 modulo 20, so the split is the same on every machine and for every Python version that has the file.

This module needs the standard library only.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "heldout"]

HELDOUT_MODULUS = 20
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One file of the corpus: its path inside the standard library (with forward slashes) and its text."""

    name: str
    text: str


def split_of(name: str) -> Split:
    """The split that the file with this path (relative to the standard library, forward slashes) belongs to."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest, "big") % HELDOUT_MODULUS == 0 else "train"


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def paths(split: Split | None = None, root: Path | None = None) -> list[Path]:
    """The corpus's files in sorted order, of one split or of both (`None`)."""
    root = root or standard_library()
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) and (split is None or split_of(relative.as_posix()) == split):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def documents(split: Split | None = None, root: Path | None = None) -> Iterator[Document]:
    """The corpus's documents in sorted order. Files that are not UTF-8 (a handful of codec sources) are decoded with replacement."""
    root = root or standard_library()
    for path in paths(split, root):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(path.relative_to(root).as_posix(), text)
