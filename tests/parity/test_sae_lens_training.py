"""Trained by both libraries on the same batches from the same start, the losses agree step by step (docs/correctness.md lists the settings).

The curves of sae-lens 6.54.12's own trainer are in tests/golden/sae_lens/training, made by scripts/make_sae_lens_golden.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes import losses, ops
from lm_saes.config import MatryoshkaConfig, SAEConfig, TrainerConfig
from lm_saes.losses import LossInputs, LossWeights
from lm_saes.models import SparseAutoEncoder
from lm_saes.models.activation_functions import THRESHOLD_RATE
from lm_saes.training.loggers import Logger
from lm_saes.training.trainer import Trainer
from tests.parity import recipes
from tests.parity.recipes import BANDWIDTH, BATCH, GOLDEN, L1, L1_WARM_UP, LR, LR_WARM_UP, PREFIXES, STEPS, TANH, TRAIN_D, TRAIN_F, TRAIN_K, D, F, K

HOOK = "a"
TOLERANCES = {"float64": 1e-7, "float32": 1e-3}
"""Largest relative difference of a loss term at any of the 300 steps. Measured: 8e-9 and 1.3e-4."""
OUR_NAMES = {"loss": "losses/overall_loss", "mse_loss": "losses/mse_loss", "l1_loss": "losses/sparsity_loss"}


class Recorder(Logger):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        self.metrics.append(metrics)


def dictionary(case: str, dtype: str) -> SparseAutoEncoder:
    options: dict[str, Any] = {"act_fn": "relu" if case == "relu_l1" else case}
    if case == "matryoshka":
        options = {"act_fn": "batchtopk", "matryoshka": MatryoshkaConfig(widths=PREFIXES)}
    shape: dict[str, Any] = {"d_model": TRAIN_D, "expansion_factor": TRAIN_F / TRAIN_D, "norm_activation": "inference", "dtype": dtype}
    cfg = SAEConfig(hook_point_in=HOOK, top_k=TRAIN_K, **shape, **options)
    sae = SparseAutoEncoder(cfg)
    with torch.no_grad():
        for parameter, name in ((sae.W_E, "W_enc"), (sae.b_E, "b_enc"), (sae.W_D, "W_dec"), (sae.b_D, "b_dec")):
            assert parameter is not None
            parameter.copy_(recipes.initial_weights()[name])
    return sae


def train(case: str, dtype: str, folder: str) -> tuple[SparseAutoEncoder, dict[str, torch.Tensor]]:
    sae, recorder = dictionary(case, dtype), Recorder()
    cfg = TrainerConfig(
        lr=LR, lr_warm_up_steps=LR_WARM_UP, lr_cool_down_steps=0, clip_grad_norm=1.0, total_training_tokens=STEPS * BATCH, log_frequency=1,
        n_checkpoints=0, eval_frequency=STEPS, exp_result_path=folder, amp_dtype=None, skip_metrics_calculation=True,
        **({"sparsity_loss_type": "power", "p": 1, "l1_coefficient": L1, "l1_coefficient_warmup_steps": L1_WARM_UP} if case == "relu_l1" else {}),
    )  # fmt: skip
    stream = ({HOOK: recipes.batch(step).to(sae.dtype)} for step in range(STEPS))
    Trainer(cfg, loggers=[recorder]).fit(sae, stream)
    curves = {
        name: torch.tensor([step[key] for step in recorder.metrics], dtype=torch.float64)
        for name, key in OUR_NAMES.items()
        if key in recorder.metrics[0]
    }
    return sae, curves


def golden(case: str, dtype: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / "training" / f"{case}.safetensors")
    return {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(dtype)}


QUICK = [("relu_l1", "float64"), ("batchtopk", "float64")]
ALL = [(case, dtype) for dtype in TOLERANCES for case in ("relu_l1", "topk", "batchtopk", "matryoshka")]


@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*run, marks=[] if run in QUICK else pytest.mark.slow) for run in ALL])
def test_losses_and_weights_agree(case, dtype, tmp_path):
    expected = golden(case, dtype)
    sae, curves = train(case, dtype, str(tmp_path / "run"))
    assert set(curves) == {"loss", "mse_loss"} | ({"l1_loss"} if case == "relu_l1" else set())
    for name, curve in curves.items():
        assert len(curve) == STEPS
        torch.testing.assert_close(curve, expected[name].double(), rtol=TOLERANCES[dtype], atol=1e-12)
    assert expected["mse_loss"][-20:].mean() < 0.3 * expected["mse_loss"][0], "the run learns something"
    assert max(expected.get("auxiliary_reconstruction_loss", torch.zeros(1))) == 0, "no latent is dead, so the auxiliary losses do not differ"
    if dtype == "float64":
        for name, ours in (("W_enc", sae.W_E), ("b_enc", sae.b_E), ("W_dec", sae.W_D), ("b_dec", sae.b_D)):
            torch.testing.assert_close(ours.detach().float(), expected[name], rtol=0, atol=1e-6)
    if "topk_threshold" in expected:
        check_threshold(sae, float(expected["topk_threshold"]), 1e-8 if dtype == "float64" else 1e-5)


def check_threshold(sae: SparseAutoEncoder, theirs: float, tolerance: float) -> None:
    """Both are moving averages of rate 0.01 of the smallest selected value; theirs starts at 0, ours at the first value v, which leaves
    0.99^t v after t steps. v is that of the first batch at the initial weights."""
    start = dictionary("batchtopk", str(sae.cfg.dtype).removeprefix("torch.")).train()
    with torch.no_grad():
        codes = start.run(recipes.batch(0).to(start.dtype)).codes
        values = ops.to_dense(codes) * start.decoder_norm()
    first = values[values > 0].min().item()
    ours = sae.activation_function.threshold
    assert isinstance(ours, torch.Tensor)
    assert ours.item() - theirs == pytest.approx((1 - THRESHOLD_RATE) ** STEPS * first, rel=tolerance * 1e3, abs=tolerance)


def test_straight_through_gradients_of_jumprelu_agree():
    """sae-lens learns theta itself and ours log theta, so that ours is theirs times theta. Where the window around theta reaches below zero,
    ours leaves out what lies there (h > 0 is part of the formula). All else is the same."""
    expected, theta = load_file(GOLDEN / "jumprelu.safetensors"), recipes.positive_thresholds()
    sae = small("jumprelu", jumprelu_threshold_window=BANDWIDTH)
    with torch.no_grad():
        sae.activation_function.log_jumprelu_threshold.copy_(theta.double().log())
    x = recipes.inputs().double()
    inputs = LossInputs(x, x, sae.run(x))
    loss, terms = losses.total_loss(sae, inputs, LossWeights(sparsity_loss_type="tanh", sparsity=TANH, tanh_stretch_coefficient=4.0))
    loss.backward()
    assert terms["mse_loss"].item() == pytest.approx(expected["mse_loss"].item(), rel=1e-9)
    assert terms["sparsity_loss"].item() == pytest.approx(expected["l0_loss"].item(), rel=1e-9)
    for name, parameter in (("W_enc", sae.W_E), ("b_enc", sae.b_E), ("W_dec", sae.W_D), ("b_dec", sae.b_D)):
        assert parameter is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-9)
    gradient, positive = sae.activation_function.log_jumprelu_threshold.grad, theta > BANDWIDTH / 2
    assert ((expected["threshold"] != 0) & positive).sum() > F / 4
    torch.testing.assert_close(gradient[positive].float(), (expected["threshold"] * theta)[positive], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(gradient[~positive].float(), (expected["threshold"] * theta)[~positive]), "the documented difference is seen"


def test_auxk_differs_by_its_documented_factor():
    """Theirs is min(dead / k_aux, 1) * mean ||e - e^||^2 with k_aux = D / 2, ours V mean ||e - e^||^2 / mean ||e||^2, where all pre-activations
    are positive (theirs does not rectify)."""
    expected = load_file(GOLDEN / "auxk.safetensors")
    sae = small("topk", sparsity_include_decoder_norm=False)
    with torch.no_grad():
        sae.b_E += 10
    x, dead = recipes.inputs().double(), expected["dead"]
    inputs = LossInputs(x, x, sae.run(x), dead=dead)
    mse = losses.reconstruction_loss(sae, inputs).item()
    assert mse == pytest.approx(expected["mse"].item(), rel=1e-9)
    factor = losses.label_variance(x).item() / mse
    assert int(dead.sum()) >= D // 2
    assert losses.auxk_loss(sae, inputs, k_aux=D // 2).item() == pytest.approx(factor * expected["auxiliary_loss"].item(), rel=1e-9)
    assert factor < 0.5 or factor > 2, "the factor is seen"


def small(act_fn: Any, **options: Any) -> SparseAutoEncoder:
    """The dictionary of the given weights in float64, in training mode."""
    shape: dict[str, Any] = {"d_model": D, "expansion_factor": F / D, "top_k": K, "norm_activation": "inference", "dtype": "float64"}
    sae = SparseAutoEncoder(SAEConfig(hook_point_in=HOOK, act_fn=act_fn, **{"sparsity_include_decoder_norm": False, **shape, **options}))
    given = recipes.weights()
    with torch.no_grad():
        for parameter, name in ((sae.W_E, "W_enc"), (sae.b_E, "b_enc"), (sae.W_D, "W_dec"), (sae.b_D, "b_dec")):
            assert parameter is not None
            parameter.copy_(given[name])
    return sae.train()
