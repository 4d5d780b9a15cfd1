"""The floors of docs/architecture.md, held by the import graph; and what may be loaded when."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import lm_saes

ROOT = Path(lm_saes.__file__).parent
FLOORS = {
    "errors": 0, "version": 0, "config": 0, "demo": 0, "files": 0, "locks": 0,
    "devices": 1, "hub": 1, "ops": 1, "tensor_files": 1,
    "models": 2, "losses": 2,
    "lm": 3, "activations": 3.5,
    "training": 4, "evaluation": 4, "analysis": 4, "interop": 4,
    "records": 5, "assembly": 5, "display": 5, "runners": 5, "sweep": 5, "comparison": 5, "memory": 5, "fitting": 5, "estimate": 5, "estimate_sweep": 5, "commands": 5, "bench_cli": 5, "bench_commands": 5, "cli": 5,
    "generate": 5, "cache_cli": 5, "cache_commands": 5,
    "inspection": 5, "compare": 5, "baselines": 5,
}  # fmt: skip
UPWARD = {("models/pretrained.py", "interop"), ("models/sae.py", "interop")}
"""The one step up, deferred to the call: a folder that is not ours (`from_pretrained`, `from_saelens`, `to_saelens`)."""
ONE_ROOM_ONLY = {"transformers": ("lm/huggingface.py",), "transformer_lens": ("lm/transformer_lens.py",), "datasets": ("activations/text.py",)}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path, for_types: bool = True) -> set[str]:
    """Modules and names that a file imports; `for_types=False` leaves out what only a type checker sees."""
    names = set()
    tree = ast.parse(path.read_text())
    if not for_types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: write imports in full"
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_downward(path):
    own = FLOORS[room(path)]
    for name in imported(path):
        if name.startswith("lm_saes."):
            other = name.split(".")[1]
            if other in FLOORS and (path.relative_to(ROOT).as_posix(), other) not in UPWARD:
                assert FLOORS[other] <= own, f"{path.relative_to(ROOT)} (floor {own}) imports {name} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_libraries_have_one_importer(path):
    for library, homes in ONE_ROOM_ONLY.items():
        if path.relative_to(ROOT).as_posix() not in homes:
            assert not any(name.split(".")[0] == library for name in imported(path)), f"{path} imports {library}"


def test_there_is_no_circle_of_rooms():
    edges = {}
    for path in modules():
        others = {name.split(".")[1] for name in imported(path, for_types=False) if name.startswith("lm_saes.")}
        edges.setdefault(room(path), set()).update(other for other in others if (path.relative_to(ROOT).as_posix(), other) not in UPWARD)
    done, walking = set(), []

    def walk(node):
        assert node not in walking, f"circle: {' -> '.join([*walking, node])}"
        if node in done:
            return
        walking.append(node)
        for other in sorted(edges.get(node, ())):
            if other != node and other in FLOORS:
                walk(other)
        done.add(walking.pop())

    for node in sorted(edges):
        walk(node)


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


HEAVY = ["torch", "transformers", "datasets", "fastapi", "wandb", "matplotlib", "numpy", "pandas"]


def test_importing_the_package_and_its_configs_loads_nothing_heavy():
    loaded = run_python(
        f"import sys, lm_saes; from lm_saes import SAEConfig, TrainSAESettings; print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_help_loads_nothing_heavy():
    code = f"import sys\nsys.argv = ['lm-saes', '--help']\nfrom lm_saes.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\nprint([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code).strip().splitlines()[-1] == "[]"


def test_import_is_quick():
    """0.15 s is the promise; the best of five keeps a busy machine out of the figure."""
    best = min(float(run_python("import time; start = time.perf_counter(); import lm_saes; print(time.perf_counter() - start)")) for _ in range(5))
    assert best < 0.15


def test_help_is_quick():
    """0.5 s is the promise. Counted in seconds of processor time, which a busy machine does not stretch; it never waits for anything else."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lm_saes.cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5
