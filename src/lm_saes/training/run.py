"""One dictionary in training: a run without its stream. It is handed batches by `loop.py`, which may hand the same ones to many runs.

begin(tokens per batch) -> step(batch), step(batch), ... with copy_state where a checkpoint is due -> close
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lm_saes.config import TrainerConfig
from lm_saes.errors import ConfigError, NonFiniteError
from lm_saes.models.pretrained import write_files
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.checkpoint import Checkpoint, copied, remove_old, write_checkpoint
from lm_saes.training.loggers import JsonLines, Logger
from lm_saes.training.metrics import to_host
from lm_saes.training.nonfinite import NonFiniteWatch
from lm_saes.training.random_state import load_random_numbers, load_random_tensors, random_numbers, random_tensors
from lm_saes.training.run_folder import FAILURE_FILE, write_failure
from lm_saes.training.schedules import check_joints, checkpoint_steps, resolve, total_steps, warnings_of
from lm_saes.training.step import Batch, TrainingStep, flat_batch

EvaluationFunction = Callable[[SparseDictionary], Mapping[str, Any] | None]


class Run:
    """A dictionary, its schedule, its optimizer, its loggers and its folder.

    Args:
        sae: trained in place; in train mode from `begin` to `close`. Of a run that goes on, it has the checkpoint's weights already.
        cfg: how. Its `exp_result_path` is the run's folder, ready for use.
        loggers: where metrics go beside `metrics.jsonl`.
        settings: JSON values kept in every checkpoint, to say what the run was.
        checkpoint: where to go on; `None` is a fresh start.
        notes: lines for a person, said when the run begins: why it goes on there, say.
        eval_fn: called with the dictionary (eval mode, no gradients) every `eval_frequency` steps; the numbers it returns are logged.
    """

    def __init__(
        self,
        sae: SparseDictionary,
        cfg: TrainerConfig,
        *,
        loggers: Sequence[Logger] = (),
        settings: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
        notes: Sequence[str] = (),
        eval_fn: EvaluationFunction | None = None,
    ) -> None:
        self.sae, self.cfg, self.checkpoint = sae, cfg, checkpoint
        self.hook_points = sae.cfg.associated_hook_points
        self.device = next(sae.parameters()).device
        self.cur_step = 0 if checkpoint is None else checkpoint.state["step"]
        """Steps done."""
        self.total_steps = 0
        """Steps of the run; 0 before `begin`."""
        self.error: NonFiniteError | None = None
        """What stopped the run before its end."""
        self._settings, self._notes, self._eval_fn = dict(settings or {}), list(notes), eval_fn
        self._loggers: list[Logger] = [JsonLines(cfg.exp_result_path), *loggers]
        self._clock = _Clock(self.device)

    @property
    def finished(self) -> bool:
        """Whether the run takes no more batches: all its steps are done, or it was stopped by `error`."""
        return self.error is not None or self.cur_step >= self.total_steps

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return int(self._training.tokens) if self.begun else 0

    @property
    def begun(self) -> bool:
        """Whether `begin` has come to its end, so that there is something to save."""
        return hasattr(self, "_training")

    def begin(self, tokens_per_batch: int) -> None:
        """Resolve the schedules for batches of that size, start the loggers, and put back the state of the checkpoint, if there is one.

        Raises:
            ConfigError: options that contradict each other or the dictionary.
        """
        if self.sae.W_D.dtype is torch.float16:
            raise ConfigError('weights cannot be trained in float16: small updates vanish; take them in float32 (sae.dtype = "float32")')
        self.sae.train()
        (Path(self.cfg.exp_result_path) / FAILURE_FILE).unlink(missing_ok=True)
        checkpoint, self.checkpoint = self.checkpoint, None  # it holds copies of all moments
        self._tokens_per_batch = tokens_per_batch if checkpoint is None else checkpoint.state["tokens_per_batch"]
        self.total_steps = total_steps(self.cfg, self._tokens_per_batch)
        for logger in self._loggers:
            logger.start(self.total_steps, self.total_steps * self._tokens_per_batch, self.cur_step)
        for note in self._notes:
            self.message(note)
        resolved = resolve(self.cfg, self.total_steps, self._tokens_per_batch, self.message)
        check_joints(resolved, self.sae.cfg, self.total_steps)
        for line in warnings_of(self.cfg, self.sae.cfg):
            warnings.warn(line, UserWarning, stacklevel=2)
        self._saved_at = checkpoint_steps(resolved, self.total_steps)
        self._training = TrainingStep(
            self.sae, resolved, self.total_steps, NonFiniteWatch(self.cfg.exp_result_path, self.cfg.non_finite, self.message)
        )
        if checkpoint is not None:
            self._restore(checkpoint)
        self._clock.start()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, tensors = checkpoint.state, checkpoint.tensors
        self._training.load_state_tensors({name.removeprefix("step/"): tensor for name, tensor in tensors.items() if name.startswith("step/")})
        self._training.scaler.load_state_dict(state["scaler"])
        load_random_tensors({name.removeprefix("random/"): tensor for name, tensor in tensors.items() if name.startswith("random/")}, self.device)
        load_random_numbers(state["random"])
        self.message(f"resumed after step {self.cur_step} of {self.total_steps} from {checkpoint.folder}")

    # ------------------------------------------------------------------------------------------------------------ steps

    def step(self, batch: Batch) -> None:
        """One optimizer step on a flat batch, of which it takes its own hook points; then metrics and evaluation where they are due.
        A number that is not finite ends the run; `error` says where it was (`failure.json` too), and the weights are those before it."""
        try:
            self._step(flat_batch(batch, self.hook_points, self.device))
        except NonFiniteError as error:
            self._stop(error)

    def _step(self, batch: Batch) -> None:
        cfg, done = self._training.cfg, self.cur_step + 1
        measure = done == 1 or done % cfg.log_frequency == 0 or done == self.total_steps
        with self._clock.step(batch["mask"].numel(), measure):
            tensors = self._training(batch, self.cur_step, measure)
        self.cur_step = done
        for logger in self._loggers:
            logger.progress(done)
        evaluate = self._eval_fn if done % cfg.eval_frequency == 0 else None
        if measure or evaluate is not None:
            self._training.watch.settle()
        metrics = self._measured(tensors) if measure else {}
        if evaluate is not None:
            metrics |= _evaluated(self.sae, evaluate)
        if metrics:
            for logger in self._loggers:
                logger.log(done, metrics, console=measure)

    def _measured(self, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        metrics = to_host(tensors)
        if not self.cfg.skip_metrics_calculation:
            metrics |= self.sae.log_statistics()
        return metrics | self._clock.metrics(metrics["details/n_training_tokens"])

    def settle(self) -> None:
        """Look at the last step's numbers now, where they wait to be looked at (see `NonFiniteWatch`): before anything is kept."""
        try:
            self._training.watch.settle()
        except NonFiniteError as error:
            self._stop(error)

    def _stop(self, error: NonFiniteError) -> None:
        self.error = error
        write_failure(self.cfg.exp_result_path, self.cur_step, error)

    def message(self, text: str) -> None:
        """One line for a person."""
        for logger in self._loggers:
            logger.message(text)

    def ended_early(self) -> None:
        """Say that the stream has no more batches."""
        self.message(
            f"the stream ended after step {self.cur_step} of {self.total_steps} ({self.tokens:,} of {self.cfg.total_training_tokens:,} tokens): "
            "the learning rate and other schedules did not reach their end"
        )

    def close(self) -> None:
        """The run is over, however it ended."""
        self.sae.eval()
        if self.cfg.frozen is not None:
            for parameter in self.sae.parameters_of(self.cfg.frozen):
                parameter.requires_grad_(True)
        for logger in self._loggers:
            logger.close()

    # ----------------------------------------------------------------------------------------------------- checkpoints

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether the plan has a checkpoint after the step just done."""
        return self.cur_step in self._saved_at

    def copy_state(self, run_folder: str | Path) -> Callable[[dict[str, Any] | Path | None], Path]:
        """Copy what a checkpoint in that folder holds, so that the run can go on; what is returned writes `checkpoints/step_<n>/`, from any thread.
        It takes the stream's state, or another checkpoint, written at this moment, that holds it. It raises `RunFolderError` if the disk is full
        or cannot be written.

        Raises:
            NonFiniteError: see `settle`.
        """
        self._training.watch.settle()
        step, cfg, provenance = self.cur_step, self.sae.cfg, dict(self.sae.provenance)
        weights = copied(self.sae.state_dict())
        tensors = {f"step/{name}": tensor for name, tensor in self._training.state_tensors().items()}
        tensors = copied(tensors | {f"random/{name}": tensor for name, tensor in random_tensors(self.device).items()})
        state = {
            "total_steps": self.total_steps,
            "tokens": self.tokens,
            "tokens_per_batch": self._tokens_per_batch,
            "trainer": self.cfg.model_dump(mode="json", exclude_unset=True),
            "settings": self._settings,
            "scaler": self._training.scaler.state_dict(),
            "random": random_numbers(),
        }

        def save_dictionary(folder: Path) -> None:
            write_files(cfg, provenance, weights, folder)

        return lambda stream: write_checkpoint(run_folder, step, save_dictionary, tensors, state, stream)

    def remove_old_checkpoints(self) -> None:
        """Leave the newest `keep_checkpoints`. Raises `RunFolderError` if the disk cannot be written."""
        remove_old(self.cfg.exp_result_path, self.cfg.keep_checkpoints, self._saved_at)


@torch.no_grad()
def _evaluated(sae: SparseDictionary, eval_fn: EvaluationFunction) -> dict[str, float]:
    """The numbers among what `eval_fn` returns, with the dictionary in eval mode meanwhile."""
    sae.eval()
    try:
        results = eval_fn(sae) or {}
    finally:
        sae.train()
    return {name: float(value) for name, value in results.items() if isinstance(value, int | float) and not isinstance(value, bool)}


class _Clock:
    """Seconds of this process in the run; tokens per second, of everything since the last look and of the optimizer steps alone. All its
    metrics begin with "time/".

    An accelerator works behind the host's back, so there only the steps at which it is waited for anyway are timed: those of the log.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        self._began = self._looked = time.monotonic()
        self._tokens: float | None = None
        self._step_seconds, self._step_tokens = 0.0, 0

    def step(self, tokens: int, measured: bool) -> _Clock:
        """A context around one step."""
        self._timed, self._in_step = measured or self._device.type == "cpu", tokens
        return self

    def __enter__(self) -> None:
        if self._timed:
            self._wait()
            self._step_began = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self._timed:
            self._wait()
            self._step_seconds += time.perf_counter() - self._step_began
            self._step_tokens += self._in_step

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()

    def metrics(self, tokens: float) -> dict[str, float]:
        now = time.monotonic()
        rate = {} if self._tokens is None else {"time/tokens_per_second": (tokens - self._tokens) / max(now - self._looked, 1e-9)}
        self._looked, self._tokens = now, tokens
        return {"time/seconds": now - self._began, **rate, "time/step_tokens_per_second": self._step_tokens / max(self._step_seconds, 1e-9)}
