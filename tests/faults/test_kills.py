"""SIGKILL at random points of real processes: what is started again ends bit for bit like what was never killed."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import jobs
from tests.faults.kills import Job, Kill, finish, kill

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.material(tmp_path_factory.mktemp("kills"))


def killed_and_resumed(job: Job, whole: Job, points: list[str], draw: random.Random) -> list[Kill]:
    """Kill a job at these points, one process after the other, let it end, and compare it with one that was left alone."""
    if not whole.folder.exists():
        finish(whole)
    kills = [struck for point in points if (struck := kill(job, point, draw)) is not None]
    finish(job)
    ended, expected = job.result(job.folder), whole.result(whole.folder)
    differing = [name for name in {**ended, **expected} if ended.get(name, "absent") != expected.get(name, "absent")]
    assert not differing, f"{job.name}, killed at {kills}: {differing}"
    return kills


def test_training_killed_in_its_middle(given: Path, tmp_path: Path) -> None:
    name = "topk, AuxK, k annealing, read ahead"
    job, whole = (jobs.train(given, name, tmp_path / folder) for folder in ("killed", "whole"))
    kills = killed_and_resumed(job, whole, ["work", "checkpoint"], random.Random(0))
    assert [struck.landed for struck in kills] == [True] * len(kills)
    assert kills
    log = (tmp_path / "killed.log").read_text()
    assert "is taken over from process" in log
    assert "which was killed" in log


def test_a_sweep_killed_in_its_middle(given: Path, tmp_path: Path) -> None:
    job, whole = (jobs.sweep(given, tmp_path / folder) for folder in ("killed", "whole"))
    kills = killed_and_resumed(job, whole, ["work"], random.Random(1))
    assert all(struck.landed for struck in kills)
    assert kills


def test_a_cache_killed_in_its_middle(given: Path, tmp_path: Path) -> None:
    job, whole = (jobs.generate(given, tmp_path / folder) for folder in ("killed", "whole"))
    kills = killed_and_resumed(job, whole, ["work"], random.Random(2))
    assert all(struck.landed for struck in kills)
    assert kills


@pytest.mark.slow
def test_fifty_kills(given: Path, tmp_path: Path) -> None:
    """All commands, all activation functions, on the fly and from a cache. Prints what was killed where."""
    draw, kills, runs = random.Random(20261122), list[Kill](), 0

    def strike(job: Job, whole: Job, points: list[str]) -> None:
        nonlocal runs
        kills.extend(killed_and_resumed(job, whole, points, draw))
        runs += 1
        print(f"{runs} jobs, {sum(struck.landed for struck in kills)} kills landed: {job.name}", flush=True)

    def pair(make, *options, **named) -> tuple[Job, Job]:
        place = tmp_path / str(runs)
        return make(given, *options, folder=place / "killed", **named), make(given, *options, folder=place / "whole", **named)

    for options in ({}, {"override_dtype": "int8"}, {"target": "activations-2d", "n_samples_per_chunk": 13}):
        strike(*pair(jobs.generate, **options), ["work"] * 3)
    cache = tmp_path / "0" / "whole"
    for source in (None, cache):
        strike(
            *pair(lambda given, folder, source=source: jobs.sweep(given, folder, source)),
            ["initialisation", "work", "checkpoint", "work", "last save"],
        )
    for name in jobs.TRAINED:
        for source in (None, cache):
            points = ["initialisation", *draw.sample(["work", "work", "checkpoint", "work"], 4), "last save"]
            strike(*pair(lambda given, folder, name=name, source=source: jobs.train(given, name, folder, source)), points)
    for killed, whole in zip(jobs.analyses(tmp_path / "5" / "killed"), jobs.analyses(tmp_path / "5" / "whole"), strict=True):
        finish(whole)
        strike(killed, whole, ["work"] * 3)
    landed = [struck for struck in kills if struck.landed]
    by_point = Counter((struck.job.split(":")[0].split(" activations")[0], struck.point) for struck in landed)
    print(f"\n{len(kills)} kills, {len(landed)} landed during work, {runs} jobs resumed to the end, all bit for bit")
    for (command, point), count in sorted(by_point.items()):
        print(f"  {command}, {point}: {count}")
    assert len(landed) >= 50
