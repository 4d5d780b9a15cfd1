"""The evaluator over small streams, and the PCA baseline as one of the things it evaluates."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lm_saes.config import EvalConfig, InitializerConfig, SAEConfig
from lm_saes.errors import ConfigError, DataError, NonFiniteError
from lm_saes.evaluation.evaluator import Evaluator
from lm_saes.evaluation.pca import PCABaseline
from lm_saes.models.initializer import Initializer
from tests.evaluation.toy import ToyDictionary, ToyModel


def stream_1d(n_batches: int = 4, n: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"a": torch.randn(n, 3, generator=generator), "tokens": torch.zeros(n, dtype=torch.long), "mask": torch.ones(n, dtype=torch.bool)}
        for _ in range(n_batches)
    ]


def evaluate(dictionary: Any, stream: Any, total: int = 10**6, **options: Any) -> dict[str, Any]:
    return Evaluator(EvalConfig(total_eval_tokens=total)).evaluate(dictionary, stream, **options)


def test_identity_on_a_1d_stream_and_valid_json() -> None:
    metrics = evaluate(ToyDictionary(lambda x: x, lambda x: x.relu()), stream_1d())
    assert metrics["metrics/explained_variance"] == 1
    assert metrics["metrics/normalized_mse"] == 0
    assert metrics["metrics/n_tokens"] == 64
    positive = torch.cat([batch["a"] for batch in stream_1d()]) > 0
    assert metrics["metrics/l0"] == pytest.approx(float(positive.sum(1).float().mean()))
    assert not any("downstream" in name for name in metrics)
    json.dumps(metrics, allow_nan=False)


def test_stops_at_the_asked_tokens_and_takes_no_batch_more() -> None:
    stream = iter(stream_1d())
    assert evaluate(ToyDictionary(lambda x: x), stream, total=17)["metrics/n_tokens"] == 32
    assert len(list(stream)) == 2


def test_runs_in_eval_mode_without_gradient_and_puts_the_mode_back() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    gradients: list[bool] = []

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        gradients.append((x * weight).requires_grad)
        if len(gradients) > 4:
            raise RuntimeError("interrupted")
        return x * weight

    dictionary = ToyDictionary(reconstruct)
    evaluate(dictionary, stream_1d())
    assert dictionary.modes == [False] * 4
    assert gradients == [False] * 4
    assert dictionary.training
    with pytest.raises(RuntimeError, match="interrupted"):
        evaluate(dictionary, stream_1d())
    assert dictionary.training
    evaluate(dictionary_in_eval := ToyDictionary(lambda x: x).train(False), stream_1d())
    assert not dictionary_in_eval.training


def test_masked_positions_count_for_nothing() -> None:
    batch = stream_1d(1)[0]
    batch["mask"][::2] = False
    clean = evaluate(ToyDictionary(lambda x: x / 2), [batch])
    batch["a"][::2] = 1e6
    assert evaluate(ToyDictionary(lambda x: x / 2), [batch]) == clean
    assert clean["metrics/n_tokens"] == 8


def test_2d_batches_with_a_model_are_spliced() -> None:
    model, ids = ToyModel(), torch.arange(12).view(2, 6) % 7
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    metrics = evaluate(ToyDictionary(lambda x: x), [model.batch(ids, mask)] * 2, model=model)
    assert metrics["metrics/n_tokens"] == 20
    assert metrics["metrics/delta_ce"] == 0
    assert metrics["metrics/kl_divergence"] == 0
    assert metrics["metrics/recovered_fraction"] in (1, None)
    assert "metrics/downstream_loss_original" not in evaluate(ToyDictionary(lambda x: x), [model.batch(ids, mask)])
    json.dumps(metrics, allow_nan=False)


def test_padding_is_never_written_to() -> None:
    model, ids = ToyModel(), torch.arange(12).view(2, 6) % 7
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[1, 3:] = False
    metrics = evaluate(ToyDictionary(lambda x: x), [model.batch(ids, attention, attention)], model=model)
    logits = model.logits(ids)
    expected = torch.cat([torch.nn.functional.cross_entropy(logits[r, : n - 1], ids[r, 1:n], reduction="none") for r, n in ((0, 6), (1, 3))])
    assert metrics["metrics/downstream_loss_original"] == pytest.approx(float(expected.mean()))


def test_wandb_gets_the_numbers() -> None:
    class Run:
        logged: dict[str, Any] = {}  # noqa: RUF012

        def log(self, data: dict[str, Any]) -> None:
            self.logged.update(data)

    run = Run()
    metrics = evaluate(ToyDictionary(lambda x: x), stream_1d(), wandb_logger=run)
    assert run.logged == {name: value for name, value in metrics.items() if isinstance(value, float)}


def test_errors_name_the_remedy() -> None:
    empty = stream_1d(1)
    empty[0]["mask"][:] = False
    for stream in ([], empty):
        with pytest.raises(DataError, match="kept no token"):
            evaluate(ToyDictionary(lambda x: x), stream)
    with pytest.raises(DataError, match="no activations of 'elsewhere'"):
        evaluate(ToyDictionary(lambda x: x, hook_in="elsewhere", hook_out="elsewhere"), stream_1d())
    broken = stream_1d(1)
    broken[0]["a"][3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="activations of a hold NaN or infinity on 1 of 16"):
        evaluate(ToyDictionary(lambda x: x), broken)
    with pytest.raises(NonFiniteError, match="reconstruction of a"):
        evaluate(ToyDictionary(lambda x: x / 0), stream_1d())


@pytest.mark.parametrize("norm_activation", ["dataset-wise", "batch-wise", "token-wise"])
@pytest.mark.parametrize("out", ["a", "b"])
def test_a_real_dictionary_is_measured_in_raw_space_and_spliced(norm_activation: Any, out: str) -> None:
    model, ids = ToyModel(), torch.arange(120).view(10, 12) % 7
    batches = [model.batch(rows) for rows in ids.split(5)]
    cfg = SAEConfig(
        hook_point_in="a", hook_point_out=out, d_model=4, expansion_factor=8, act_fn="batchtopk", top_k=3, norm_activation=norm_activation
    )
    sae = Initializer(InitializerConfig(bias_init_method="geometric_median")).initialize_sae_from_config(cfg, batches)
    metrics = evaluate(sae, batches, model=model)
    assert sae.training
    sae.eval()
    with torch.no_grad():
        raw = {hook: torch.cat([batch[hook] for batch in batches]).flatten(0, 1) for hook in ("a", "b")}
        reconstruction, codes = sae.reconstruct(raw).double(), sae.features(raw)
    x = raw[out].double()
    expected = 1 - (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    assert metrics["metrics/explained_variance"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["metrics/l0"] == pytest.approx(float((codes != 0).sum(1).float().mean()))
    after = reconstruction.float() @ (model.W_1 @ model.W_U if out == "a" else model.W_U)
    loss = torch.nn.functional.cross_entropy(after.view(10, 12, -1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert metrics["metrics/downstream_loss_reconstructed"] == pytest.approx(float(loss), rel=1e-4)


def test_pca_is_the_best_reconstruction_of_its_rank() -> None:
    stream = stream_1d()
    for batch in stream:
        batch["a"] = batch["a"] * torch.tensor([3.0, 2.0, 1.0]) + 50
    x = torch.cat([batch["a"] for batch in stream]).double()
    singular = torch.linalg.svdvals(x - x.mean(0)).square()
    for rank in (1, 2, 3):
        metrics = evaluate(PCABaseline(rank, "a").fit(stream), stream)
        assert metrics["metrics/explained_variance"] == pytest.approx(float(singular[:rank].sum() / singular.sum()), rel=1e-5)
        assert metrics["metrics/l0"] == rank
        assert metrics["metrics/dead_fraction"] == 0


def test_pca_reads_kept_positions_until_it_has_enough() -> None:
    model, ids = ToyModel(), torch.arange(12).view(2, 6) % 7
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 1:] = True
    batch = model.batch(ids, mask)
    batch["a"][~mask] = 1e6
    pca = PCABaseline(2, "a").fit([batch])
    torch.testing.assert_close(pca.mean, batch["a"][mask].mean(0))
    stream = iter(stream_1d())
    PCABaseline(1, "a").fit(stream, n_tokens=16)
    assert len(list(stream)) == 3
    metrics = evaluate(pca, [batch], model=model)
    assert metrics["metrics/kl_divergence"] > 0


def test_pca_errors() -> None:
    with pytest.raises(ConfigError, match="at most the width 3"):
        PCABaseline(4, "a").fit(stream_1d())
    with pytest.raises(ConfigError, match="at least 1"):
        PCABaseline(0, "a")
    with pytest.raises(DataError, match="kept none"):
        PCABaseline(1, "a").fit([])
