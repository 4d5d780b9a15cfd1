"""Build hook: compiles the C++ kernels of `lm_saes.ops.native` where there is a compiler. Without them the package works in plain torch.

A wheel with kernels is for one platform and any Python (py3-none-linux_x86_64), one without is for all (py3-none-any).
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/lm_saes/ops/native")


class NativeKernels(BuildHookInterface):
    """Called by hatchling for wheels and for editable installs, which are wheels too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile, and say what the wheel is for. A failure is one line, never the end of an installation."""
        build = _build_module(Path(self.root) / FOLDER / "build.py")
        if why_not := build.build():
            self.app.display_warning(f"lm-saes without its C++ kernels, slower on a CPU: {why_not}")
            return
        build_data["artifacts"] += [str(FOLDER / build.library_path(name).name) for name in build.instruction_sets()]
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _build_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_kernels_build", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
