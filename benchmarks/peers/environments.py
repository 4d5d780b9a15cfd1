"""The libraries that are compared, each in a virtual environment of its own, with one version of torch."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

PACKAGES = {
    "sae_lens": ["sae-lens==6.54.12"],
    "sparsify": ["eai-sparsify==1.3.3"],
    "dictionary_learning": ["dictionary-learning==0.1.0"],
    "overcomplete": ["overcomplete==0.3.0"],
}
"""What pip installs for each library, beside torch."""


def python_of(library: str, folder: Path) -> Path:
    """The interpreter of the library's environment; this one's for the library itself and for what needs torch alone."""
    return folder / library / "bin" / "python" if library in PACKAGES else Path(sys.executable)


def is_ready(library: str, folder: Path) -> bool:
    return library not in PACKAGES or _mark(library, folder).is_file()


def make(library: str, folder: Path, torch_index: str | None = None) -> None:
    """Make the library's environment below `folder`, unless it is there. Downloads some 100 MB to several GB: torch comes first, of the
    version that runs here and, with `torch_index`, from that index (such as https://download.pytorch.org/whl/cpu).

    Raises:
        SystemExit: pip failed; it has said why.
    """
    if is_ready(library, folder):
        return
    torch = f"torch=={version('torch').split('+')[0]}"
    print(f"making {folder / library}: {torch}, {', '.join(PACKAGES[library])}", file=sys.stderr)
    venv.create(folder / library, with_pip=True, clear=True)
    constraint = folder / library / "torch.txt"
    constraint.write_text(torch + "\n")
    pip = [str(python_of(library, folder)), "-m", "pip", "install", "--quiet"]
    index = [] if torch_index is None else ["--index-url", torch_index]
    for arguments in ([*index, torch], ["numpy", "-c", str(constraint), *PACKAGES[library]]):
        if subprocess.run([*pip, *arguments], stdout=sys.stderr).returncode:
            raise SystemExit(f"error: {library} cannot be installed; see above. Without it: leave it out of --libraries")
    _mark(library, folder).write_text("\n".join([torch, *PACKAGES[library]]) + "\n")


def _mark(library: str, folder: Path) -> Path:
    """Written when all is installed; its name changes with what is asked for."""
    return folder / library / ("installed-" + "-".join(PACKAGES[library]))
