"""A disk that is full: a tmpfs of a few megabytes, filled while a cache is written and while a run writes its checkpoints.

Mounting needs root; where that is not there the tests are skipped aloud, but for those with a limit on the size of files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_saes import generate as generate_module
from lm_saes.activations import cache_progress, writer
from lm_saes.activations.cache import ActivationCache
from tests.faults.terminal import Terminal, changed, checkpoints, generation, make_material, settings_file, terminal, training, weights

MIB = 2**20


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def lm_saes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.setattr(generate_module.estimate_generation, "__defaults__", (None, 0.05))
    monkeypatch.setattr(cache_progress, "RESERVE", 64 * 1024)  # of a disk of a megabyte, 16 MiB cannot stay free
    monkeypatch.setattr(generate_module, "RESERVE", 64 * 1024)
    return terminal(monkeypatch, capsys)


class SmallDisk:
    """A disk of its own, with something on it that can be removed to make room."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._ballast = path / "ballast"

    @property
    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def leave(self, n_bytes: int) -> None:
        """Fill it up to so many bytes."""
        self._ballast.write_bytes(b"\1" * max(0, self.free - n_bytes))

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    place, size = tmp_path / "disk", 8 * MIB
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk to fill: mounting a tmpfs needs root ({mounted.stderr.strip()})")
    try:
        yield SmallDisk(place, size)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_cache_that_does_not_fit_is_refused_before_the_first_byte(material: Path, disk: SmallDisk, lm_saes: Terminal, tmp_path: Path) -> None:
    disk.leave(200 * 1024)
    cache = disk.path / "cache"
    line = lm_saes("generate", settings_file(tmp_path, generation(material, cache))).line
    assert line.startswith(f"{cache} needs ")
    assert line.endswith('are free: free some, lower total_tokens, or set override_dtype = "int8"')
    assert not cache.exists()


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No estimate before the first byte, as where the text is streamed."""
    monkeypatch.setattr(generate_module, "estimate_generation", lambda *_, **__: generate_module.GenerationEstimate(None, 1.0, None, 2**40, 1.0))


def clean_shards(material: Path, folder: Path, lm_saes: Terminal, tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "clean.json").write_text(json.dumps(generation(material, folder)))
    assert lm_saes("generate", tmp_path / "clean.json").code == 0
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def stopped_by_a_full_disk(cache: Path, lm_saes: Terminal, path: Path) -> tuple[str, list[str]]:
    """The line that is printed, and the names of the shards that are kept: some but not all of them, and no half of one."""
    line = lm_saes("generate", path).line
    kept = sorted(file.name for file in cache.glob("shard-*"))
    assert 0 < len(kept) < 4
    assert not list(cache.glob(".unfinished_shard*"))
    return line, kept


def goes_on(cache: Path, lm_saes: Terminal, path: Path, expected: dict[str, bytes]) -> None:
    """The same command ends with the shards of a writing that was never stopped."""
    assert lm_saes("generate", path).code == 0
    assert {file.name: file.read_bytes() for file in cache.glob("shard-*")} == expected


def test_a_disk_that_fills_while_a_cache_is_written(
    material: Path, disk: SmallDisk, lm_saes: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen before a shard is begun: the finished ones are kept, and the writing goes on where it stopped when there is room."""
    expected = clean_shards(material, tmp_path / "clean", lm_saes, tmp_path)
    unmeasured(monkeypatch)
    cache, path = disk.path / "cache", settings_file(tmp_path, generation(material, disk.path / "cache"))
    disk.leave(350 * 1024)
    line, kept = stopped_by_a_full_disk(cache, lm_saes, path)
    assert line.startswith(f"the disk of {cache} is full (the next shard needs ")
    assert line.endswith(
        f"; {len(kept)} shards with {500 * len(kept):,} tokens are kept: free some space and run again to go on, "
        f"or use what is there: lm-saes cache finish {cache}"
    )
    disk.make_room()
    goes_on(cache, lm_saes, path, expected)
    assert ActivationCache(cache).verify() == []


def test_a_disk_that_fills_in_the_middle_of_a_shard(
    material: Path, disk: SmallDisk, lm_saes: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process takes the room: what the operating system says is turned into the same line, and half a shard is removed."""
    expected = clean_shards(material, tmp_path / "clean", lm_saes, tmp_path)
    unmeasured(monkeypatch)
    monkeypatch.setattr(writer, "room_for", lambda *_: None)
    cache, path = disk.path / "cache", settings_file(tmp_path, generation(material, disk.path / "cache"))
    disk.leave(200 * 1024)
    line, kept = stopped_by_a_full_disk(cache, lm_saes, path)
    assert line.startswith(f"the disk of {cache} is full (a write failed)")
    assert all((cache / name).read_bytes() == expected[name] for name in kept)
    disk.make_room()
    goes_on(cache, lm_saes, path, expected)


def test_what_is_there_can_be_used(material: Path, disk: SmallDisk, lm_saes: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured(monkeypatch)
    cache = disk.path / "cache"
    disk.leave(350 * 1024)
    assert lm_saes("generate", settings_file(tmp_path, generation(material, cache))).code == 2
    assert lm_saes("cache", "finish", cache).code == 0
    assert ActivationCache(cache).verify() == []


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training whose disk is large enough: its folder."""
    from lm_saes.config import TrainSAESettings
    from lm_saes.runners import train_sae

    folder = tmp_path_factory.mktemp("whole") / "run"
    train_sae(TrainSAESettings.model_validate(large(material, folder)))
    return folder


def large(material: Path, run: Path) -> dict[str, Any]:
    """A training whose checkpoints have some hundred kilobytes."""
    return changed(training(material, run), {"sae__expansion_factor": 16})


@pytest.mark.parametrize("checkpoints_that_fit", [0.5, 1.5, 2.5])
def test_a_disk_that_fills_while_checkpoints_are_written(
    material: Path, whole: Path, disk: SmallDisk, lm_saes: Terminal, tmp_path: Path, checkpoints_that_fit: float
) -> None:
    """The run stops with one line; whole checkpoints are kept and nothing else; when there is room it goes on and ends with the same weights."""
    newest = whole / "checkpoints" / checkpoints(whole)[-1]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    run, path = disk.path / "run", settings_file(tmp_path, large(material, disk.path / "run"))
    disk.leave(int(size * checkpoints_that_fit) + 128 * 1024)
    line = lm_saes("train", path).line
    assert line.startswith(f"cannot write checkpoint {run / 'checkpoints'}/step_"), line
    assert "the disk is full; free some space, or lower keep_checkpoints" in line
    assert len(checkpoints(run)) == int(checkpoints_that_fit)
    assert not [left for left in (run / "checkpoints").iterdir() if left.name.startswith(".")]
    disk.make_room()
    assert lm_saes("train", path, "--resume").code == 0
    assert weights(run) == weights(whole)


def test_a_disk_that_is_full_from_the_start(material: Path, disk: SmallDisk, lm_saes: Terminal, tmp_path: Path) -> None:
    run, path = disk.path / "run", settings_file(tmp_path, large(material, disk.path / "run"))
    disk.leave(0)
    assert "the disk is full; free some space" in lm_saes("train", path).line
    disk.make_room()
    assert lm_saes("train", path, "--resume").code == 0
    assert (run / "sae_weights.safetensors").is_file()


def test_a_disk_that_fills_with_metrics(material: Path, whole: Path, disk: SmallDisk, lm_saes: Terminal, tmp_path: Path) -> None:
    """A line of metrics that does not fit stops the run; the half line is cut off when it goes on."""
    table = changed(large(material, disk.path / "run"), {"trainer__n_checkpoints": 0})
    run, path = disk.path / "run", settings_file(tmp_path, table)
    disk.leave(16 * 1024)
    assert lm_saes("train", path).line.startswith(f"cannot write {run / 'metrics.jsonl'}: the disk is full")
    disk.make_room()
    assert lm_saes("train", path, "--resume").code == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 17))
    assert weights(run) == weights(whole)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from lm_saes.cli import main
main()
"""


def test_files_that_may_not_grow(material: Path, tmp_path: Path) -> None:
    """A limit on the size of files (a quota works alike) stops a run as a full disk does; this needs no root."""
    assert signal.SIGXFSZ
    assert resource.RLIMIT_FSIZE is not None
    path = settings_file(tmp_path, large(material, tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", LIMITED, "100000", "train", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write checkpoint {tmp_path / 'run' / 'checkpoints'}/step_4: ")
    assert "Traceback" not in done.stderr
