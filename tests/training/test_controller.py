"""Control of L0: on a simulated dictionary whose L0 follows the coefficient late, and on real ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lm_saes.config import TrainerConfig
from lm_saes.training.controller import TargetL0
from lm_saes.training.trainer import Trainer
from tests.training.synthetic import HOOK, SyntheticStream, make_dictionary


def simulated(controller: TargetL0, steps: int, elasticity: float, lag: float, noise: float = 0.02) -> list[float]:
    """L0 follows 200 * c ** -elasticity with a lag of `lag` steps; the learning rate decays over the last fifth."""
    generator, log_l0, seen = torch.Generator().manual_seed(0), math.log(200.0), []
    for step in range(steps):
        log_l0 += (math.log(200.0) - elasticity * controller.log_gain.item() - log_l0) / lag
        seen.append(math.exp(log_l0))
        controller.observe(torch.tensor(math.exp(log_l0 + noise * torch.randn((), generator=generator).item())))
        if step == 0:
            controller.start(torch.tensor(1.0), torch.tensor(1.0))
        controller.adjust(step, min(1.0, (steps - step) / (0.2 * steps)))
    return seen


@pytest.mark.parametrize("elasticity", [0.5, 0.8, 1.2])
@pytest.mark.parametrize(("steps", "lag"), [(1000, 30), (2000, 100), (4000, 200)])
def test_it_settles_at_the_target_without_undershooting_far(elasticity, steps, lag):
    seen = simulated(TargetL0(16.0, steps, "cpu"), steps, elasticity, lag)
    assert seen[-1] == pytest.approx(16.0, rel=0.05)
    assert min(seen) > 16.0 / 1.25


def test_nothing_moves_before_the_start():
    controller = TargetL0(16.0, 100, "cpu")
    for _ in range(50):
        controller.observe(torch.tensor(100.0))
    assert controller.log_gain.item() == 0
    assert controller.coefficient(3.0).item() == 3.0


def test_the_start_makes_a_small_penalty_felt_and_leaves_a_large_one():
    def started(l0: float, penalty: float) -> float:
        controller = TargetL0(16.0, 100, "cpu")
        controller.observe(torch.tensor(l0))
        controller.start(torch.tensor(penalty), torch.tensor(100.0))
        return penalty * controller.coefficient(1.0).item()

    assert started(100.0, 0.001) == pytest.approx(3.0, rel=1e-5)
    assert started(100.0, 5.0) == 5.0
    assert started(8.0, 0.001) == pytest.approx(0.001)
    assert started(100.0, 0.0) == 0.0


def test_state_survives_saving():
    one, other = TargetL0(16.0, 1000, "cpu"), TargetL0(16.0, 1000, "cpu")
    simulated(one, 50, 0.5, 20)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    for controller in (one, other):
        controller.observe(torch.tensor(31.0))
        controller.adjust(50, 0.5)
    assert torch.equal(one.log_gain, other.log_gain)


def trained(act_fn: str, folder: str, steps: int, **options) -> tuple[float, float, float]:
    """L0 and explained variance on held-out activations, and the last coefficient."""
    stream = {"d_model": 32, "n_features": 64, "active": 6.0}
    sae = make_dictionary(act_fn, d_model=32)
    sae.set_dataset_average_activation_norm({HOOK: SyntheticStream(**stream).mean_norm()})
    with torch.no_grad():
        rows = 0.5 * torch.nn.functional.normalize(torch.randn(128, 32), dim=-1)
        for name, value in (("W_D", rows), ("W_E", rows.T), ("b_E", torch.zeros(128))):
            sae.get_parameter(name).copy_(value)
    trainer = Trainer(TrainerConfig(total_training_tokens=128 * steps, exp_result_path=folder, n_checkpoints=0, **options))
    trainer.fit(sae, SyntheticStream(batch_size=128, **stream))
    x = SyntheticStream(batch_size=16384, seed=5, **stream).activations(0)
    with torch.no_grad():
        codes, reconstruction = sae.features_and_reconstruction({HOOK: x})
    assert trainer._run is not None
    controller = trainer._run._training.controller
    factor = 1.0 if controller is None else controller.log_gain.exp().item()
    l0 = (codes > 0).sum(-1).float().mean().item()
    return l0, 1 - ((reconstruction - x).square().sum() / (x - x.mean(0)).square().sum()).item(), factor * (trainer.cfg.l1_coefficient or 1.0)


CASES = [(act_fn, loss) for act_fn in ("relu", "jumprelu") for loss in ("power", "tanh", "tanh-quad")]


@pytest.mark.slow
@pytest.mark.parametrize(("act_fn", "loss"), CASES)
def test_held_out_l0_is_within_five_percent_of_the_target(act_fn, loss, tmp_path):
    lp = {"lp_coefficient": 0.01} if act_fn == "jumprelu" else {}
    l0, _, _ = trained(act_fn, str(tmp_path / "run"), 2000, sparsity_loss_type=loss, target_l0=8.0, **lp)
    assert l0 == pytest.approx(8.0, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu"])
def test_control_lies_on_the_pareto_curve_of_fixed_coefficients(act_fn, tmp_path):
    options = {"sparsity_loss_type": "tanh", **({"lp_coefficient": 0.01} if act_fn == "jumprelu" else {})}
    l0, explained, coefficient = trained(act_fn, str(tmp_path / "controlled"), 2000, target_l0=8.0, **options)
    fixed = [trained(act_fn, str(tmp_path / f"fixed {i}"), 2000, l1_coefficient=coefficient * 1.4 ** (i - 1), **options) for i in range(4)]
    curve = sorted((point[0], point[1]) for point in fixed)
    (low_l0, low), (high_l0, high) = next(pair for pair in itertools.pairwise(curve) if pair[0][0] <= l0 <= pair[1][0])
    share = (math.log(l0) - math.log(low_l0)) / (math.log(high_l0) - math.log(low_l0))
    assert explained > low + share * (high - low) - 0.02
