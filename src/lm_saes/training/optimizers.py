"""Adam, Adam with masked updates, and the norm of the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lm_saes.config import TrainerConfig
from lm_saes.errors import RunFolderError

_EPSILON = 1e-8


class MaskedAdam(torch.optim.Optimizer):
    """Adam whose update reaches only the entries with a gradient at this step.

    At step t, for every entry, with g its gradient:

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)        only where g != 0

    The moments of a latent that does not fire decay, but do not move it: a long-inactive latent is not driven by old momentum.
    (`torch.optim.SparseAdam` is another thing: it does not decay the moments of inactive rows.)
    Source: the masked Adam of "Dimensional Collapse in Transformer Attention Outputs" (arXiv 2508.16929).
    """

    found_inf: Tensor | None = None
    """Where set, a 0-dim tensor: 1 means that the gradients hold NaN or infinity and that no parameter is to move."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = _EPSILON) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    @override
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update from the gradients that are there; parameters without a gradient are left alone."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if self.found_inf is not None:
                    gradient = torch.where(self.found_inf > 0, torch.zeros_like(gradient), gradient)
                state = self.state[parameter]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                step_size = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                update = mean.div(square.sqrt().add_(group["eps"])).mul_(gradient != 0)
                parameter.sub_(update, alpha=step_size)


def make_optimizer(cfg: TrainerConfig, groups: Iterable[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of a run over a dictionary's `get_parameters()`. The group "jumprelu" learns `jumprelu_lr_factor` times as fast."""
    groups = [{**group, "lr_factor": cfg.jumprelu_lr_factor if group.get("name") == "jumprelu" else 1.0} for group in groups]
    if cfg.optimizer_class == "sparseadam":
        return MaskedAdam(groups, lr=cfg.lr, betas=cfg.betas)
    floating = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    fused = floating and all(parameter.device.type in {"cpu", "cuda", "mps", "xpu"} for group in groups for parameter in group["params"])
    return torch.optim.Adam(groups, lr=cfg.lr, betas=cfg.betas, eps=_EPSILON, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate: `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm of each parameter's gradient, stacked; 0 where there is none. The norm of this vector is the global norm."""
    zero = torch.zeros((), device=parameters[0].device)
    norms = [zero if p.grad is None else torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    return torch.stack([norm.float() for norm in norms])


def clip_gradients(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale the gradients so that their global norm, which is `norm`, is at most `limit`.

    Fused Adam scales them as it reads them, in its next step, which spares a pass over them. (The factor is then a float32 number.)
    """
    scales = isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"]
    if scales and all(p.dtype is torch.float32 and p.device.type in ("cpu", "cuda") for p in parameters):
        optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1)  # pyright: ignore[reportAttributeAccessIssue]  # read by fused Adam
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as `{"<parameter>/<entry>": tensor}`."""
    return {
        f"{names[parameter]}/{entry}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Integers come back as plain numbers.

    Raises:
        RunFolderError: the saved state is of another optimizer or of parameters of other shapes.
    """
    state: dict[Tensor, dict[str, Any]] = {}
    by_name = {name: parameter for parameter, name in names.items()}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = by_name.get(name)
        if parameter is None or (tensor.dim() > 0 and tensor.shape != parameter.shape):
            raise RunFolderError(
                f"the checkpoint's optimizer state '{key}' of shape {tuple(tensor.shape)} does not fit this dictionary; resume with its own settings"
            )
        plain = entry == "step" and not tensor.is_floating_point()
        if entry == "step" and plain != isinstance(optimizer, MaskedAdam):
            raise RunFolderError("the checkpoint was written by another optimizer_class; resume with the one it was trained with")
        state.setdefault(parameter, {})[entry] = int(tensor) if plain else tensor.to(parameter.device).clone()
    optimizer.state.clear()
    optimizer.state.update(state)
