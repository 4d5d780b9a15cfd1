"""Training one dictionary on one stream: the folder is opened, a `Run` is made of it, and the loop drives it (`run.py`, `loop.py`).

The finished dictionary (folded) is written by whoever called, see `runners.train_sae`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from lm_saes.config import TrainerConfig
from lm_saes.config.base import validated
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.checkpoint import Checkpoint, damage, find_checkpoint, load_weights, read_checkpoint
from lm_saes.training.loggers import Logger, ObjectLogger
from lm_saes.training.loop import train
from lm_saes.training.resume import NO_CHECKPOINT, allowed_changes, check_allowed, differences, discard_newer, newest_moment, trainer_table
from lm_saes.training.run import EvaluationFunction, Run
from lm_saes.training.run_folder import RunFolder


class Trainer:
    """Trains a dictionary on a stream of activations.

    Args:
        cfg: how. Its `exp_result_path` is the run's folder.
        loggers: where metrics go beside `metrics.jsonl`. `fit` starts and closes them.
        settings: JSON values kept in every checkpoint, to say what the run was.
        resume: go on from the newest whole checkpoint in the run's folder; a fresh start where there is none yet.
        allow_changes: fields of `cfg` that may differ from those that the run was begun with, when it is resumed.

    Raises:
        ConfigError: `settings` holds something else than JSON values, or `allow_changes` something that cannot change.
    """

    def __init__(
        self,
        cfg: TrainerConfig,
        *,
        loggers: Sequence[Logger] = (),
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        allow_changes: Sequence[str] = (),
    ) -> None:
        self.cfg = cfg
        """As given; fractions and defaults are resolved when `fit` knows how many steps there are."""
        self._settings = dict(settings or {})
        try:
            json.dumps(self._settings)
        except (TypeError, ValueError) as fault:
            raise ConfigError(f"settings must be JSON values: {fault}") from None
        self._loggers = list(loggers)
        self._resume = resume
        self._allow = check_allowed(f"trainer.{name.removeprefix('trainer.')}" for name in allow_changes)
        self._restored: Checkpoint | None = None
        self._run: Run | None = None

    @property
    def cur_step(self) -> int:
        """Steps done."""
        if self._run is not None:
            return self._run.cur_step
        return 0 if self._restored is None else self._restored.state["step"]

    @property
    def total_steps(self) -> int:
        """Steps of the run; 0 before `fit`."""
        return 0 if self._run is None else self._run.total_steps

    @property
    def cur_tokens(self) -> int:
        """Tokens trained on."""
        return 0 if self._run is None else self._run.tokens

    @classmethod
    def from_checkpoint(cls, sae: SparseDictionary, checkpoint_path: str | Path, cfg: TrainerConfig | None = None, **options: Any) -> Self:
        """A trainer whose `fit` goes on where a checkpoint stopped.

        Args:
            sae: gets the checkpoint's weights, at once.
            checkpoint_path: a folder `step_<n>`, or a run's folder, meaning its newest whole checkpoint.
            cfg: replaces the configuration that the checkpoint was made with.
            options: `loggers` and `settings`, as for `Trainer`.

        In the folder of the checkpoint's own run, `fit` removes what is newer: it belongs to a future that this run does not have.

        Raises:
            RunFolderError: there is no whole checkpoint, it is damaged, or it is of another dictionary.
        """
        folder = find_checkpoint(checkpoint_path)
        if (why := damage(folder)) is not None:
            raise RunFolderError(f"{folder} is damaged ({why}); go on from another checkpoint")
        checkpoint = read_checkpoint(folder)
        cfg = cfg or validated(TrainerConfig, checkpoint.state["trainer"], origin=str(checkpoint.folder))
        trainer = cls(cfg, **{"settings": checkpoint.state["settings"], **options})
        load_weights(sae, checkpoint.folder)
        trainer._restored = checkpoint
        return trainer

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
                mask. To resume it needs `state_dict()` and `load_state_dict(state)`; a state is a snapshot of JSON values, tensors, and
                numbers and arrays of NumPy; its tensors must not change when the stream goes on: it is written behind training.
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
        loggers = self._loggers if wandb_logger is None else [*self._loggers, ObjectLogger(wandb_logger)]
        folder = RunFolder(self.cfg.exp_result_path)
        with folder.owned() as killed:
            checkpoint, notes = self._open_folder(folder, sae)
            notes = [f"{folder.path} is taken over from {killed}, which was killed", *notes] if killed else notes
            run = Run(sae, self.cfg, loggers=loggers, settings=self._settings, checkpoint=checkpoint, notes=notes, eval_fn=eval_fn)
            self._run, self._restored = run, None
            ended_early = train([run], activation_stream)
        if run.error is not None:
            raise run.error
        return True if ended_early else None

    def _open_folder(self, folder: RunFolder, sae: SparseDictionary) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to go on from, if there is one, and what is to be said about it; `sae` gets its weights, or those that a fresh run
        starts from."""
        if self._restored is not None:  # from_checkpoint, going on where the checkpoint is, or in a folder of its own
            where_it_is = self._restored.folder.parent.parent.resolve() == folder.path.resolve()
            folder.open(resume=where_it_is)
            if where_it_is:
                discard_newer(self._restored.folder)
            return self._restored, []
        if self._run is not None:
            raise RunFolderError(f"this trainer has run already in {folder.path}; make a new Trainer, with another exp_result_path or resume=True")
        folder.open(self._resume)
        moment = newest_moment([self.cfg])
        if moment.checkpoints is not None:
            (newest,) = moment.checkpoints
            checkpoint = read_checkpoint(newest)
            before = validated(TrainerConfig, checkpoint.state["trainer"], origin=str(newest))
            changes = allowed_changes(differences(trainer_table(before), trainer_table(self.cfg), "trainer."), self._allow, folder.path)
            if changes:
                discard_newer(newest)
            load_weights(sae, newest)
            return checkpoint, [*moment.notes, *changes]
        if self.cfg.from_pretrained_path is not None:
            load_weights(sae, find_checkpoint(self.cfg.from_pretrained_path))
        return None, [NO_CHECKPOINT.format(folder.path)] if folder.begun else []

    def save_checkpoint(self, sae: SparseDictionary, checkpoint_path: str | Path, stream: Any = None) -> Path:
        """Write `<checkpoint_path>/checkpoints/step_<n>/`: the dictionary (unfolded), and all that going on needs.

        Args:
            stream: its state is saved, if it has `state_dict()`; without it the checkpoint cannot be resumed, only loaded.

        Raises:
            RunFolderError: the disk is full or cannot be written.
            ConfigError: nothing was trained yet.
        """
        if self._run is None or not self._run.begun or self._run.sae is not sae:
            raise ConfigError("there is no training to save yet; call fit first (or sae.save_pretrained for the dictionary alone)")
        return self._run.copy_state(checkpoint_path)(stream.state_dict() if hasattr(stream, "state_dict") else None)
