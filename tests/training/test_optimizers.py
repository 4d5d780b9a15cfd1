"""The optimizers against NumPy."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import nn

from lm_saes.config import TrainerConfig
from lm_saes.errors import RunFolderError
from lm_saes.training.optimizers import MaskedAdam, clip_gradients, gradient_norms, load_optimizer_tensors, make_optimizer, optimizer_tensors, set_lr


def numpy_masked_adam(p, gradients, lr, betas, eps=1e-8):
    p, m, v = p.copy(), numpy.zeros_like(p), numpy.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        step = lr * numpy.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (numpy.sqrt(v) + eps)
        p[g != 0] -= step[g != 0]
    return p


def test_masked_adam_is_its_formula():
    random = numpy.random.default_rng(0)
    start = random.normal(size=(6, 4))
    gradients = [random.normal(size=(6, 4)) * (random.random((6, 4)) < 0.4) for _ in range(12)]
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = MaskedAdam([parameter], lr=0.01, betas=(0.9, 0.99))
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    numpy.testing.assert_allclose(parameter.detach().numpy(), numpy_masked_adam(start, gradients, 0.01, (0.9, 0.99)), rtol=1e-12, atol=1e-14)


def test_masked_adam_does_not_move_what_has_no_gradient_and_adam_does():
    def moved(optimizer_class):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = make_optimizer(TrainerConfig(optimizer_class=optimizer_class), [{"params": [parameter], "name": "others"}])
        for gradient in ([1.0, 1.0], [1.0, 0.0]):
            before = parameter.detach().clone()
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        return (parameter.detach() != before).tolist()

    assert moved("sparseadam") == [True, False]
    assert moved("adam") == [True, True]


def test_masked_adam_stands_still_where_the_gradient_is_not_finite():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdam([parameter])
    parameter.grad = torch.tensor([1.0, float("nan"), float("inf")])
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert torch.isfinite(optimizer.state[parameter]["exp_avg_sq"]).all()


def test_fused_adam_is_used_and_stands_still_where_it_is_told_to():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(TrainerConfig(), [{"params": [parameter], "name": "others"}])
    assert optimizer.defaults["fused"]
    parameter.grad = torch.tensor([1.0, float("nan"), float("inf")])
    optimizer.found_inf = torch.tensor(1.0)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0, 1.0]


def test_thresholds_learn_at_their_own_rate():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = make_optimizer(TrainerConfig(jumprelu_lr_factor=5.0), [{"params": [a], "name": "others"}, {"params": [b], "name": "jumprelu"}])
    set_lr(optimizer, 0.01)
    a.grad, b.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert (1 - b).item() == pytest.approx(5 * (1 - a).item(), rel=1e-5)
    set_lr(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.1]


def test_gradient_norms_make_the_global_norm():
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.full((2, 3), 2.0), torch.full((4,), -1.0)
    norms = gradient_norms(parameters)
    assert norms.tolist() == pytest.approx([24**0.5, 2.0, 0.0])
    assert norms.norm().item() == pytest.approx(28**0.5)


@pytest.mark.parametrize("optimizer_class", ["adam", "sparseadam"])
def test_state_survives_saving(optimizer_class):
    def make():
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(4))
        return parameter, make_optimizer(TrainerConfig(optimizer_class=optimizer_class), [{"params": [parameter], "name": "others"}])

    def step(parameter, optimizer, seed):
        parameter.grad = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    straight, optimizer = make()
    for seed in range(4):
        step(straight, optimizer, seed)
    first, one = make()
    for seed in range(2):
        step(first, one, seed)
    second, other = make()
    with torch.no_grad():
        second.copy_(first)
    load_optimizer_tensors(other, {second: "W"}, optimizer_tensors(one, {first: "W"}))
    for seed in range(2, 4):
        step(second, other, seed)
    assert torch.equal(straight, second)


def test_state_of_another_optimizer_or_shape_is_refused():
    parameter = nn.Parameter(torch.ones(3))
    names: dict[torch.Tensor, str] = {parameter: "W"}
    optimizer = make_optimizer(TrainerConfig(), [{"params": [parameter], "name": "others"}])
    with pytest.raises(RunFolderError, match="optimizer_class"):
        load_optimizer_tensors(optimizer, names, {"W/step": torch.tensor(3)})
    with pytest.raises(RunFolderError, match="does not fit"):
        load_optimizer_tensors(optimizer, names, {"W/exp_avg": torch.ones(4)})
    with pytest.raises(RunFolderError, match="does not fit"):
        load_optimizer_tensors(optimizer, names, {"other/exp_avg": torch.ones(3)})


@pytest.mark.parametrize("limit", [0.1, 1e9])
@pytest.mark.parametrize("fused", [False, True])
def test_clipping_limits_the_global_norm_of_what_adam_sees(limit, fused):
    torch.manual_seed(0)
    parameters, wanted = ([torch.nn.Parameter(torch.ones(n)) for n in (5, 17)] for _ in range(2))
    optimizer, plain = torch.optim.Adam(parameters, fused=fused), torch.optim.Adam(wanted, fused=False)
    for _ in range(3):
        gradients = [10 * torch.randn(len(p)) for p in parameters]
        norm = torch.linalg.vector_norm(torch.cat(gradients))
        for p, q, gradient in zip(parameters, wanted, gradients, strict=True):
            p.grad, q.grad = gradient.clone(), gradient * min(1.0, limit / float(norm))
        clip_gradients(optimizer, parameters, limit, norm)
        optimizer.step()
        plain.step()
    for p, q in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], plain.state[q]["exp_avg"])  # Adam's update alone forgets a common factor
        torch.testing.assert_close(p, q)
