"""The logic of benchmarks/active_subspace at tiny shapes: arms, the synthetic control, what is measured, and that nothing is done twice."""

# pyright: reportMissingImports=false
# The scripts are no package: they are found by a path that a fixture adds.
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lm_saes import SAEConfig
from lm_saes.models.statistics import RunningCovariance, effective_rank

FOLDER = Path(__file__).parent.parent / "benchmarks/active_subspace"
HOOK = "h"


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def batches(n: int = 4, width: int = 16, inside: int = 6) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=draw))
    rows = torch.randn(n * 64, inside, generator=draw) @ basis[:inside] + 1.0
    return [{HOOK: part, "tokens": torch.zeros(64, dtype=torch.long)} for part in rows.split(64)]


def config(width: int = 16) -> SAEConfig:
    return SAEConfig(hook_point_in=HOOK, d_model=width, expansion_factor=4, act_fn="topk", top_k=4, device="cpu")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_control_has_the_effective_rank_that_is_asked_for(share):
    from lowrank import activations, standard_deviations

    assert effective_rank(standard_deviations(share, 32)) == pytest.approx(share * 32, rel=1e-9)
    moments = RunningCovariance()
    moments.update(activations(share, 40_000, seed=3, width=32, features=128))
    assert effective_rank(moments.principal_directions()[0].sqrt()) == pytest.approx(share * 32, rel=0.02)
    assert float(moments.mean.norm()) < 0.1


def test_the_arms_differ_in_their_start_and_in_nothing_that_centres_it():
    from arms import ARMS, start

    starts = {name: start(arm, config(), batches(), seed=0) for name, arm in ARMS.items()}
    random, _ = starts["random"]
    for name, (sae, d_active) in starts.items():
        assert (d_active is not None) == (ARMS[name].subspace is not None)
        assert torch.equal(sae.b_D, random.b_D)
        x = torch.cat([batch[HOOK] for batch in batches()])
        normalized = sae.prepare_input(sae.normalize_activations({HOOK: x}))
        if not ARMS[name].aligned:
            assert (normalized @ sae.W_E + sae.b_E).mean(0).abs().max() < 1e-4, name
    assert torch.linalg.matrix_rank(starts["active-.25"][0].W_D) == 4
    points = starts["data-points"][0].W_D
    assert torch.linalg.matrix_rank(points, rtol=1e-3) == 6  # as the data


def test_aligned_encoders_stay_aligned_whatever_the_optimizer_does():
    from arms import ARMS, start

    sae, _ = start(ARMS["aligned"], config(), batches(), seed=0)

    def products() -> torch.Tensor:
        return (sae.W_E.T * sae.W_D).sum(1)

    assert torch.allclose(products(), torch.ones(64), atol=1e-5)
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(products(), torch.ones(64), atol=1e-4)


def test_dead_latents_are_counted_over_the_window_and_explained_variance_over_all():
    from arms import ARMS, start
    from measure import quality, window

    assert window(64, 4) == 320
    sae, _ = start(ARMS["random"], config(), batches(), seed=0)
    heldout = torch.cat([batch[HOOK] for batch in batches(8)])
    with torch.no_grad():
        codes = sae.eval().features({HOOK: heldout})
        reconstruction = sae.reconstruct({HOOK: heldout})
    found = quality(sae, heldout)
    assert found["dead"] == int((codes[:320] == 0).all(0).sum()) / 64
    residual = (heldout - reconstruction).square().sum() / (heldout - heldout.mean(0)).square().sum()
    assert found["explained_variance"] == pytest.approx(1 - float(residual), abs=1e-5)
    with pytest.raises(ValueError, match="320 held-out tokens, there are 319"):
        quality(sae, heldout[:319])


def test_a_run_goes_on_where_it_stopped_and_ends_in_tables(tmp_path, monkeypatch):
    import report
    import run

    monkeypatch.setattr(run, "RANKS", (0.6,))
    words = ["--sources", "synthetic", "--seeds", "1", "--tokens", "2048", "--heldout", "2560", "--batch", "256", "--out", str(tmp_path)]
    options = run.options_of(words)
    options.widths = {"synthetic": (2,)}
    done = []
    train = run.train
    monkeypatch.setattr(run, "train", lambda job, *rest: done.append(job) or train(job, *rest))
    monkeypatch.setattr(run, "INITIALISED_FROM", 1024)
    run.Bench(options).run()
    assert [job.arm for job in done] == ["random", "active-auto", "active-.25"]
    lines = run.read_results(tmp_path / "results.jsonl")
    assert lines[0]["d_active"] is None
    assert lines[1]["d_active"] == pytest.approx(0.6 * 128, abs=4)
    assert lines[2]["d_active"] == 32
    assert 0.5 < lines[0]["effective_rank"] < 0.65
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    run.Bench(options).run()
    assert [job.arm for job in done[3:]] == ["random"]  # the others were there
    run.Bench(run.options_of([*words, "--seeds", "0"])).run()
    assert len(done) == 4

    table = report.dose_table(run.read_results(tmp_path / "results.jsonl"))
    gain = lines[2]["explained_variance"] - lines[0]["explained_variance"]
    assert "| control, rank 0.6 | 2 |" in table
    assert table.endswith(f" | {gain:+.3f} |")
    start = lines[0]["explained_variance"]
    worse = [{**line, "seed": 1, "explained_variance": start - 0.006 * (line["arm"] == "active-.25")} for line in lines]
    assert f"| active subspace, .25 D | 2 | -0.006 | {(gain - 0.006) / 2:+.3f} | {gain:+.3f} | 1 |" in report.gains_table([*lines, *worse])
    layer = [{**line, "source": "demo", "hook_point": "x", "cost": 0.1} for line in lines]
    longer = {**layer[0], "tokens": 4096}
    arms = report.arms_table([*layer, {**layer[0], "seed": 1, "dead": layer[0]["dead"] + 0.02}, longer], {("demo", "x")})
    assert f"| tied random | 2 | {100 * lines[0]['dead_start']:.1f} ± 0.0 % | {100 * lines[0]['dead'] + 1:.1f} ± 1.0 % |" in arms
    assert arms.count("**demo model, x**") == 2
    assert "4,096 tokens" in arms.split("**demo model, x**")[2]


def test_the_figure_is_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    import figure
    from report import KINDS

    line = {"hook_point": "x", "k": 4, "seed": 0, "tokens": 9, "dead": 0.1, "effective_rank": 0.5, "explained_variance": 0.8}
    results = [
        {**line, "source": source, "arm": arm, "expansion": width, "d_sae": 8 * width, "explained_variance": variance}
        for source in ("demo", "synthetic")
        for width in (2, 4)
        for arm, variance in (("random", 0.8), ("active-auto", 0.82), ("aligned", 0.5))
    ]
    hooks = {f"blocks.{block}.{kind}": {"effective_rank": 0.5, "variance_99": 0.6, "width": 8, "tokens": 9} for block in (0, 1) for kind in KINDS}
    figure.draw(
        {"demo": hooks, "minilm": hooks},
        [{**line, "hook_point": "y"} if line["source"] == "synthetic" else line for line in results],
        {("demo", "x")},
        tmp_path / "figure.png",
    )
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_order_of_jobs_is_seed_by_seed_and_names_are_checked(capsys):
    import run

    jobs = list(run.Bench(run.options_of(["--no-depth", "--sources", "demo", "--arms", "random,masked", "--seeds", "2"])).jobs())
    assert [(job.seed, job.expansion, job.arm) for job in jobs] == [
        (seed, width, arm) for seed in (0, 1) for width in (16, 64) for arm in ("random", "masked")
    ]
    assert jobs[0].is_in([{**dataclasses.asdict(jobs[0]), "dead": 0.1}])
    assert not jobs[0].is_in([dataclasses.asdict(jobs[1])])
    with pytest.raises(SystemExit):
        run.options_of(["--arms", "rnadom"])
    assert "unknown: rnadom" in capsys.readouterr().err


def test_documentation_is_split_without_overlap(monkeypatch):
    import sources

    monkeypatch.setattr(sources, "PACKAGES", ("safetensors", "huggingface_hub"))
    train, heldout = set(sources.documentation("train")), set(sources.documentation("heldout"))
    assert not train & heldout
    assert 10 < len(train) / len(heldout) < 30
    assert min(map(len, train | heldout)) >= 400
