"""One optimizer step, and all state that training has beside the weights.

    normalise the batch -> run the dictionary -> losses -> backward -> (non-finite? stop, or pass over it) -> clip -> optimizer -> statistics

A batch may be cut into micro-batches. Their losses are masked means over their own tokens, so weighting each by its share of the
batch's tokens makes the sum of their gradients the gradient of the whole batch.

Between log steps the host reads nothing back from the device (on the CPU it looks at a few numbers, see `NonFiniteWatch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lm_saes.config import TrainerConfig
from lm_saes.devices import reuse_freed_memory, widest_float
from lm_saes.errors import DataError, NonFiniteError
from lm_saes.losses import LossInputs, LossWeights, label_variance, total_loss
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.controller import TargetL0
from lm_saes.training.dead_latents import DeadLatents, firing_counts
from lm_saes.training.metrics import BatchResult, FiringDensity, sum_of_codes
from lm_saes.training.nonfinite import NonFiniteWatch
from lm_saes.training.optimizers import clip_gradients, gradient_norms, load_optimizer_tensors, make_optimizer, optimizer_tensors, set_lr
from lm_saes.training.schedules import Knobs, knobs, warm_up_ends

Batch = dict[str, Any]
ALIGNMENT = 64
"""Bytes: a cache line, where torch's memory on a CPU begins."""
_SMALLEST_LOSS_SCALE = 2.0**-20


def flat_batch(batch: Batch, hook_points: list[str], device: torch.device) -> Batch:
    """The batch as rows on the device: `{hook: [N, D], "tokens": [N], "mask": [N]}`. A 2D batch is flattened by its mask; a 1D batch
    keeps its mask, or gets one that is all true."""
    tensors = {key: aligned(batch[key].to(device, non_blocking=True)) for key in (*hook_points, "tokens", "mask") if key in batch}
    first = tensors[hook_points[0]]
    mask = tensors.setdefault("mask", torch.ones(first.shape[:-1], dtype=torch.bool, device=device)).bool()
    if first.dim() == 2:
        return {**tensors, "mask": mask}
    kept = {key: value[mask] for key, value in tensors.items() if key != "mask"}
    return {**kept, "mask": torch.ones(kept[hook_points[0]].shape[0], dtype=torch.bool, device=device)}


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where torch allocates: some products on a CPU sum in an order that depends on where in a cache line their operands
    begin, and a slice, which a resumed stream may give whole, begins anywhere."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


def flat_batches(stream: Iterable[Mapping[str, Any]], hook_points: list[str], device: torch.device) -> Iterator[Batch]:
    """The batches of a stream as `flat_batch` makes them.

    Raises:
        DataError: a batch lacks one of the hook points.
    """
    for batch in stream:
        missing = [hook for hook in hook_points if hook not in batch]
        if missing:
            raise DataError(f"the dictionary needs activations at {missing}, the stream gives {sorted(batch)}; add them to the factory's hook_points")
        yield flat_batch(dict(batch), hook_points, device)


def compute_dtype(cfg: TrainerConfig, device: torch.device) -> torch.dtype | None:
    """The autocast data type, or `None` for none. "auto" is bfloat16 on CUDA."""
    if cfg.amp_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return cfg.amp_dtype  # pyright: ignore[reportReturnType]  # a dtype field gives a torch.dtype when read


class TrainingStep:
    """Trains `sae` by one batch per call. `cfg` must be resolved; `watch` looks at each step's numbers before the weights move."""

    def __init__(self, sae: SparseDictionary, cfg: TrainerConfig, total_steps: int, watch: NonFiniteWatch) -> None:
        self.sae, self.cfg, self.total_steps, self.watch = sae, cfg, total_steps, watch
        if cfg.frozen is not None:
            for parameter in sae.parameters_of(cfg.frozen):
                parameter.requires_grad_(False)  # until the run is closed
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in sae.named_parameters() if parameter.requires_grad}
        self.parameters = [parameter for parameter in sae.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        if self.device.type == "cpu":
            reuse_freed_memory()
        self.optimizer = make_optimizer(cfg, sae.get_parameters())
        self.dead_latents = DeadLatents(sae.cfg.d_sae, cfg.dead_threshold, self.device)
        self.density = FiringDensity(sae.cfg.d_sae, cfg.feature_sampling_window, self.device)
        self.control_from = warm_up_ends(cfg)
        self.controller = TargetL0(cfg.target_l0, total_steps - self.control_from, self.device) if cfg.target_l0 is not None else None
        self.tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        self.amp_dtype = compute_dtype(cfg, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)

    def __call__(self, batch: Batch, step: int, measure: bool) -> dict[str, Tensor]:
        """One step (counted from 0) on a flat batch. With `measure`, the metrics as 0-dim tensors on the device; else an empty dict. Where the
        batch is passed over, nothing but the schedule moves, and the metrics are those that need no batch.

        Raises:
            NonFiniteError: a loss or a gradient is NaN or infinite (on CUDA: of the step before) and the run is to stop. It has not reached the
                weights.
        """
        scheduled = knobs(self.cfg, self.sae.cfg, step, self.total_steps)
        set_lr(self.optimizer, scheduled.lr)
        self.sae.set_current_k(scheduled.k)
        self.optimizer.zero_grad(set_to_none=True)
        coefficient = scheduled.sparsity if self.controller is None else self.controller.coefficient(scheduled.sparsity)
        result = self._gradients(batch, scheduled, coefficient, measure)
        gradient_norm = self._update_weights(batch, step, result)
        if measure:
            self._check_loss_scale()
        with torch.no_grad():
            if gradient_norm is not None:
                self._update_statistics(result, scheduled, step)
            return self._metrics(result, gradient_norm, scheduled, coefficient) if measure else {}

    def _gradients(self, batch: Batch, scheduled: Knobs, coefficient: float | Tensor, measure: bool) -> BatchResult:
        """Forward and backward of the batch, in micro-batches."""
        with torch.no_grad():
            normalized = self.sae.normalize_activations(batch)
        x, target, mask = self.sae.prepare_input(normalized), self.sae.prepare_label(normalized), batch["mask"]
        result = BatchResult(x, target, mask, tokens=mask.sum())
        weights = self._loss_weights(scheduled, coefficient)
        dead = self.dead_latents.dead()
        pieces = self.cfg.gradient_accumulation_steps
        for x_i, target_i, mask_i in zip(*(tensor.tensor_split(pieces) for tensor in (x, target, mask)), strict=True):
            if pieces > 1 and x_i.shape[0] == 0:
                continue
            with torch.autocast(self.device.type, dtype=self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None):
                forward = self.sae.run(x_i, k=scheduled.k, mask=mask_i, target=target_i)
                loss, terms = total_loss(self.sae, LossInputs(x_i, target_i, forward, mask_i, dead), weights)
            share = mask_i.sum().to(loss.dtype) / result.tokens.clamp(min=1) if pieces > 1 else 1.0
            self.scaler.scale(loss * share).backward()
            with torch.no_grad():
                result.add(forward, loss, terms, share, firing_counts(forward.codes, mask_i))
                if measure:
                    result.add_measured(forward.reconstruction, sum_of_codes(forward.codes, mask_i))
        return result

    def _loss_weights(self, scheduled: Knobs, coefficient: float | Tensor) -> LossWeights:
        cfg = self.cfg
        return LossWeights(
            sparsity_loss_type=cfg.sparsity_loss_type,
            sparsity=coefficient,
            tanh_stretch_coefficient=cfg.tanh_stretch_coefficient,
            frequency_scale=cfg.frequency_scale,
            p=cfg.p,
            lp=scheduled.lp or None,
            auxk=scheduled.auxk or None,
            k_aux=cfg.k_aux,
        )

    def _update_weights(self, batch: Batch, step: int, result: BatchResult) -> Tensor | None:
        """Check, clip and apply the gradients; their global norm before clipping. `None` where the batch is passed over."""
        vitals = {f"the loss term {name}": term for name, term in result.terms.items()} | {"the loss": result.loss}
        norms = None
        if not self.scaler.is_enabled():  # with float16 an overflow of the scaled gradients is expected: the scaler skips that step
            norms = gradient_norms(self.parameters)
            vitals |= {f"the gradient of {name}": norm for name, norm in zip(self.names.values(), norms, strict=True)}
        values = torch.stack([value.float() for value in vitals.values()])
        if not self.watch.check(step + 1, batch, list(vitals), values):
            return None
        self.scaler.unscale_(self.optimizer)
        gradient_norm = torch.linalg.vector_norm(gradient_norms(self.parameters) if norms is None else norms)
        with torch.no_grad():  # before the weights move: the codes, and the norms that the gate multiplies them by, are those of these weights
            self.sae.update_statistics(result.forward, result.x, result.mask)
        if not self.scaler.is_enabled() and self.device.type == "cuda":
            self.optimizer.found_inf = (~torch.isfinite(values).all()).float()  # pyright: ignore[reportAttributeAccessIssue]  # read by fused Adam
        if self.cfg.clip_grad_norm > 0:
            if self.scaler.is_enabled():  # the scaler has the optimizer's factor for itself
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.cfg.clip_grad_norm, gradient_norm)
            else:
                clip_gradients(self.optimizer, self.parameters, self.cfg.clip_grad_norm, gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return gradient_norm

    def _check_loss_scale(self) -> None:
        """float16: gradients that overflow at every scale are not finite in themselves."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_LOSS_SCALE:
            raise NonFiniteError(
                "the gradients overflow float16 at every loss scale, so no step is taken; set amp_dtype to bfloat16 or none, or lower lr"
            )

    def _update_statistics(self, result: BatchResult, scheduled: Knobs, step: int) -> None:
        self.tokens += result.tokens
        self.dead_latents.update(result.counts, result.tokens)
        self.density.update(result.counts, result.tokens)
        if self.controller is not None:
            self.controller.observe(result.l0)
            if step >= self.control_from and not self.controller.started:  # the step itself may have been passed over
                self.controller.start(result.terms["sparsity_loss"], label_variance(result.target, result.mask))
            if step >= self.control_from:
                self.controller.adjust(step - self.control_from, scheduled.lr / self.cfg.lr)

    def _metrics(self, result: BatchResult, gradient_norm: Tensor | None, scheduled: Knobs, coefficient: float | Tensor) -> dict[str, Tensor]:
        n_parameters = sum(parameter.numel() for parameter in self.parameters)
        numbers = {
            "sparsity/k": scheduled.k,
            "details/current_learning_rate": scheduled.lr,
            "details/n_training_tokens": self.tokens,
            "details/l1_coefficient": coefficient,
            "details/lp_coefficient": scheduled.lp,
            "details/auxk_coefficient": scheduled.auxk,
            **({"details/n_skipped_batches": self.watch.skipped} if self.cfg.non_finite == "skip" else {}),
        }
        plain = {name: torch.as_tensor(number, dtype=widest_float(self.device)) for name, number in numbers.items()}
        if gradient_norm is None:
            return plain
        measured = {} if self.cfg.skip_metrics_calculation else {
            **result.metrics(),
            "metrics/gradient_norm_before_clipping": gradient_norm,
            "metrics/gradient_norm_per_param": gradient_norm / n_parameters**0.5,
            **self.density.metrics(),
            "sparsity/dead_fraction": self.dead_latents.dead().float().mean(),
        }  # fmt: skip
        return {**result.losses(), **measured, **plain}

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors of training beside the weights, by names with a prefix."""
        parts = {"optimizer": optimizer_tensors(self.optimizer, self.names)}
        parts |= {name: part.state_dict() for name, part in self._stateful().items()}
        return {"tokens": self.tokens} | {f"{prefix}/{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            prefix, _, name = key.partition("/")
            parts.setdefault(prefix, {})[name] = tensor
        self.tokens.copy_(tensors["tokens"])
        load_optimizer_tensors(self.optimizer, self.names, parts.get("optimizer", {}))
        for name, part in self._stateful().items():
            if name in parts:
                part.load_state_dict(parts[name])

    def _stateful(self) -> dict[str, DeadLatents | FiringDensity | TargetL0 | NonFiniteWatch]:
        controller = {} if self.controller is None else {"controller": self.controller}
        return {"dead_latents": self.dead_latents, "density": self.density, "non_finite": self.watch, **controller}
