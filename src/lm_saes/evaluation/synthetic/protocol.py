"""The benchmark: kinds of dictionaries trained on the same samples of a synthetic model, and scored against its features.

Each training is a run with a folder of its own, `<folder>/seed_<n>/<kind>`: the run's usual files, and `scores.json` when it is done.
Kinds of one seed are trained together, on samples that are drawn once. What is done is not done again; what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_saes.config import InitializerConfig, MatryoshkaConfig, SAEConfig, TrainerConfig
from lm_saes.config.synthetic import SyntheticBenchmarkConfig
from lm_saes.errors import ConfigError, RunFolderError, did_you_mean
from lm_saes.evaluation.synthetic.generator import SYNTHETIC_HOOK, SyntheticModel, SyntheticStream
from lm_saes.evaluation.synthetic.probe import LogisticProbe
from lm_saes.evaluation.synthetic.scores import Scores, score
from lm_saes.files import read_json_object
from lm_saes.models.initializer import Initializer
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.training.checkpoint import read_checkpoint, resumable_folders
from lm_saes.training.loggers import Logger
from lm_saes.training.loop import train
from lm_saes.training.resume import newest_moment
from lm_saes.training.run import Run
from lm_saes.training.run_folder import RunFolder, write_json

SCORES_FILE = "scores.json"
PROBE = "probe"
"""The name of the probe's folder beside those of the seeds."""
EVALUATION_SEED, PROBE_SEED = 1_000_000, 1_000_001
"""Seeds of the samples that are scored on, and that the probe is trained on; training has the seeds 0, 1, ..."""


@dataclass(frozen=True)
class Kind:
    """One row of the table: fields of `SAEConfig`, `TrainerConfig` and `InitializerConfig`, apart from what all kinds share."""

    sae: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    initializer: dict[str, Any] = field(default_factory=dict)
    nested: tuple[int, ...] = ()
    """Matryoshka's prefixes, as d_sae over their widths."""
    annealed_k: tuple[float, float] | None = None
    """k at the start and at the end, over the L0 of the others; it falls linearly over the first four fifths."""
    lr: float = 1.0
    """Learning rate, over that of the others."""


_AUXK = {"auxk_coefficient": 1 / 32}
_L1 = {"sparsity_loss_type": "power", "l1_coefficient": 0.5}
_TANH = {"sparsity_loss_type": "tanh", "l1_coefficient": 0.5, "lp_coefficient": 3e-6}
KINDS = {
    "batchtopk": Kind({"act_fn": "batchtopk"}, _AUXK),
    "matryoshka": Kind({"act_fn": "batchtopk"}, _AUXK, nested=(32, 8, 2)),
    "matryoshka-annealed": Kind({"act_fn": "batchtopk"}, _AUXK, nested=(32, 8, 2), annealed_k=(2.4, 0.875), lr=3.0),
    "topk": Kind({"act_fn": "topk"}, _AUXK),
    "jumprelu": Kind({"act_fn": "jumprelu"}, {**_TANH, "jumprelu_lr_factor": 3.0}, {"init_log_jumprelu_threshold_value": 0.0}),
    "relu": Kind({"act_fn": "relu"}, _L1),
}
"""What is compared. Of the published protocol: Adam at one learning rate, L0 by k or by steering the penalty, Matryoshka's widths in the
ratio 1/32, 1/8, 1/2, 1, JumpReLU's thresholds starting at 1. This library's own: the start, AuxK's weight, the penalties, the learning rate's
warm-up and decay; JumpReLU's thresholds learn three times as fast, else they follow the penalty too late to reach the L0 in so short a run; and
"matryoshka-annealed": k begins far above the L0 of the others and ends somewhat below it, at three times their learning rate."""

BASELINE_KINDS = {
    "frozen-decoder": Kind({"act_fn": "batchtopk"}, {**_AUXK, "frozen": "decoder"}),
    "frozen-encoder": Kind({"act_fn": "batchtopk", "sparsity_include_decoder_norm": False}, {**_AUXK, "frozen": "encoder"}),
}
"""BatchTopK with a part that stays as it starts: what `lm_saes.config.baselines` makes of a run."""

RECIPE = InitializerConfig(bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=True)
"""How every dictionary starts."""


class SyntheticBenchmark:
    """Trains and scores.

    Args:
        cfg: on what.
        folder: where runs and scores are kept.

    Raises:
        DeviceError: this machine does not have the device.
        RunFolderError: the folder holds scores of other settings.
    """

    def __init__(self, cfg: SyntheticBenchmarkConfig, folder: str | Path) -> None:
        self.cfg, self.folder = cfg, Path(folder)
        self._check_folder()
        self.model = SyntheticModel(cfg.model, cfg.device)

    def dictionaries(self, kinds: Sequence[str], seed: int, loggers: Sequence[Logger] = ()) -> dict[str, Scores]:
        """The scores of dictionaries of several kinds. Those that are not there yet are trained on the same samples at once, which are drawn once;
        each becomes what it would have become alone.

        Args:
            loggers: told of the first of them that are trained together, which all keep the same pace.

        Raises:
            ConfigError: there is no such kind.
            NonFiniteError: one of them met NaN or infinity; the others are trained and kept.
            KeyboardInterrupt: Ctrl-C; calling again goes on.
        """
        known_kinds = KINDS | BASELINE_KINDS
        for kind in kinds:
            if kind not in known_kinds:
                raise ConfigError(f"no kind of dictionary '{kind}'{did_you_mean(kind, known_kinds)} Kinds: {', '.join(known_kinds)}")
        places: dict[int, list[str]] = {}
        for kind in kinds:
            if not (self._folder(kind, seed) / SCORES_FILE).is_file():
                places.setdefault(max(resumable_folders(self._folder(kind, seed)), default=0), []).append(kind)
        for together in places.values():  # those that stopped at the same step
            self._train(together, seed, loggers)
        return {kind: _read(self._folder(kind, seed) / SCORES_FILE) or {} for kind in kinds}

    def dictionary(self, kind: str, seed: int, loggers: Sequence[Logger] = ()) -> Scores:
        """`dictionaries` of one kind."""
        return self.dictionaries([kind], seed, loggers)[kind]

    def probe(self) -> Scores:
        """The scores of the logistic probe of the `d_sae` most frequent features, trained unless that was done before."""
        path = self.folder / PROBE / SCORES_FILE
        if (known := _read(path)) is not None:
            return known
        n_batches = max(1, self.cfg.n_probe_samples // self.cfg.batch_size)
        probe = LogisticProbe(self.cfg.model.d_model, self.cfg.d_sae, self.model.device)
        probe.fit(SyntheticStream(self.model, self.cfg.batch_size, PROBE_SEED), n_batches)
        held_out = self._held_out()
        detection = probe.score(held_out, held_out.n_batches or 0)
        scores: Scores = {"f1": detection.f1, "precision": detection.precision, "recall": detection.recall}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)
        return scores

    def sae_config(self, kind: Kind) -> SAEConfig:
        """The dictionary of a kind."""
        cfg = self.cfg
        matryoshka = MatryoshkaConfig(widths=tuple(max(1, cfg.d_sae // share) for share in kind.nested)) if kind.nested else None
        top_k = cfg.l0 if kind.annealed_k is None else max(1, round(kind.annealed_k[1] * cfg.l0))
        return SAEConfig(
            hook_point_in=SYNTHETIC_HOOK, d_model=cfg.model.d_model, expansion_factor=cfg.d_sae / cfg.model.d_model, top_k=top_k,
            matryoshka=matryoshka, device=str(self.model.device), **kind.sae,
        )  # fmt: skip

    def trainer_config(self, kind: Kind, seed: int, folder: Path) -> TrainerConfig:
        """The training of a kind."""
        cfg = self.cfg
        of_size: dict[str, Any] = {"target_l0": float(cfg.l0)} if "sparsity_loss_type" in kind.trainer else {"k_aux": max(1, cfg.model.d_model // 2)}
        if kind.annealed_k is not None:
            of_size |= {"initial_k": round(kind.annealed_k[0] * cfg.l0), "k_warmup_steps": 0.8}
        return TrainerConfig(
            total_training_tokens=cfg.n_training_samples, lr=cfg.lr * kind.lr, lr_warm_up_steps=0.02, dead_threshold=max(1, cfg.n_training_samples // 20),
            n_checkpoints=4, check_point_save_mode="linear", seed=seed, exp_result_path=str(folder), **of_size, **kind.trainer,
        )  # fmt: skip

    def _folder(self, kind: str, seed: int) -> Path:
        return self.folder / f"seed_{seed}" / kind

    def _train(self, kinds: Sequence[str], seed: int, loggers: Sequence[Logger]) -> None:
        """Train, score and keep dictionaries that start, or go on, at the same step."""
        known_kinds = KINDS | BASELINE_KINDS
        cfgs = [self.trainer_config(known_kinds[kind], seed, self._folder(kind, seed)) for kind in kinds]
        stream = SyntheticStream(self.model, self.cfg.batch_size, seed)
        with ExitStack() as owned:
            for cfg in cfgs:
                folder = RunFolder(cfg.exp_result_path)
                owned.enter_context(folder.owned())
                folder.open(resume=True)
            saes: list[SparseAutoEncoder] = []
            runs: list[Run] = []
            checkpoints = newest_moment(cfgs).checkpoints or [None] * len(kinds)
            for kind, cfg, path in zip(kinds, cfgs, checkpoints, strict=True):
                if path is None:
                    stream = SyntheticStream(self.model, self.cfg.batch_size, seed)  # each starts from the same samples; training follows on them
                sae = self._start(known_kinds[kind], seed, stream, path)
                sae.provenance = {"baseline": kind} if kind in BASELINE_KINDS else {}
                checkpoint = None if path is None else read_checkpoint(path, with_stream=not runs)
                saes.append(sae)
                runs.append(Run(sae, cfg, loggers=() if runs else loggers, checkpoint=checkpoint))
            train(runs, stream)
            for sae, cfg, run in zip(saes, cfgs, runs, strict=True):
                if run.error is None:
                    self._keep(sae, Path(cfg.exp_result_path))
        for run in runs:
            if run.error is not None:
                raise run.error

    def _start(self, kind: Kind, seed: int, stream: SyntheticStream, checkpoint: Path | None) -> SparseAutoEncoder:
        """A dictionary as it starts, from the first samples, or as it was in a checkpoint."""
        if checkpoint is not None:
            return SparseAutoEncoder.from_pretrained(checkpoint, fold_activation_scale=False, device=str(self.model.device))
        return Initializer(RECIPE.replace(**kind.initializer)).initialize_sae_from_config(self.sae_config(kind), stream, seed=seed)

    def _keep(self, sae: SparseAutoEncoder, folder: Path) -> None:
        """Score a finished dictionary and save it with its scores."""
        scores = score(sae, self._held_out(), self.model.directions)
        sae.save_pretrained(folder, fold_activation_scale=True)
        write_json(folder / SCORES_FILE, scores)
        shutil.rmtree(folder / "checkpoints")

    def _held_out(self) -> SyntheticStream:
        n_batches = max(1, self.cfg.n_evaluation_samples // self.cfg.batch_size)
        return SyntheticStream(self.model, self.cfg.batch_size, EVALUATION_SEED, n_batches)

    def _check_folder(self) -> None:
        """The folder is of this benchmark: its settings stand in it, apart from the device."""
        path = self.folder / "benchmark.json"
        settings = self.cfg.model_dump(mode="json", exclude={"device"})
        before = _read(path)
        if before is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        elif before != settings:
            changed = next(name for name in settings if before.get(name) != settings[name])
            raise RunFolderError(f"{self.folder} holds a benchmark with another {changed}; choose another folder with --out, or remove it")


def _read(path: Path) -> dict[str, Any] | None:
    return read_json_object(path, RunFolderError) if path.is_file() else None


__all__ = ["BASELINE_KINDS", "EVALUATION_SEED", "KINDS", "PROBE_SEED", "Kind", "SyntheticBenchmark"]
