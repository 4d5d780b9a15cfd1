"""The logic of the benchmark scripts at tiny shapes: the feed and its clock, the workers, the tables, the floor; other libraries where their environments are."""

# pyright: reportMissingImports=false
# The scripts are no package: they are found by a path that a fixture adds.
from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
VENVS = Path(os.environ.get("LM_SAES_BENCHMARK_VENVS", BENCHMARKS / ".venvs"))


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")


def task(**changes):
    from peers.feed import Task

    return Task(**{"kind": "topk", "d_model": 16, "d_sae": 64, "k": 4, "tokens": 128, "lr": 1e-3, "density": 0.05, **changes})


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"threads": 1, "venvs": VENVS, **changes})


def result(wall: list[list[float]], **changes) -> dict:
    said = {"fvu": 0.5, "l0": 4.0, "moved": 1.0, "peak_mib": 300.0, "before_mib": 200.0, "version": "1"}
    return {"wall": wall, "cpu": wall, "before": {**said, "fvu": 0.9}, "after": {**said, **changes}}


def record(results: dict, **changes) -> dict:
    return {"date": "2026-01-01 00:00", "machine": "one", "threads": 1, "task": vars(task()), "results": results, **changes}


# ---------------------------------------------------------------------------------------------------------------- feed


def test_batches_are_the_same_everywhere_and_of_unit_variance_with_a_mean():
    from peers.feed import make_batches

    batches = make_batches(2, 512, 32)
    assert numpy.array_equal(batches, make_batches(2, 512, 32))
    assert batches.shape == (2, 512, 32)
    assert batches.dtype == numpy.float32
    assert batches.std() == pytest.approx(1, abs=1e-3)
    rows = batches.reshape(-1, 32)
    assert numpy.abs(rows.mean(0)).max() > 0.5
    variances = numpy.linalg.eigvalsh(numpy.cov(rows.T))
    assert variances[-1] > 5 * numpy.median(variances)  # a few directions hold most of it


def test_the_feed_times_what_the_loop_does_between_two_batches():
    from peers.feed import Feed

    commands = [json.dumps({"do": "steps", "n": 2}), json.dumps({"do": "steps", "n": 1})]
    answers = io.StringIO()
    feed = Feed([torch.zeros(3, 2), torch.ones(3, 2)], commands, answers)
    assert next(feed)[0, 0] == 0
    time.sleep(0.05)
    assert next(feed)[0, 0] == 1
    assert next(feed)[0, 0] == 0  # answers to the first command, then obeys the second
    (answer,) = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert answer["wall"][0] > 0.04
    assert answer["wall"][1] < 0.04
    assert answer["cpu"][0] < 0.04  # it slept


def test_the_feed_tells_whether_a_dictionary_learned():
    from peers.feed import Feed

    answers = io.StringIO()
    x = torch.randn(50, 4)
    commands = [json.dumps({"do": "check"}), json.dumps({"do": "steps", "n": 1})]
    feed = Feed([x], commands, answers)
    weight = torch.zeros(3, 3)
    feed.ready([weight], lambda x: (torch.full((len(x),), 2), x - 0.5 * (x - x.mean(0))), "1.2")
    weight += 0.25
    next(feed)
    answer = json.loads(answers.getvalue())
    assert answer["fvu"] == pytest.approx(0.25, rel=1e-5)
    assert answer["l0"] == 2
    assert answer["moved"] == 0.25
    assert answer["version"] == "1.2"
    assert answer["peak_mib"] >= answer["before_mib"] > 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_set_density_makes_each_latent_fire_on_that_share_of_the_tokens(scale):
    from peers.feed import set_density

    torch.manual_seed(0)
    batch, weight, bias = torch.randn(1000, 8), torch.randn(8, 3000), torch.zeros(3000)
    scales = torch.full((3000,), scale)
    set_density(bias, lambda x: scales * (x @ weight + bias) - 0.1, [batch], 0.02, scales)
    share = (scales * (batch @ weight + bias) > 0.1).float().mean(0)
    assert torch.allclose(share, torch.tensor(0.02), atol=0.0021)


# ------------------------------------------------------------------------------------------------------- workers, floor


def pool_of(rows, tasks, **changes):
    from peers.pool import Pool

    return Pool(list(zip(rows, tasks, strict=True)), options(**changes))


def test_workers_take_turns_and_one_that_fails_is_left_out_aloud(capsys):
    import training_step

    rows = training_step.contestants(["nonsense", "reference"], ["lm_saes", "floor"])
    failed, own, floor = pool_of(rows, [task()] * 3).measure(rounds=2, steps=3, warmup=1)
    assert failed is None
    assert "lm_saes nonsense is left out" in capsys.readouterr().err
    assert own is not None
    assert floor is not None
    for answer in (own, floor):
        assert [len(steps) for steps in answer["wall"]] == [3, 3]
        assert min(seconds for steps in answer["wall"] for seconds in steps) > 0
    assert "ops: reference" in own["after"]["version"]
    whole = record({"own": own, "floor": floor})
    assert training_step.doubts(whole) == []
    assert "Pieces of the floor" in training_step.table(whole)


def answers_of(library: str, one, *commands: dict) -> list[dict]:
    """What a library's adapter answers, in this process."""
    import importlib

    import feed  # as the adapters import it

    batches = [torch.from_numpy(batch) for batch in feed.make_batches(4, one.tokens, one.d_model)]
    answers = io.StringIO()
    adapter = importlib.import_module(f"with_{library}")
    with pytest.raises(feed.Stop):
        adapter.train(one, feed.Feed(batches, map(json.dumps, commands), answers))
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.mark.parametrize(("kind", "l0"), [("topk", 4), ("batchtopk", 4), ("relu", 0.05 * 256), ("jumprelu", 0.05 * 256)])
def test_the_library_itself_learns_with_the_asked_number_of_codes(kind, l0):
    one = task(kind=kind, tokens=512, d_sae=256, lr=1e-4)
    before, steps, after, _ = answers_of("lm_saes", one, {"do": "check"}, {"do": "steps", "n": 3}, {"do": "check"})
    assert len(steps["wall"]) == len(steps["cpu"]) == 3
    assert after["fvu"] < before["fvu"] < 1
    assert after["moved"] > 0
    assert after["l0"] == pytest.approx(l0, rel=0.2)


def test_the_floor_has_three_pieces_that_add_up():
    _, steps, check, _ = answers_of("floor", task(tokens=2048, d_model=64, d_sae=512), {"do": "check"}, {"do": "steps", "n": 4}, {"do": "check"})
    assert set(check["pieces"]) == {"encoder", "sparse", "adam"}
    for i, wall in enumerate(steps["wall"]):
        assert sum(times[i] for times in check["pieces"].values()) <= wall
    assert check["l0"] == 4


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("sparsify (adam)", "topk"),
        ("sparsify (signum)", "topk"),
        ("sae-lens (sparse)", "topk"),
        *((label, kind) for label in ("sae-lens", "dictionary_learning", "overcomplete") for kind in ("topk", "batchtopk", "relu", "jumprelu")),
    ],
)
@pytest.mark.slow
def test_every_library_learns_with_the_asked_number_of_codes(label, kind):
    import training_step
    from peers import environments

    (row,) = [row for row in training_step.PEER_ROWS if row.label == label]
    if not environments.is_ready(row.library, VENVS):
        pytest.skip(f"no environment of {row.library} in {VENVS}: python benchmarks/training_step.py --make-only")
    one = task(kind=kind, tokens=512, d_sae=256, lr=1e-3 if "topk" in kind else 1e-5)
    (answer,) = pool_of([row], [one]).measure(rounds=1, steps=10, warmup=10)
    assert answer is not None
    assert training_step.doubts(record({label: answer}, task=vars(one))) == []


# --------------------------------------------------------------------------------------------------------------- tables


def test_ratios_are_of_medians_against_the_first_row():
    import training_step

    lines = training_step.table(record({"a": result([[1.0, 3.0], [2.0, 2.0]]), "b": result([[4.0, 4.0], [8.0, 8.0]])})).splitlines()
    a, b = (line for line in lines if line.startswith(("| a |", "| b |")))
    assert a.startswith("| a | 1.00 | 1.00 to 1.00 |")
    assert b.startswith("| b | 3.00 |")  # medians 6 and 2
    assert "| 6000 | 4000 |" in b
    assert "| 300 | 100 | 4.0 | 0.9000 → 0.5000 |" in b


def test_doubts_name_libraries_that_did_not_learn_or_have_other_codes():
    import training_step

    doubts = training_step.doubts(
        record({"a": result([[1.0]]), "b": result([[1.0]], fvu=0.95), "c": result([[1.0]], l0=40.0), "d": result([[1.0]], moved=0.0)})
    )
    assert [doubt.split()[0] for doubt in doubts] == ["b", "c", "d"]


def test_records_add_up_in_a_file_and_only_those_of_the_same_task(tmp_path):
    import training_step

    path = tmp_path / "records.json"
    training_step.append(path, record({"a": result([[1.0]]), "b": result([[2.0]])}))
    training_step.append(path, record({"a": result([[3.0]]), "c": result([[9.0]])}))
    training_step.append(path, record({"a": result([[5.0]])}, threads=2))
    first, second = training_step.merged(json.loads(path.read_text()))
    assert first["results"].keys() == {"a"}  # rows that were not there in every record cannot be compared
    assert first["results"]["a"]["wall"] == [[1.0], [3.0]]
    assert second["results"]["a"]["wall"] == [[5.0]]


def test_growth_is_against_proportional():
    import scaling

    text = scaling.table("F", [10, 20, 40], {"auto": [1.0, 2.0, 8.0]}, task())
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row[2] for row in rows] == ["1.00", "1.00", "2.00"]
    assert [vars(point)["d_sae"] for point in scaling.points(task(), "F", [10, 20])] == [10, 20]


def test_the_clock_of_a_run_counts_set_up_apart():
    from run_common import Clock

    class Step:
        def __call__(self) -> int:
            time.sleep(0.02)
            return 7

    clock = Clock()
    clock.count_calls(Step, "__call__")
    time.sleep(0.1)
    step = Step()
    assert [step() for _ in range(4)] == [7] * 4
    read = clock.read()
    assert read["setup"] >= 0.1
    assert 0.02 <= read["step"] < 0.1
    assert read["wall"] >= read["setup"] + 4 * 0.02


def test_pieces_are_shares_of_a_step():
    import stream
    from stream import Seconds

    times = {
        "step": [Seconds(9.0, 10.0), Seconds(4.0, 8.0), Seconds(5.0, 30.0)],
        "shuffle": [Seconds(0.4, 1.0), Seconds(0.2, 0.5), Seconds(7.0, 0.1)],
        "statistics": [Seconds(0.04, 0.1)] * 3,
        "log step": [Seconds(-9.0, 1.0), Seconds(1.0, 2.0), Seconds(2.0, 9.0)],
    }
    found = stream.shares(times)
    assert found == {"shuffle": (0.2 / 4, 0.5 / 10), "statistics": (0.04 / 4, 0.1 / 10), "log step": (1.0 / 4, 2.0 / 10)}


def test_what_is_watched_is_counted_and_put_back():
    import stream

    before = stream.step_module.firing_counts
    times = stream.measure(stream.Shape(16, 64, 4, 128, 1024), "batchtopk", rounds=2)
    assert stream.step_module.firing_counts is before
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys(("step", *stream.PIECES), 2)
    for step, part in zip(times["step"], times["statistics"], strict=True):
        assert 0 < part.wall < step.wall
    assert min(one.wall for one in times["shuffle"]) > 0


def test_a_sweep_should_take_one_stream_and_all_steps():
    import sweep

    assert sweep.one_stream_and_steps([10.0, 14.0], [2.0, 4.0]) == (8 + 10) / 2 + 6


@pytest.mark.parametrize("script", ["training_step", "end_to_end", "scaling", "stream", "memory"])
def test_help_is_there(script):
    text = subprocess.run([sys.executable, str(BENCHMARKS / f"{script}.py"), "--help"], check=True, capture_output=True, text=True).stdout
    assert f"{script}.py" in text


# -------------------------------------------------------------------------------------------------------------- recipe


def test_the_parts_of_the_recipe_are_all_combined_and_each_does_something():
    from activation_functions import BATCH, Batches
    from recipe import ARMS, train

    assert len(set(map(frozenset, ARMS.values()))) == len(ARMS) == 8
    rows = torch.randn(11 * BATCH, 16, generator=torch.Generator().manual_seed(0))
    batches = Batches(rows, torch.arange(len(rows)), "h")
    weights = {}
    for name in ("batchtopk", "batchtopk + nested", "batchtopk + annealed", "batchtopk + 3 lr"):
        sae, _ = train(ARMS[name], batches, "h", 16, l0=4, expansion=4, seed=0)
        assert (sae.cfg.matryoshka is not None) == ("nested" in ARMS[name])
        assert sae.current_k == sae.cfg.top_k == 4, "the last k is that of all"
        weights[name] = sae.W_D.detach().clone()
    assert all(not torch.equal(weights["batchtopk"], other) for name, other in weights.items() if name != "batchtopk")
