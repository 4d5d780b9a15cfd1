"""Compiles the C++ kernels, once for each instruction set, with the system's compiler. Standard library only.

The build hook (`hatch_build.py`) calls this when the package is built or installed. In an editable install, after a change of the sources:
`python src/lm_saes/ops/native/build.py`.

Each instruction set becomes a shared library of its own. In one library, a function of the C++ library that is compiled for several of them
would be kept once, perhaps with instructions that the processor does not have. The libraries need nothing but the C library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *(
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-shared",
        "-pthread",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-math-errno",
        "-ffp-contract=fast",
    ),
    *(
        "-Wall",
        "-Wextra",
        "-Wno-maybe-uninitialized",
        "-Wno-psabi",
    ),  # GCC 12 takes its own intrinsics for uninitialised
)
LINUX_FLAGS = ("-static-libgcc", "-Wl,--as-needed")
AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt")
AVX512 = (
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512cd",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
)
TIME_LIMIT = 300
"""Seconds for a compilation, which takes about five."""


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """The instruction sets that this kind of processor may have, best first, with what tells the compiler so."""
    generic: dict[str, tuple[str, ...]] = {"generic": ()}  # SSE2 on x86-64, NEON on arm64
    return {"avx512": AVX512, "avx2": AVX2} | generic if platform.machine().lower() in ("x86_64", "amd64") else generic


def library_path(instruction_set: str) -> Path:
    """Where the library for an instruction set is or would be."""
    return FOLDER / f"kernels_{instruction_set}{'.dylib' if sys.platform == 'darwin' else '.so'}"


def sources_hash() -> str:
    """A fingerprint of the sources and of this file; it is compiled into the libraries."""
    fingerprint = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), FOLDER / "build.py"]):
        fingerprint.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return fingerprint.hexdigest()[:16]


def is_current(library: Path) -> bool:
    """Whether a library was compiled from the sources beside it; without loading it."""
    return library.exists() and sources_hash().encode() in library.read_bytes()


def find_compiler() -> list[str] | None:
    """The command in the environment variable CXX, or the first of the usual names that exists."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    return next(([path] for name in COMPILERS if (path := shutil.which(name))), None)


def build() -> str | None:
    """Compile whatever is not current. None if all libraries are there; else why not, in one line, and then there is none."""
    wanted = instruction_sets()
    if all(is_current(library_path(name)) for name in wanted):
        return None
    for name in wanted:
        library_path(name).unlink(missing_ok=True)
    if os.name == "nt":
        return "the kernels are written for GCC and Clang, and not built on Windows"
    if (compiler := find_compiler()) is None:
        return f"no C++ compiler found (CXX, {', '.join(COMPILERS)})"
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="build-") as scratch:
        built = {name: Path(scratch) / library_path(name).name for name in wanted}
        for name, flags in wanted.items():
            if problem := _compile(
                [
                    *compiler,
                    *FLAGS,
                    *(LINUX_FLAGS if sys.platform == "linux" else ()),
                    *flags,
                ],
                built[name],
            ):
                return problem
        for name, path in built.items():
            path.replace(library_path(name))
    return None


def _compile(command: list[str], library: Path) -> str | None:
    sources = [str(path) for path in sorted(FOLDER.glob("*.cpp"))]
    command = [
        *command,
        f'-DLM_SAES_SOURCES="{sources_hash()}"',
        "-o",
        str(library),
        *sources,
    ]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
            env=os.environ | {"LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} did not run: {error}"
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        return f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}"
    return None


if __name__ == "__main__":
    sys.exit(build())
