"""Initialisation against NumPy, brute force over the norm, and the properties that define each option."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_saes.config import InitializerConfig, SAEConfig
from lm_saes.errors import ConfigError, DataError, NonFiniteError
from lm_saes.models.initializer import Initializer
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.models.statistics import effective_rank, geometric_median

D = 12


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def config(**fields: Any) -> SAEConfig:
    return SAEConfig(**{"hook_point_in": "a", "d_model": D, "expansion_factor": 4, "act_fn": "topk", "top_k": 6, **fields})


def stream(n_batches: int = 3, n: int = 64, rank: int = D, offset: float = 3.0, seed: int = 7) -> list[dict[str, Any]]:
    """Batches with anisotropic activations "a" of that rank around a mean, and "b", a linear image of them plus noise."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator))[0][:, :rank] * torch.linspace(2, 0.5, rank)
    image = torch.randn(D, D, generator=generator)
    batches = []
    for _ in range(n_batches):
        a = torch.randn(n, rank, generator=generator) @ basis.T + offset
        b = a @ image + 0.1 * torch.randn(n, D, generator=generator)
        batches.append({"a": a, "b": b, "tokens": torch.zeros(n, dtype=torch.long), "mask": torch.ones(n, dtype=torch.bool)})
    return batches


def initialize(cfg: SAEConfig, batches: Any = None, seed: int = 0, **options: Any) -> tuple[SparseAutoEncoder, Initializer]:
    initializer = Initializer(InitializerConfig(**options))
    with torch.enable_grad():  # as a user would call it
        sae = initializer.initialize_sae_from_config(cfg, stream() if batches is None else batches, seed=seed)
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in sae.parameters())
    return sae, initializer


def normalized(sae: SparseAutoEncoder, batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    scaled = [sae.normalize_activations(batch) for batch in batches]
    return torch.cat([sae.prepare_input(batch) for batch in scaled]), torch.cat([sae.prepare_label(batch) for batch in scaled])


def same_weights(one: SparseAutoEncoder, other: SparseAutoEncoder) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# ---------------------------------------------------------------------------------------------- weights as drawn


def test_a_seed_decides_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    first, _ = initialize(config(), seed=5)
    torch.manual_seed(2)
    assert same_weights(first, initialize(config(), seed=5)[0])
    assert not torch.equal(first.W_D, initialize(config(), seed=6)[0].W_D)


@pytest.mark.parametrize("glu", [False, True])
def test_uniform_bounds_and_zero_biases(glu: bool) -> None:
    sae, _ = initialize(config(hook_point_out="b", expansion_factor=40, use_glu_encoder=glu), decoder_uniform_bound=0.5, encoder_uniform_bound=2.0)
    for weight, bound in ((sae.W_D, 0.5), (sae.W_E, 2.0), *([(sae.W_E_glu, 2.0)] if glu else [])):
        assert weight is not None
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.98 * bound
        # variance of U(-b, b), 5760 draws: its standard error is 1.2 %
        assert float(weight.detach().var()) == pytest.approx(bound**2 / 3, rel=0.05)
    for bias in (sae.b_E, sae.b_D, sae.b_E_glu):
        assert bias is None or not bias.any()
    if sae.W_E_glu is not None:
        assert abs(float(torch.corrcoef(torch.stack([sae.W_E.detach().flatten(), sae.W_E_glu.detach().flatten()]))[0, 1])) < 0.05


@pytest.mark.parametrize(("out", "tie", "tied"), [("a", None, True), ("b", None, False), ("a", False, False), ("b", True, True)])
@pytest.mark.parametrize("search", [False, True])
def test_the_encoder_is_tied_for_saes_unless_told_otherwise(out: str, tie: bool | None, tied: bool, search: bool) -> None:
    options = {"init_encoder_with_decoder_transpose": tie, "init_encoder_with_decoder_transpose_factor": 0.7, "grid_search_init_norm": search}
    sae, _ = initialize(config(hook_point_out=out), **options)
    assert torch.equal(sae.W_E, 0.7 * sae.W_D.T) == tied
    if not tied:
        assert sae.W_E.abs().max() <= 1, "an untied encoder keeps its bounds"


def test_jumprelu_threshold() -> None:
    cfg = config(act_fn="jumprelu")
    threshold = initialize(cfg)[0].activation_function.learned_threshold()
    torch.testing.assert_close(threshold, torch.full((4 * D,), 0.1))
    sae, _ = initialize(cfg, init_log_jumprelu_threshold_value=-1.5)
    torch.testing.assert_close(sae.activation_function.learned_threshold(), torch.full((4 * D,), math.exp(-1.5)))
    Initializer(InitializerConfig()).initialize_parameters(sae)
    torch.testing.assert_close(sae.activation_function.learned_threshold(), torch.full((4 * D,), 0.1), msg="what it was is forgotten")


# ---------------------------------------------------------------------------------------------- norms and masks


def test_norms_are_means_over_tokens_not_over_batches() -> None:
    batches = stream(2)
    batches.append({**{hook: 5 * batches[0][hook][:10] for hook in ("a", "b")}, "mask": torch.ones(10, dtype=torch.bool)})
    sae, initializer = initialize(config(hook_point_out="b"), batches)
    for hook in ("a", "b"):
        x = np.concatenate([batch[hook].double().numpy() for batch in batches])
        expected = np.linalg.norm(x, axis=1).mean()
        assert sae.cfg.dataset_average_activation_norm is not None
        assert sae.cfg.dataset_average_activation_norm[hook] == pytest.approx(expected, rel=1e-12)
        assert initializer.report.activation_norms is not None
        assert initializer.report.activation_norms[hook] == pytest.approx(expected, rel=1e-12)


RECOMMENDED = {"bias_init_method": "geometric_median", "grid_search_init_norm": True, "init_encoder_bias_with_mean_hidden_pre": True}
EVERYTHING = {**RECOMMENDED, "initialize_W_D_with_active_subspace": True, "d_active_subspace": "auto"}


def in_context(batch: dict[str, Any], poison: float) -> dict[str, Any]:
    """The same tokens as 16 rows of 8 positions, of which every other is masked and holds rubbish."""
    mask = torch.zeros(16, 8, dtype=torch.bool)
    mask[:, ::2] = True
    result: dict[str, Any] = {"mask": mask, "attention_mask": torch.ones_like(mask), "tokens": torch.zeros(16, 8), "meta": [{}] * 16}
    for hook in ("a", "b"):
        result[hook] = torch.full((16, 8, D), poison)
        result[hook][mask] = batch[hook]
    return result


@pytest.mark.parametrize("act_fn", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("out", ["a", "b"])
def test_masked_positions_do_not_exist_whatever_the_layout(act_fn: str, out: str) -> None:
    cfg = config(act_fn=act_fn, hook_point_out=out)
    flat, plain = initialize(cfg, **EVERYTHING)
    deep, masked = initialize(cfg, [in_context(batch, poison) for batch, poison in zip(stream(), (1e6, -4.0, math.nan), strict=True)], **EVERYTHING)
    assert same_weights(flat, deep)
    assert {**plain.report.as_dict(), "seconds": 0} == {**masked.report.as_dict(), "seconds": 0}


def test_given_norms_are_taken() -> None:
    initializer = Initializer(InitializerConfig())
    given = initializer.initialize_sae_from_config(config(), stream(), activation_norm={"a": 2.5})
    assert given.cfg.dataset_average_activation_norm == {"a": 2.5}
    configured = initializer.initialize_sae_from_config(config(dataset_average_activation_norm={"a": 3.5}), stream())
    assert configured.cfg.dataset_average_activation_norm == {"a": 3.5}
    with pytest.raises(ConfigError, match=r"missing for \['b'\]"):
        initializer.initialize_sae_from_config(config(hook_point_out="b", norm_activation="batch-wise"), stream(), activation_norm={"a": 2.5})


def test_running_norms_of_batch_wise_start_at_the_measured_ones() -> None:
    sae, initializer = initialize(config(norm_activation="batch-wise"))
    assert sae.running_activation_norms is not None
    assert initializer.report.activation_norms is not None
    assert sae.running_activation_norms.tolist() == [initializer.report.activation_norms["a"]]


# ---------------------------------------------------------------------------------------------- bias and centring


def test_decoder_bias_is_the_median_of_all_batches_and_outliers_do_not_move_it() -> None:
    batches = stream()
    sae, _ = initialize(config(norm_activation="inference"), batches, bias_init_method="geometric_median")
    x = torch.cat([batch["a"] for batch in batches])
    assert sae.b_D is not None
    torch.testing.assert_close(sae.b_D.detach(), geometric_median(x).point.float(), rtol=0, atol=1e-5)
    batches[1]["a"][:6] += 1e4
    spoiled, initializer = initialize(config(norm_activation="inference"), batches, bias_init_method="geometric_median")
    assert spoiled.b_D is not None
    assert float((spoiled.b_D - sae.b_D).norm()) < 0.5
    assert float((torch.cat([batch["a"] for batch in batches]).mean(0) - sae.b_D).norm()) > 500
    assert initializer.report.bias_distance_from_mean is not None
    assert initializer.report.bias_distance_from_mean > 0.1


def test_no_decoder_bias_is_said() -> None:
    _, initializer = initialize(config(use_decoder_bias=False), bias_init_method="geometric_median")
    assert initializer.report.bias_method == "none"
    assert any("use_decoder_bias is off" in note for note in initializer.report.notes)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("out", ["a", "b"])
def test_centred_pre_activations_have_mean_zero_over_all_batches(glu: bool, search: bool, out: str) -> None:
    batches = stream()
    sae, _ = initialize(
        config(use_glu_encoder=glu, hook_point_out=out), batches, init_encoder_bias_with_mean_hidden_pre=True, grid_search_init_norm=search
    )
    x, _ = normalized(sae, batches)
    _, h = sae.encode(x, return_hidden_pre=True)
    assert float(h.mean(0).abs().max()) <= 1e-5 * float(h.abs().max())
    if glu:
        assert sae.W_E_glu is not None
        gate = (x @ sae.W_E_glu).sigmoid()
        torch.testing.assert_close(sae.b_E, -((x @ sae.W_E) * gate).mean(0) / gate.mean(0), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------- active subspace


def leading_subspace(x: Tensor, d: int) -> Tensor:
    """Projector onto the leading principal directions, by the SVD of NumPy."""
    x = x.detach().double()
    right = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)[2][:d]
    return torch.from_numpy(right.T @ right)


@pytest.mark.parametrize(("out", "tie"), [("a", None), ("a", False), ("b", None)])
def test_rows_lie_in_the_label_subspace_and_encoder_columns_in_the_input_subspace(out: str, tie: bool | None) -> None:
    batches = stream()
    sae, initializer = initialize(
        config(hook_point_out=out), batches, initialize_W_D_with_active_subspace=True, d_active_subspace=5, init_encoder_with_decoder_transpose=tie
    )
    x, y = normalized(sae, batches)
    W_D, W_E = sae.W_D.detach().double(), sae.W_E.detach().double()
    torch.testing.assert_close(W_D @ leading_subspace(y, 5), W_D, rtol=0, atol=1e-5)
    torch.testing.assert_close(leading_subspace(x, 5) @ W_E, W_E, rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(sae.W_D.detach(), rtol=1e-4) == torch.linalg.matrix_rank(sae.W_E.detach(), rtol=1e-4) == 5
    assert torch.equal(sae.W_E, sae.W_D.T) == (out == "a" and tie is None)
    assert initializer.report.d_active == 5


def test_rows_are_isotropic_inside_the_subspace_with_the_moment_of_the_bound() -> None:
    sae, _ = initialize(config(expansion_factor=500), initialize_W_D_with_active_subspace=True, d_active_subspace=4, decoder_uniform_bound=0.6)
    W_D = sae.W_D.detach().double()
    spectrum = torch.linalg.eigvalsh(W_D.T @ W_D / len(W_D)).flip(0)
    # 6000 rows: the spread of a sample covariance's eigenvalues is about 2 sqrt(4 / 6000) = 5 %
    assert spectrum[:4].tolist() == pytest.approx([0.6**2 / 3] * 4, rel=0.08)
    fourth = (W_D / W_D.norm(dim=1, keepdim=True)) @ torch.linalg.eigh(W_D.T @ W_D)[1][:, -4:]
    # E u^4 of a uniform direction in 4 dimensions is 3 / (4 * 6); of the directions of a box it is less
    assert float(fourth.pow(4).mean()) == pytest.approx(3 / 24, rel=0.03)


def test_auto_is_the_effective_rank_rounded_up() -> None:
    batches = stream(rank=7, offset=0.0)
    sae, initializer = initialize(config(), batches, initialize_W_D_with_active_subspace=True, d_active_subspace="auto")
    x, _ = normalized(sae, batches)
    x = x.detach().double()
    expected = effective_rank(torch.from_numpy(np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)))
    assert initializer.report.effective_rank == pytest.approx(expected, rel=1e-3)
    assert initializer.report.d_active == math.ceil(expected)
    assert torch.linalg.matrix_rank(sae.W_D.detach(), rtol=1e-4) == math.ceil(expected)
    assert initializer.report.rank_99 is not None
    assert initializer.report.rank_99 <= 7


def test_subspaces_that_cannot_be_are_refused() -> None:
    wanted = {"initialize_W_D_with_active_subspace": True}
    with pytest.raises(ConfigError, match="at most d_model = 12, got 13"):
        initialize(config(), **wanted, d_active_subspace=13)
    few = stream(1, n=5)
    with pytest.raises(ConfigError, match="needs more than 5 tokens"):
        initialize(config(), few, **wanted, d_active_subspace=5)
    initialize(config(), few, **wanted, d_active_subspace=4)


# ---------------------------------------------------------------------------------------------- norm


def error_at(sae: SparseAutoEncoder, x: Tensor, y: Tensor, norm: float, tied: bool, b_E: Tensor) -> float:
    """Squared error with decoder rows of that norm, by setting the parameters to it; `b_E` is the bias at norm 1."""
    sae.set_decoder_to_fixed_norm(norm)
    if tied:
        sae.W_E.copy_(sae.W_D.T)
        sae.b_E.copy_(b_E * norm)
    return float((sae.run(x).reconstruction.double() - y.double()).square().sum())


GRID = np.geomspace(0.02, 20, 241).tolist()


@pytest.mark.parametrize(
    ("act_fn", "include_norm", "glu", "centred", "out"),
    [
        *itertools.product(["relu", "topk", "batchtopk"], [True, False], [False], [True, False], ["a"]),
        ("topk", True, True, True, "a"),
        ("relu", True, True, False, "a"),
        ("jumprelu", False, False, True, "untied"),
    ],
)
def test_closed_form_norm_is_no_worse_than_any_on_a_grid(act_fn: str, include_norm: bool, glu: bool, centred: bool, out: str) -> None:
    batches, tied = stream(), out == "a"
    options = {"init_encoder_with_decoder_transpose": tied, "encoder_uniform_bound": 0.3}
    cfg = config(act_fn=act_fn, sparsity_include_decoder_norm=include_norm, use_glu_encoder=glu, expansion_factor=6)
    sae, initializer = initialize(
        cfg, batches, bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=centred, **options
    )
    x, y = normalized(sae, batches)
    norm = initializer.report.decoder_norm
    torch.testing.assert_close(sae.decoder_norm(), torch.full_like(sae.decoder_norm(), norm))
    with torch.no_grad():
        b_E = sae.b_E / norm if tied else sae.b_E.clone()
        if initializer.report.norm_choice == "norm matching":
            assert not tied
            return
        assert initializer.report.norm_choice == "closed form"
        chosen = error_at(sae, x, y, norm, tied, b_E)
        assert chosen <= min(error_at(sae, x, y, other, tied, b_E) for other in GRID) * (1 + 1e-6)


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("include_norm", [True, False])
def test_searched_norm_is_as_good_as_a_fine_grid(threshold: float, include_norm: bool) -> None:
    batches = stream()
    cfg = config(act_fn="jumprelu", sparsity_include_decoder_norm=include_norm, expansion_factor=6)
    sae, initializer = initialize(cfg, batches, **RECOMMENDED, init_log_jumprelu_threshold_value=math.log(threshold))
    assert initializer.report.norm_choice == "search"
    torch.testing.assert_close(
        sae.activation_function.learned_threshold(), torch.full((6 * D,), threshold), msg="the search left the threshold moved"
    )
    x, y = normalized(sae, batches)
    norm = initializer.report.decoder_norm
    with torch.no_grad():
        b_E = sae.b_E / norm
        chosen = error_at(sae, x, y, norm, True, b_E)
        best = min(error_at(sae, x, y, other, True, b_E) for other in GRID)
    # Latents that begin to fire make steps in the error, among which a search of some fifty points cannot find the very lowest; with 192 tokens
    # one step is up to 1 / 192 of the error, so 1 % is two of them.
    assert chosen <= best * 1.01


def test_a_threshold_above_all_sense_does_not_end_in_a_dictionary_that_never_fires() -> None:
    _, initializer = initialize(config(act_fn="jumprelu"), **RECOMMENDED, init_log_jumprelu_threshold_value=math.log(30))
    assert initializer.report.norm_choice == "norm matching"
    assert initializer.report.l0 is not None
    assert initializer.report.l0 > 0


@pytest.mark.parametrize("act_fn", ["topk", "relu", "jumprelu"])
def test_a_transcoder_that_knows_nothing_gets_the_size_of_its_label(act_fn: str) -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [{**batch, "b": torch.randn(64, D, generator=generator)} for batch in stream()]
    sae, initializer = initialize(config(hook_point_out="b", act_fn=act_fn), batches, **RECOMMENDED)
    assert initializer.report.norm_choice == "norm matching"
    assert any("matches the label in size" in note for note in initializer.report.notes)
    x, y = normalized(sae, batches)
    assert sae.b_D is not None
    with torch.no_grad():
        ratio = float((sae.run(x).reconstruction - sae.b_D).square().sum() / (y - sae.b_D).square().sum())
    # exact in the closed form; the search brackets it to the steps at which latents begin to fire
    assert ratio == pytest.approx(1, rel=0.05 if act_fn == "jumprelu" else 1e-4)


def test_an_untied_encoder_that_is_right_gets_the_least_squares_scale() -> None:
    sae = SparseAutoEncoder.from_config(config(act_fn="relu", norm_activation="inference", use_decoder_bias=False))
    initializer = Initializer(InitializerConfig(init_encoder_with_decoder_transpose=False, grid_search_init_norm=True))
    initializer.initialize_parameters(sae)
    sae.W_E.data.copy_(3 * sae.W_D.T)
    x = torch.randn(200, D)
    choice = initializer.initialization_search(sae, {"a": x})
    assert choice.how == "closed form"
    g = sae.run(x).reconstruction.detach() / choice.norm
    assert choice.norm == pytest.approx(float((x * g).sum() / g.square().sum()), rel=1e-4)


@pytest.mark.parametrize("act_fn", ["topk", "jumprelu"])
def test_nothing_to_fit(act_fn: str) -> None:
    """Inputs without length, or thresholds out of reach: nothing fires at any norm."""
    cfg = config(
        act_fn=act_fn, hook_point_out="b", sparsity_include_decoder_norm=False, norm_activation="inference" if act_fn == "topk" else "dataset-wise"
    )
    batches = [{**batch, "a": torch.zeros_like(batch["a"])} for batch in stream()] if act_fn == "topk" else stream()
    sae, initializer = initialize(cfg, batches, **RECOMMENDED, init_log_jumprelu_threshold_value=80.0)
    assert (initializer.report.norm_choice, initializer.report.decoder_norm) == ("nothing to fit", pytest.approx(1))
    assert initializer.report.l0 == 0
    assert initializer.report.dead_fraction == 1
    assert torch.isfinite(sae.W_D).all()


def test_without_the_search_the_bounds_stay_and_the_report_warns() -> None:
    _, initializer = initialize(config())
    report = initializer.report
    assert report.norm_choice == "as drawn"
    assert report.decoder_norm == pytest.approx(math.sqrt(D / 3), rel=0.1)
    assert report.explained_variance is not None
    assert report.explained_variance < 0
    assert any("grid_search_init_norm" in note for note in report.notes)


# ---------------------------------------------------------------------------------------------- threshold and report


def test_batchtopk_is_calibrated_in_eval_mode() -> None:
    batches = stream(8)
    sae, initializer = initialize(config(act_fn="batchtopk"), batches, **RECOMMENDED)
    assert sae.training
    x, _ = normalized(sae, batches)
    sae.eval()
    with torch.no_grad():
        l0 = float((sae.encode(x) != 0).sum(1).float().mean())
    assert initializer.report.l0 == pytest.approx(l0)
    # the threshold is the mean of the batches' smallest selected values, so L0 is k up to their spread
    assert l0 == pytest.approx(6, rel=0.1)


@pytest.mark.parametrize("act_fn", ["relu", "topk"])
def test_the_report_tells_the_truth(act_fn: str) -> None:
    batches = stream()
    sae, initializer = initialize(config(act_fn=act_fn, hook_point_out="b"), batches, **EVERYTHING)
    report = initializer.report
    x, y = normalized(sae, batches)
    with torch.no_grad():
        codes, reconstruction = sae.encode(x), sae.forward(x)
    x64, y64 = x.double().numpy(), y.double().numpy()
    assert report.tokens == report.sample_tokens == 192
    assert report.gamma == pytest.approx(np.linalg.norm(x64.mean(0)) / np.sqrt(x64.var(0).sum()), rel=1e-6)
    assert report.explained_variance == pytest.approx(
        1 - ((reconstruction.double().numpy() - y64) ** 2).sum() / ((y64 - y64.mean(0)) ** 2).sum(), rel=1e-5
    )
    assert report.l0 == pytest.approx(float((codes != 0).sum(1).float().mean()))
    assert report.dead_fraction == pytest.approx(float((codes == 0).all(0).float().mean()))
    assert sae.b_D is not None
    distance = np.linalg.norm(sae.b_D.detach().double().numpy() - y64.mean(0)) / np.sqrt(y64.var(0).sum())
    assert report.bias_distance_from_mean == pytest.approx(distance, rel=1e-4)
    spectrum = np.linalg.eigvalsh(np.cov(y64.T, bias=True))[::-1].cumsum()
    assert report.rank_99 == int((spectrum < 0.99 * spectrum[-1]).sum()) + 1
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["rank_99"] == report.rank_99
    assert all(isinstance(label, str) and isinstance(text, str) for label, text in report.rows())
    assert dict(report.rows())["active subspace"] == f"{report.d_active} of 12 dimensions"


def test_a_dominant_mean_is_advised_upon() -> None:
    _, initializer = initialize(config(), stream(offset=100.0))
    assert any("init_encoder_bias_with_mean_hidden_pre" in note for note in initializer.report.notes)
    _, centred = initialize(config(), stream(offset=100.0), **RECOMMENDED)
    assert not any("init_encoder_bias_with_mean_hidden_pre" in note for note in centred.report.notes)
    assert centred.report.dead_fraction is not None
    assert initializer.report.dead_fraction is not None
    assert centred.report.dead_fraction < initializer.report.dead_fraction


def test_logged_numbers_are_those_of_the_report() -> None:
    class Run:
        logged: dict[str, Any] = {}  # noqa: RUF012

        def log(self, data: dict[str, Any]) -> None:
            self.logged.update(data)

    run, initializer = Run(), Initializer(InitializerConfig(**RECOMMENDED))
    initializer.initialize_sae_from_config(config(), stream(), wandb_logger=run)
    assert run.logged["initialization/decoder_norm"] == initializer.report.decoder_norm
    assert run.logged["initialization/tokens"] == 192
    assert all(isinstance(value, int | float) for value in run.logged.values())


# ---------------------------------------------------------------------------------------------- the stream


def test_takes_its_batches_from_the_start_and_no_more() -> None:
    batches = iter(stream(6))
    _, initializer = initialize(config(), batches, n_batches=4)
    assert initializer.report.tokens == 4 * 64
    assert len(list(batches)) == 2
    _, short = initialize(config(), stream(2), n_batches=4)
    assert short.report.tokens == 2 * 64


def test_sample_is_bounded_and_moments_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_saes.models.initialization_report.MEDIAN_MAX_TOKENS", 50)
    batches = stream()
    _, initializer = initialize(config(), batches, **RECOMMENDED)
    assert initializer.report.tokens == 192
    assert 25 <= initializer.report.sample_tokens <= 50


@pytest.mark.parametrize(
    ("fields", "options", "named"),
    [
        ({}, {}, "dataset-wise"),
        ({"norm_activation": "inference"}, {"bias_init_method": "geometric_median"}, "geometric_median"),
        ({"norm_activation": "inference"}, {"grid_search_init_norm": True}, "grid_search_init_norm"),
        ({"norm_activation": "token-wise"}, {"init_encoder_bias_with_mean_hidden_pre": True}, "init_encoder_bias_with_mean_hidden_pre"),
        ({"norm_activation": "token-wise"}, {"initialize_W_D_with_active_subspace": True, "d_active_subspace": 3}, "initialize_W_D"),
    ],
)
def test_no_stream_where_one_is_needed(fields: dict[str, Any], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Initializer(InitializerConfig(**options)).initialize_sae_from_config(config(**fields))


@pytest.mark.parametrize("act_fn", ["relu", "batchtopk", "jumprelu"])
def test_no_stream_where_none_is_needed(act_fn: str) -> None:
    initializer = Initializer(InitializerConfig())
    for cfg, norm in ((config(norm_activation="token-wise", act_fn=act_fn), None), (config(act_fn=act_fn), {"a": 2.0})):
        sae = initializer.initialize_sae_from_config(cfg, activation_norm=norm)
        assert torch.equal(sae.W_E, sae.W_D.T)
        assert initializer.report.explained_variance is None
        assert any("not calibrated" in note for note in initializer.report.notes) == (act_fn == "batchtopk")
        json.dumps(initializer.report.as_dict(), allow_nan=False)
        assert initializer.report.rows()


def test_bad_streams_and_arguments() -> None:
    initializer = Initializer(InitializerConfig())
    with pytest.raises(AttributeError, match="no report before"):
        _ = initializer.report
    with pytest.raises(ConfigError, match="device_mesh must be None"):
        initializer.initialize_sae_from_config(config(), stream(), device_mesh=object())
    for infinite in (math.inf, math.nan):
        broken = stream()
        broken[1]["a"][5, 2] = infinite
        with pytest.raises(NonFiniteError, match="activations of a"):
            initializer.initialize_sae_from_config(config(), broken)
    masked = stream()
    for batch in masked:
        batch["mask"][:] = False
    for empty in ([], masked):
        with pytest.raises(DataError, match="nothing to initialise from"):
            initializer.initialize_sae_from_config(config(), empty)
    with pytest.raises(DataError, match="no activations of 'c'"):
        initializer.initialize_sae_from_config(config(hook_point_out="c"), stream())
    with pytest.raises(DataError, match="all zero"):
        initializer.initialize_sae_from_config(config(), [{"a": torch.zeros(4, D)}])
    with pytest.raises(ConfigError, match="d_model"):
        initializer.initialize_sae_from_config(config(), [{"a": torch.ones(4, D + 1)}])


# ------------------------------------------------------------------------------------------- transcoders from the MLP

LN, OUT = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"


class GatedMLP:
    """relu(x G) * (x U) @ O as a language model's MLP of layer 3."""

    def __init__(self, n_neurons: int = 20) -> None:
        generator = torch.Generator().manual_seed(3)
        self.gate, self.up = torch.randn(D, n_neurons, generator=generator), torch.randn(D, n_neurons, generator=generator)
        self.down = torch.randn(n_neurons, D, generator=generator)
        self.hook_in, self.hook_out, self.neurons = LN, OUT, self.gate.T

    def respond(self, x: Tensor) -> Tensor:
        return ((x @ self.gate).relu() * (x @ self.up)) @ self.down

    def mlp(self, layer: int) -> GatedMLP:
        assert layer == 3
        return self


def mlp_stream(mlp: GatedMLP) -> list[dict[str, Any]]:
    return [{LN: batch["a"], OUT: mlp.respond(batch["a"]), "mask": batch["mask"]} for batch in stream()]


def transcoder(mlp: Any, fields: dict[str, Any] | None = None, **options: Any) -> SparseAutoEncoder:
    cfg = config(hook_point_in=LN, hook_point_out=OUT, **(fields or {}))
    initializer = Initializer(InitializerConfig(initialize_tc_with_mlp=True, **options))
    return initializer.initialize_sae_from_config(cfg, mlp_stream(mlp), model=mlp)


@pytest.mark.parametrize("norm_activation", ["dataset-wise", "token-wise", "inference"])
def test_a_transcoder_starts_from_its_mlp(norm_activation: str) -> None:
    mlp = GatedMLP()
    sae = transcoder(mlp, {"norm_activation": norm_activation})
    drawn, _ = initialize(config(hook_point_in=LN, hook_point_out=OUT), mlp_stream(mlp))
    cosine = torch.nn.functional.cosine_similarity(sae.W_E.T[:20], mlp.neurons, dim=1)
    torch.testing.assert_close(cosine, torch.ones(20))
    torch.testing.assert_close(sae.W_E[:, 20:], drawn.W_E[:, 20:])  # more latents than neurons: those stay as drawn
    # Decoder rows, from raw activations and from the definition.
    x = torch.cat([batch[LN] for batch in mlp_stream(mlp)])
    scaled = x * (math.sqrt(D) / x.norm(dim=1, keepdim=True)) if norm_activation == "token-wise" else x
    size = math.sqrt(D) / x.norm(dim=1).mean() if norm_activation == "token-wise" else 1.0
    mean = scaled.mean(0) / size
    step = (scaled - scaled.mean(0)).norm(dim=1).mean() / size
    answers = mlp.respond(mean + step * sae.W_E.T / sae.W_E.T.norm(dim=1, keepdim=True)) - mlp.respond(mean[None])
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(sae.W_D, answers, dim=1), torch.ones(sae.cfg.d_sae), rtol=1e-4, atol=1e-4)


def test_a_transcoder_from_its_mlp_explains_more_than_a_drawn_one() -> None:
    mlp = GatedMLP()
    x, y = (torch.cat([batch[hook] for batch in mlp_stream(mlp)]) for hook in (LN, OUT))

    def error(sae: SparseAutoEncoder) -> float:
        return float((sae.eval().reconstruct({LN: x, OUT: y}) - y).square().sum() / (y - y.mean(0)).square().sum())

    options = {"grid_search_init_norm": True, "bias_init_method": "geometric_median", "init_encoder_bias_with_mean_hidden_pre": True}
    drawn, _ = initialize(config(hook_point_in=LN, hook_point_out=OUT), mlp_stream(mlp), **options)
    assert error(transcoder(mlp, **options)) < 0.9 * error(drawn)


def test_more_neurons_than_latents() -> None:
    sae = transcoder(GatedMLP(n_neurons=200))
    assert sae.W_E.isfinite().all()
    assert sae.W_D.isfinite().all()


def test_what_a_start_from_the_mlp_needs() -> None:
    mlp = GatedMLP()
    with pytest.raises(ConfigError, match="needs the language model"):
        initialize(config(hook_point_in=LN, hook_point_out=OUT), mlp_stream(mlp), initialize_tc_with_mlp=True)
    with pytest.raises(ConfigError, match="which the MLP of layer 3 reads and gives; got 'a' and 'b'"):
        Initializer(InitializerConfig(initialize_tc_with_mlp=True, model_layer=3)).initialize_sae_from_config(
            config(hook_point_out="b"), stream(), model=mlp
        )
    with pytest.raises(ConfigError, match="set model_layer"):
        Initializer(InitializerConfig(initialize_tc_with_mlp=True)).initialize_sae_from_config(config(hook_point_out="b"), stream(), model=mlp)
