"""The training loop: batches in, a trained dictionary and a run's folder out.

1. The folder is opened: a new run, or the newest whole checkpoint of one to resume.
2. The first batch tells how many tokens a step has, hence how many steps there are; the schedules are resolved.
3. Step after step: a batch, one `TrainingStep`, then at their intervals metrics, evaluation, a checkpoint.
4. The end of the plan, the end of the stream, or Ctrl-C. Each leaves a checkpoint from which the run can go on.

The finished dictionary (folded) is written by whoever called, see `runners.train_sae`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from lm_saes.config import TrainerConfig
from lm_saes.config.base import validated
from lm_saes.errors import ConfigError, DataError, RunFolderError
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.checkpoint import Checkpoint, RunFolder, find_checkpoint, load_weights, read_checkpoint, write_checkpoint
from lm_saes.training.interruption import Interruption
from lm_saes.training.loggers import JsonLines, Logger, ObjectLogger
from lm_saes.training.metrics import to_host
from lm_saes.training.nonfinite import NonFiniteWatch
from lm_saes.training.random_state import load_random_numbers, load_random_tensors, random_numbers, random_tensors
from lm_saes.training.schedules import check_joints, checkpoint_steps, resolve, total_steps, warnings_of
from lm_saes.training.step import Batch, TrainingStep, flat_batches

EvaluationFunction = Callable[[SparseDictionary], Mapping[str, Any] | None]


class Trainer:
    """Trains a dictionary on a stream of activations.

    Args:
        cfg: how. Its `exp_result_path` is the run's folder.
        loggers: where metrics go beside `metrics.jsonl`. `fit` starts and closes them.
        settings: JSON values kept in every checkpoint, to say what the run was.
        resume: go on from the newest whole checkpoint in the run's folder; a fresh start where there is none yet.
    """

    def __init__(
        self, cfg: TrainerConfig, *, loggers: Sequence[Logger] = (), settings: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        self.cfg = cfg
        """As given; fractions and defaults are resolved when `fit` knows how many steps there are."""
        self.cur_step = 0
        """Steps done."""
        self.total_steps = 0
        """Steps of the run; 0 before `fit`."""
        self._settings = dict(settings or {})
        self._loggers = list(loggers)
        self._resume = resume
        self._restored: Checkpoint | None = None
        self._tokens_per_batch = 0
        self._step: TrainingStep | None = None
        self._clock = _Clock()

    @property
    def cur_tokens(self) -> int:
        """Tokens trained on."""
        return 0 if self._step is None else int(self._step.tokens)

    @classmethod
    def from_checkpoint(cls, sae: SparseDictionary, checkpoint_path: str | Path, cfg: TrainerConfig | None = None, **options: Any) -> Self:
        """A trainer whose `fit` goes on where a checkpoint stopped.

        Args:
            sae: gets the checkpoint's weights, at once.
            checkpoint_path: a folder `step_<n>`, or a run's folder, meaning its newest whole checkpoint.
            cfg: replaces the configuration that the checkpoint was made with.
            options: `loggers` and `settings`, as for `Trainer`.

        Raises:
            RunFolderError: there is no whole checkpoint, or it is of another dictionary.
        """
        checkpoint = read_checkpoint(find_checkpoint(checkpoint_path))
        cfg = cfg or validated(TrainerConfig, checkpoint.state["trainer"], origin=str(checkpoint.folder))
        trainer = cls(cfg, **{"settings": checkpoint.state["settings"], **options})
        load_weights(sae, checkpoint.folder)
        trainer._restored = checkpoint
        trainer.cur_step = checkpoint.state["step"]
        return trainer

    # ------------------------------------------------------------------------------------------------------------- fit

    def fit(
        self,
        sae: SparseDictionary,
        activation_stream: Iterable[Mapping[str, Any]],
        eval_fn: EvaluationFunction | None = None,
        wandb_logger: Any = None,
    ) -> Literal[True] | None:
        """Train `sae` in place. It is in train mode meanwhile and in eval mode afterwards.

        Args:
            activation_stream: batches `{hook: [N, D], "tokens": [N], "mask": [N]}`, or 2D ones `[B, S, D]`, which are flattened by their
                mask. To resume it needs `state_dict()` and `load_state_dict(state)`.
            eval_fn: called with the dictionary (eval mode, no gradients) every `eval_frequency` steps; the numbers it returns are logged.
            wandb_logger: any object with `log(metrics, step=...)`.

        Returns:
            True if the stream ended before the planned number of steps, else None.

        Raises:
            ConfigError: options that contradict each other or the dictionary.
            RunFolderError: the run's folder was used before, cannot be resumed, or the disk is full.
            DataError: the stream is empty.
            NonFiniteError: NaN or infinity; the weights are finite.
            KeyboardInterrupt: Ctrl-C or SIGTERM, after the step was finished and a checkpoint written.
        """
        self._open_folder(sae)
        loggers: list[Logger] = [JsonLines(self.cfg.exp_result_path), *self._loggers]
        if wandb_logger is not None:
            loggers.append(ObjectLogger(wandb_logger))
        log = _Loggers(loggers)
        try:
            sae.train()
            batches, watch = self._begin(sae, activation_stream, log), NonFiniteWatch(self.cfg.exp_result_path)
            self._step = self._training_step(sae, watch, log)
            self._restored = None
            with Interruption() as interruption:
                return self._loop(self._step, activation_stream, batches, eval_fn, log, interruption)
        finally:
            sae.eval()
            log.close()

    def _open_folder(self, sae: SparseDictionary) -> None:
        """The checkpoint to go on from, or the weights to start from, if there are any."""
        if self._restored is not None:
            folder = Path(self.cfg.exp_result_path)
            if self._restored.folder.parent.parent.resolve() != folder.resolve():  # from_checkpoint, going on in a folder of its own
                RunFolder(folder).open()
            return
        if self._step is not None:
            raise RunFolderError(
                f"this trainer has run already in {self.cfg.exp_result_path}; make a new Trainer, with another exp_result_path or resume=True"
            )
        newest = RunFolder(self.cfg.exp_result_path).open(self._resume)
        if newest is not None:
            load_weights(sae, newest)
            self._restored = read_checkpoint(newest)
            self.cur_step = self._restored.state["step"]
        elif self.cfg.from_pretrained_path is not None:
            load_weights(sae, find_checkpoint(self.cfg.from_pretrained_path))

    def _begin(self, sae: SparseDictionary, stream: Any, log: _Loggers) -> Iterator[Batch]:
        """Batches, from the start of the stream or from where the checkpoint left it; the number of steps gets known."""
        device = next(sae.parameters()).device
        hook_points = sae.cfg.associated_hook_points
        if self._restored is not None:
            if self._restored.stream is None or not hasattr(stream, "load_state_dict"):
                raise RunFolderError(
                    f"{self._restored.folder} cannot be resumed with a stream that does not remember its place; pass one with state_dict() and load_state_dict()"
                )
            stream.load_state_dict(self._restored.stream)
            self._tokens_per_batch = self._restored.state["tokens_per_batch"]
            batches = flat_batches(stream, hook_points, device)
        else:
            ahead = flat_batches(stream, hook_points, device)
            first = next(ahead, None)
            if first is None:
                raise DataError("the activation stream holds no batch; check its datasets, and that it was not used up before")
            self._tokens_per_batch = max(1, int(first["mask"].sum()))
            batches = _chain(first, ahead)
        self.total_steps = total_steps(self.cfg, self._tokens_per_batch)
        log.start(self.total_steps, self.total_steps * self._tokens_per_batch, self.cur_step)
        return batches

    def _training_step(self, sae: SparseDictionary, watch: NonFiniteWatch, log: _Loggers) -> TrainingStep:
        """The resolved configuration and the state of training."""
        resolved = resolve(self.cfg, self.total_steps, self._tokens_per_batch, log.message)
        check_joints(resolved, sae.cfg, self.total_steps)
        for line in warnings_of(self.cfg, sae.cfg):
            warnings.warn(line, UserWarning, stacklevel=3)
        step = TrainingStep(sae, resolved, self.total_steps, watch)
        if self._restored is not None:
            state, tensors = self._restored.state, self._restored.tensors
            step.load_state_tensors({name.removeprefix("step/"): tensor for name, tensor in tensors.items() if name.startswith("step/")})
            step.scaler.load_state_dict(state["scaler"])
            load_random_tensors({name.removeprefix("random/"): tensor for name, tensor in tensors.items() if name.startswith("random/")}, step.device)
            load_random_numbers(state["random"])
            log.message(f"resumed after step {self.cur_step} of {self.total_steps} from {self._restored.folder}")
        return step

    def _loop(
        self, step: TrainingStep, stream: Any, batches: Iterator[Batch], eval_fn: EvaluationFunction | None, log: _Loggers, interruption: Interruption
    ) -> Literal[True] | None:
        cfg, saved_at = step.cfg, checkpoint_steps(step.cfg, self.total_steps)
        self._clock.start()
        while self.cur_step < self.total_steps:
            batch = next(batches, None)
            if batch is None:
                return self._ended_early(step, stream, log)
            done = self.cur_step + 1
            is_last = done == self.total_steps
            measure = done == 1 or done % cfg.log_frequency == 0 or is_last
            tensors = step(batch, self.cur_step, measure)
            self.cur_step = done
            log.progress(done)
            evaluate = eval_fn if done % cfg.eval_frequency == 0 else None
            if measure or evaluate is not None:
                step.watch.settle()
            metrics = self._measured(step, tensors) if measure else {}
            if evaluate is not None:
                metrics |= evaluated(step.sae, evaluate)
            if metrics:
                log.log(done, metrics, console=measure)
            if done in saved_at or interruption.requested:
                path = self.save_checkpoint(step.sae, self.cfg.exp_result_path, stream)
                if interruption.requested:
                    log.message(f"interrupted after step {done} of {self.total_steps}; the checkpoint {path} can be resumed")
                    raise KeyboardInterrupt
        return None

    def _measured(self, step: TrainingStep, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        metrics = to_host(tensors)
        if not self.cfg.skip_metrics_calculation:
            metrics |= step.sae.log_statistics()
        return metrics | self._clock.metrics(metrics["details/n_training_tokens"])

    def _ended_early(self, step: TrainingStep, stream: Any, log: _Loggers) -> Literal[True]:
        step.watch.settle()
        log.message(
            f"the stream ended after step {self.cur_step} of {self.total_steps} ({self.cur_tokens:,} of {self.cfg.total_training_tokens:,} tokens): "
            "the learning rate and other schedules did not reach their end"
        )
        if self.cfg.n_checkpoints > 0 and self.cur_step > 0:
            self.save_checkpoint(step.sae, self.cfg.exp_result_path, stream)
        return True

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, sae: SparseDictionary, checkpoint_path: str | Path, stream: Any = None) -> Path:
        """Write `<checkpoint_path>/checkpoints/step_<n>/`: the dictionary (unfolded), and all that going on needs.

        Args:
            stream: its state is saved, if it has `state_dict()`; without it the checkpoint cannot be resumed, only loaded.

        Raises:
            RunFolderError: the disk is full or cannot be written.
            ConfigError: nothing was trained yet.
        """
        step = self._step
        if step is None:
            raise ConfigError("there is no training to save yet; call fit first (or sae.save_pretrained for the dictionary alone)")
        step.watch.settle()
        tensors = {f"step/{name}": tensor for name, tensor in step.state_tensors().items()}
        tensors |= {f"random/{name}": tensor for name, tensor in random_tensors(step.device).items()}
        state = {
            "schema_version": 1,
            "total_steps": self.total_steps,
            "tokens": int(step.tokens),
            "tokens_per_batch": self._tokens_per_batch,
            "trainer": self.cfg.model_dump(mode="json", exclude_unset=True),
            "settings": self._settings,
            "scaler": step.scaler.state_dict(),
            "random": random_numbers(),
        }
        stream_state = stream.state_dict() if hasattr(stream, "state_dict") else None
        return write_checkpoint(checkpoint_path, self.cur_step, sae.save_pretrained, tensors, state, stream_state)


@torch.no_grad()
def evaluated(sae: SparseDictionary, eval_fn: EvaluationFunction) -> dict[str, float]:
    """The numbers among what `eval_fn` returns, with the dictionary in eval mode meanwhile."""
    sae.eval()
    try:
        results = eval_fn(sae) or {}
    finally:
        sae.train()
    return {name: float(value) for name, value in results.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest


class _Clock:
    """Seconds of this process in the run, and the rate since the last look. All its metrics begin with "time/"."""

    def start(self) -> None:
        self._began = self._looked = time.monotonic()
        self._tokens: float | None = None

    def metrics(self, tokens: float) -> dict[str, float]:
        now = time.monotonic()
        rate = {} if self._tokens is None else {"time/tokens_per_second": (tokens - self._tokens) / max(now - self._looked, 1e-9)}
        self._looked, self._tokens = now, tokens
        return {"time/seconds": now - self._began, **rate}


class _Loggers:
    """All loggers as one."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = loggers

    def start(self, total_steps: int, total_tokens: int, first_step: int) -> None:
        for logger in self._loggers:
            logger.start(total_steps, total_tokens, first_step)

    def progress(self, step: int) -> None:
        for logger in self._loggers:
            logger.progress(step)

    def log(self, step: int, metrics: dict[str, float], console: bool) -> None:
        for logger in self._loggers:
            logger.log(step, metrics, console=console)

    def message(self, text: str) -> None:
        for logger in self._loggers:
            logger.message(text)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
