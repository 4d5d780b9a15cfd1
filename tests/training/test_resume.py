"""A run that was stopped and resumed equals the one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from lm_saes.activations.prefetch import Prefetch
from lm_saes.activations.shuffle import ShuffleBuffer
from lm_saes.config import TrainerConfig
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training import background as background_module
from lm_saes.training import loop as loop_module
from lm_saes.training.checkpoint import newest_checkpoint, read_checkpoint, resumable_folders
from lm_saes.training.loggers import Logger
from lm_saes.training.trainer import Trainer
from tests.training.synthetic import HOOK, SyntheticStream, make_dictionary

STEPS = 24

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "relu, power": ("relu", {}, {"sparsity_loss_type": "power", "l1_coefficient": 0.1}),
    "relu, target_l0": ("relu", {}, {"sparsity_loss_type": "tanh", "l1_coefficient": 0.1, "target_l0": 6.0, "lr_warm_up_steps": 2}),
    "jumprelu, target_l0": (
        "jumprelu",
        {},
        {"sparsity_loss_type": "tanh-quad", "lp_coefficient": 3e-6, "target_l0": 6.0, "lr_warm_up_steps": 2, "jumprelu_lr_factor": 3.0},
    ),
    "topk, AuxK": ("topk", {}, {"auxk_coefficient": 1 / 32, "dead_threshold": 200, "k_aux": 8}),
    "topk, annealed": ("topk", {}, {"initial_k": 0.5, "k_warmup_steps": 0.8, "k_schedule_type": "exponential"}),
    "topk, masked Adam": ("topk", {}, {"optimizer_class": "sparseadam", "lr_scheduler_name": "cosineannealingwarmup", "clip_grad_norm": 0.5}),
    "topk, micro-batches, bf16": ("topk", {}, {"gradient_accumulation_steps": 2, "amp_dtype": "bfloat16"}),
    "batchtopk, batch-wise": ("batchtopk", {"norm_activation": "batch-wise"}, {"feature_sampling_window": 5}),
}


def stream() -> SyntheticStream:
    return SyntheticStream(batch_size=64)


def evaluate(sae: SparseDictionary) -> dict[str, Any]:
    """An evaluation that draws from every global generator."""
    return {
        "drawn/torch": torch.rand(()).item(),
        "drawn/numpy": float(numpy.random.rand()),
        "drawn/python": random.random(),
        "drawn/name": "no number",
    }


class Killed(Exception):
    pass


class Stopping:
    """A stream that sends a signal to its own process while batch `at` is drawn."""

    def __init__(self, inner: SyntheticStream, at: int, number: signal.Signals = signal.SIGINT) -> None:
        self.inner, self.at, self.number = inner, at, number
        self.state_dict = inner.state_dict

    def __iter__(self) -> Stopping:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.inner.position == self.at:
            os.kill(os.getpid(), self.number)
        return next(self.inner)


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def assert_same_run(one: str, other: str, own_random_states: bool = True, streams: bool = True) -> None:
    assert metrics(one) == metrics(other)
    assert len(metrics(one)) > 3
    for name in ("sae_weights.safetensors", "optimizer.safetensors", *(["stream/tensors.safetensors"] if streams else [])):
        a, b = (load_file(Path(folder) / "checkpoints" / f"step_{STEPS}" / name) for folder in (one, other))
        assert a.keys() == b.keys()
        assert a
        assert all(torch.equal(a[key], b[key]) for key in a), name
    states = [json.loads((Path(folder) / "checkpoints" / f"step_{STEPS}" / "state.json").read_text()) for folder in (one, other)]
    assert not own_random_states or states[0]["random"] == states[1]["random"]


class NumpyStream(SyntheticStream):
    """Keeps its place as somebody does who draws batches with NumPy: what it gives as its state goes on with it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.place = numpy.random.default_rng(5), numpy.zeros(1, dtype=numpy.int64)

    def __next__(self) -> dict[str, Any]:
        self.place += 1
        batch = {HOOK: self.activations(int(self.generator.integers(10**6))), "tokens": torch.arange(64)}
        self.position = int(self.place[0])
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.bit_generator.state, "place": self.place, "share": numpy.float32(0.1)}

    def load_state_dict(self, state: Any) -> None:
        self.generator.bit_generator.state = state["generator"]
        self.place += state["place"]
        assert state["share"] == numpy.float32(0.1)


def test_a_stream_whose_state_is_made_by_numpy_goes_on(trainer_config):
    whole, cut = trainer_config(STEPS, "whole"), trainer_config(STEPS, "cut")
    Trainer(whole).fit(make_dictionary(), NumpyStream())
    with pytest.raises(KeyboardInterrupt):
        Trainer(cut).fit(make_dictionary(), Stopping(NumpyStream(), 13))
    Trainer(cut, resume=True).fit(make_dictionary(), NumpyStream())
    assert_same_run(whole.exp_result_path, cut.exp_result_path, own_random_states=False)


def test_a_state_that_cannot_be_saved_is_one_line(trainer_config, monkeypatch):
    monkeypatch.setattr(SyntheticStream, "state_dict", lambda _: {"seen": {1, 2}})
    cfg = trainer_config(STEPS)
    with pytest.raises(RunFolderError, match=r"state_dict\(\)\['seen'\] is of type set"):
        Trainer(cfg).fit(make_dictionary(), stream())
    assert not list(Path(cfg.exp_result_path).glob("checkpoints/*"))


def test_settings_that_cannot_be_saved_are_refused_at_once(trainer_config):
    with pytest.raises(ConfigError, match=r"settings must be JSON values: .*PosixPath"):
        Trainer(trainer_config(STEPS), settings={"data": Path("x")})


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted(variant, trainer_config):
    act_fn, shape, options = VARIANTS[variant]
    options = {"log_frequency": 5, "eval_frequency": 4, "n_checkpoints": 1, "dead_threshold": 1000, **options}

    def seed() -> None:
        torch.manual_seed(1)
        numpy.random.seed(1)
        random.seed(1)

    whole = trainer_config(STEPS, "whole", **options)
    sae = make_dictionary(act_fn, **shape)
    seed()
    assert Trainer(whole).fit(sae, stream(), evaluate) is None

    parts = trainer_config(STEPS, "parts", **options)
    first = make_dictionary(act_fn, **shape)
    seed()
    with pytest.raises(KeyboardInterrupt):
        Trainer(parts).fit(first, Stopping(stream(), at=12), evaluate)
    assert newest_checkpoint(parts.exp_result_path) == Path(parts.exp_result_path) / "checkpoints" / "step_13"
    second = make_dictionary(act_fn, seed=7, **shape)
    torch.manual_seed(99)
    assert Trainer(parts, resume=True).fit(second, stream(), evaluate) is None
    assert_same_run(whole.exp_result_path, parts.exp_result_path)
    assert not second.training


class Through:
    """Batches of another stream, that end like a process after some."""

    def __init__(self, inner: Any, at: int | None = None) -> None:
        self.inner, self.left = inner, at
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def __iter__(self) -> Through:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.left == 0:
            self.inner.close()
            raise Killed
        self.left = None if self.left is None else self.left - 1
        return next(self.inner)


@pytest.mark.parametrize("repeatable", [True, False], ids=["read again", "saved"])
@pytest.mark.parametrize("depth", [0, 2], ids=["", "read ahead"])
@pytest.mark.parametrize("variant", ["topk, AuxK", "batchtopk, batch-wise", "jumprelu, target_l0", "relu, target_l0"])
def test_killed_again_and_again_with_a_shuffle_buffer(variant, depth, repeatable, trainer_config):
    """The buffer saved or read again, the thread ahead of training: killed at steps 7, 15 and 16 of 24, it equals what was never killed."""
    act_fn, shape, options = VARIANTS[variant]
    options = {"dead_threshold": 1000, **options, "log_frequency": 1, "n_checkpoints": 8, "check_point_save_mode": "linear"}

    def shuffled() -> Prefetch:
        return Prefetch(ShuffleBuffer(SyntheticStream(batch_size=50), 64, 500, repeatable=repeatable), depth)

    whole, parts = trainer_config(STEPS, "whole", **options), trainer_config(STEPS, "parts", **options)
    Trainer(whole).fit(make_dictionary(act_fn, **shape), Through(shuffled()))
    for batches in (7, 9, 4):
        with pytest.raises(Killed):
            Trainer(parts, resume=True).fit(
                make_dictionary(act_fn, seed=batches, **shape) if batches < 7 else make_dictionary(act_fn, **shape), Through(shuffled(), batches)
            )
    assert any(("origins" in key) == repeatable for key in keys_of_the_stream(parts) if "origins" in key or "stored" in key)
    Trainer(parts, resume=True).fit(make_dictionary(act_fn, seed=9, **shape), Through(shuffled()))
    # how far a thread has read ahead is a matter of time
    assert_same_run(whole.exp_result_path, parts.exp_result_path, own_random_states=False, streams=depth == 0)


def keys_of_the_stream(cfg: TrainerConfig) -> list[str]:
    newest = newest_checkpoint(cfg.exp_result_path)
    assert newest is not None
    return list(read_checkpoint(newest).stream or {})


def test_killed_without_warning_goes_on_from_the_last_checkpoint(trainer_config):
    options = {"log_frequency": 3, "n_checkpoints": 4, "check_point_save_mode": "linear"}
    whole, parts = trainer_config(STEPS, "whole", **options), trainer_config(STEPS, "parts", **options)
    Trainer(whole).fit(make_dictionary(), stream())

    with pytest.raises(Killed):
        Trainer(parts).fit(make_dictionary(), Dying(at=16))
    assert metrics(parts.exp_result_path)[-1]["step"] == 15
    sae = make_dictionary(seed=3)
    trainer = Trainer.from_checkpoint(sae, parts.exp_result_path)
    assert trainer.cur_step == 12
    assert trainer.cfg == parts
    trainer.fit(sae, stream())
    assert_same_run(whole.exp_result_path, parts.exp_result_path)


def test_sigterm_does_as_ctrl_c(trainer_config):
    cfg = trainer_config(STEPS, n_checkpoints=0)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        Trainer(cfg).fit(make_dictionary(), Stopping(stream(), at=5, number=signal.SIGTERM))
    newest = newest_checkpoint(cfg.exp_result_path)
    assert newest is not None
    assert newest.name == "step_6"
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_resuming_a_finished_run_changes_nothing(trainer_config):
    cfg = trainer_config(5)
    sae = make_dictionary()
    Trainer(cfg).fit(sae, stream())
    before, lines = {name: value.clone() for name, value in sae.state_dict().items()}, metrics(cfg.exp_result_path)
    assert Trainer(cfg, resume=True).fit(other := make_dictionary(seed=5), stream()) is None
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())
    assert metrics(cfg.exp_result_path) == lines


def test_a_run_can_be_made_longer(trainer_config):
    cfg = trainer_config(5)
    Trainer(cfg).fit(make_dictionary(), stream())
    longer = cfg.replace(total_training_tokens=64 * 8)
    trainer = Trainer(longer, resume=True, allow_changes=["total_training_tokens"])
    trainer.fit(make_dictionary(), stream())
    assert (trainer.cur_step, trainer.total_steps, trainer.cur_tokens) == (8, 8, 64 * 8)


def test_a_stream_without_memory_cannot_be_resumed(trainer_config):
    cfg = trainer_config(5)
    batches = [next(stream()) for _ in range(5)]
    Trainer(cfg).fit(make_dictionary(), batches)
    longer = cfg.replace(total_training_tokens=64 * 8)
    with pytest.raises(RunFolderError, match="remember its place"):
        Trainer(longer, resume=True, allow_changes=["total_training_tokens"]).fit(make_dictionary(), batches)


def test_another_dictionary_is_refused(trainer_config):
    cfg = trainer_config(3)
    Trainer(cfg).fit(make_dictionary("topk"), stream())
    for options, difference in (({"act_fn": "relu"}, "act_fn"), ({"expansion_factor": 2}, "d_sae")):
        with pytest.raises(RunFolderError, match=difference):
            Trainer(cfg, resume=True).fit(make_dictionary(**{"act_fn": "topk", **options}), stream())


def test_a_new_run_from_a_snapshot_takes_its_weights_and_nothing_else(trainer_config):
    cfg = trainer_config(5, "old")
    Trainer(cfg).fit(trained := make_dictionary(), stream())
    new = trainer_config(1, "new", from_pretrained_path=cfg.exp_result_path, lr=1e-30)
    trainer = Trainer(new)
    trainer.fit(sae := make_dictionary(seed=5), stream())
    assert trainer.cur_step == 1
    assert all(torch.equal(value, sae.state_dict()[name]) for name, value in trained.state_dict().items())


def test_a_checkpoint_loads_folded(trainer_config):
    cfg = trainer_config(3)
    Trainer(cfg).fit(sae := make_dictionary(), stream())
    newest = newest_checkpoint(cfg.exp_result_path)
    assert newest is not None
    loaded = SparseDictionary.from_pretrained(newest)
    assert loaded.cfg.norm_activation == "inference"
    batch = next(stream())
    torch.testing.assert_close(loaded.reconstruct(batch), sae.reconstruct({HOOK: batch[HOOK]}), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ damage, changes, one writer


class Said(Logger):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


class Dying(SyntheticStream):
    """A stream that ends like a process: nothing is finished, nothing is saved."""

    def __init__(self, at: int) -> None:
        super().__init__(batch_size=64)
        self.at = at

    def __next__(self) -> dict[str, Any]:
        if self.position == self.at:
            raise Killed
        return super().__next__()


@pytest.mark.parametrize("damaged", ["optimizer.safetensors", "sae_weights.safetensors", "stream/tensors.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["a bit", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damaged, how, trainer_config):
    options = {"log_frequency": 3, "n_checkpoints": 6, "check_point_save_mode": "linear"}
    whole, parts = trainer_config(STEPS, "whole", **options), trainer_config(STEPS, "parts", **options)
    Trainer(whole).fit(make_dictionary(), stream())
    with pytest.raises(Killed):
        Trainer(parts).fit(make_dictionary(), Dying(at=18))
    path = Path(parts.exp_result_path) / "checkpoints" / "step_16" / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "a bit" else content[: len(content) // 2])
    if how == "gone":
        path.unlink()
    said = Said()
    Trainer(parts, resume=True, loggers=[said]).fit(make_dictionary(seed=4), stream())
    assert sum("step_16 is damaged" in text and damaged in text and "going on from step 12" in text for text in said.messages) == 1
    assert sum(text.startswith("resumed after step 12") for text in said.messages) == 1
    assert_same_run(whole.exp_result_path, parts.exp_result_path)


def test_where_all_are_damaged_it_says_so(trainer_config):
    cfg = trainer_config(STEPS, n_checkpoints=3, check_point_save_mode="linear")
    Trainer(cfg).fit(make_dictionary(), stream())
    for path in (Path(cfg.exp_result_path) / "checkpoints").glob("step_*/state.json"):
        path.write_text("{")
    with pytest.raises(RunFolderError, match=r"no whole checkpoint to resume from: .*step_24 is damaged \(state.json"):
        Trainer(cfg, resume=True).fit(make_dictionary(), stream())


def test_killed_before_the_first_checkpoint_it_starts_anew_and_says_so(trainer_config):
    options = {"log_frequency": 1, "n_checkpoints": 1}
    whole, parts = trainer_config(STEPS, "whole", **options), trainer_config(STEPS, "parts", **options)
    Trainer(whole).fit(make_dictionary(), stream())
    with pytest.raises(Killed):
        Trainer(parts).fit(make_dictionary(), Dying(at=10))
    with pytest.raises(RunFolderError, match=r"holds the metrics\.jsonl of an earlier run"):
        Trainer(parts).fit(make_dictionary(), stream())
    said = Said()
    Trainer(parts, resume=True, loggers=[said]).fit(make_dictionary(), stream())
    assert any("holds no checkpoint yet: the run starts from its beginning" in text for text in said.messages)
    assert metrics(whole.exp_result_path) == metrics(parts.exp_result_path)


def test_a_changed_configuration_is_refused_unless_the_change_is_allowed(trainer_config):
    cfg = trainer_config(STEPS, n_checkpoints=6, check_point_save_mode="linear")
    with pytest.raises(Killed):
        Trainer(cfg).fit(make_dictionary(), Dying(at=10))
    changed = cfg.replace(lr=1e-4, clip_grad_norm=1.0)
    for allow in ([], ["lr"], ["trainer.lr"]):
        wanted = r"was begun with trainer\.(lr = 0\.0004, got 0\.0001|clip_grad_norm = 0\.0, got 1\.0); .* --allow-change trainer\.\w+"
        with pytest.raises(ConfigError, match=wanted):
            Trainer(changed, resume=True, allow_changes=allow).fit(make_dictionary(), stream())
    with pytest.raises(ConfigError, match="lr_warm_up_steps = the default, got 5000"):  # obeyed if set, clamped if not
        Trainer(cfg.replace(lr_warm_up_steps=5000), resume=True).fit(make_dictionary(), stream())
    said = Said()
    Trainer(changed, resume=True, allow_changes=["lr", "clip_grad_norm"], loggers=[said]).fit(make_dictionary(), stream())
    assert "trainer.lr = 0.0001 from here on; it was 0.0004" in said.messages
    with pytest.raises(ConfigError, match=r"trainer\.seed cannot change when a run goes on"):
        Trainer(changed, resume=True, allow_changes=["seed"])
    with pytest.raises(ConfigError, match=r"there is no trainer\.clip_grad that could change; did you mean 'clip_grad_norm'"):
        Trainer(changed, resume=True, allow_changes=["clip_grad"])


def test_where_and_how_often_it_is_written_may_change_freely(trainer_config, tmp_path):
    cfg = trainer_config(STEPS, n_checkpoints=6, check_point_save_mode="linear")
    with pytest.raises(Killed):
        Trainer(cfg).fit(make_dictionary(), Dying(at=10))
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = cfg.replace(exp_result_path=str(tmp_path / "moved"), n_checkpoints=2, keep_checkpoints=1, checkpoint_minutes=None)
    trainer = Trainer(moved, resume=True)
    trainer.fit(make_dictionary(), stream())
    assert trainer.cur_step == STEPS


def test_after_an_allowed_change_nothing_of_the_former_future_is_left(trainer_config):
    cfg = trainer_config(STEPS, n_checkpoints=6, check_point_save_mode="linear", keep_checkpoints=9)
    Trainer(cfg).fit(make_dictionary(), stream())
    folder = Path(cfg.exp_result_path) / "checkpoints"
    for step in (16, 20, 24):
        (folder / f"step_{step}" / "state.json").write_bytes(b"")
    with pytest.raises(Killed):
        Trainer(cfg.replace(lr=1e-4), resume=True, allow_changes=["lr"]).fit(make_dictionary(), Dying(at=14))
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_12", "step_4", "step_8"]


def test_two_trainers_cannot_write_one_run(trainer_config):
    cfg, refused = trainer_config(STEPS), []

    class Second(SyntheticStream):
        def __next__(self) -> dict[str, Any]:
            if self.position == 5:
                with pytest.raises(RunFolderError, match=f"is being written by process {os.getpid()} on") as caught:
                    Trainer(cfg, resume=True).fit(make_dictionary(), stream())
                refused.append(caught.value)
            return super().__next__()

    Trainer(cfg).fit(make_dictionary(), Second(batch_size=64))
    assert len(refused) == 1
    Trainer(cfg, resume=True).fit(make_dictionary(), stream())


def test_checkpoints_come_by_the_clock_too(trainer_config, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(SyntheticStream):
        def __next__(self) -> dict[str, Any]:
            clock[0] += 60 * 4
            return super().__next__()

    for minutes, steps in ((10.0, {4, 7, 10}), (None, set())):
        cfg = trainer_config(11, f"{minutes}", n_checkpoints=1, keep_checkpoints=9, checkpoint_minutes=minutes)
        monkeypatch.setattr(background_module.BackgroundWriter, "busy", False)
        Trainer(cfg).fit(make_dictionary(), Slow(batch_size=64))
        assert set(resumable_folders(cfg.exp_result_path)) == {11} | steps


def test_going_on_from_an_older_checkpoint_nothing_of_the_former_future_is_left(trainer_config):
    cfg = trainer_config(STEPS, n_checkpoints=6, check_point_save_mode="linear", keep_checkpoints=2)
    Trainer(cfg.replace(keep_checkpoints=9)).fit(make_dictionary(), stream())
    folder = Path(cfg.exp_result_path) / "checkpoints"
    sae = make_dictionary()
    with pytest.raises(Killed):
        Trainer.from_checkpoint(sae, folder / "step_8", cfg.replace(lr=1e-4)).fit(sae, Dying(at=14))
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_12", "step_4", "step_8"]
    assert Trainer.from_checkpoint(sae, cfg.exp_result_path).cur_step == 12, "the new one is whole"


def test_from_checkpoint_finds_damage(trainer_config):
    cfg = trainer_config(STEPS, n_checkpoints=2)
    Trainer(cfg).fit(make_dictionary(), stream())
    path = Path(cfg.exp_result_path) / "checkpoints" / f"step_{STEPS}" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"step_24 is damaged \(optimizer\.safetensors is not what was written\); go on from another"):
        Trainer.from_checkpoint(make_dictionary(), cfg.exp_result_path)


def test_metrics_that_are_no_text_are_cut_off(trainer_config):
    cfg = trainer_config(STEPS, n_checkpoints=6, check_point_save_mode="linear", log_frequency=1)
    with pytest.raises(Killed):
        Trainer(cfg).fit(make_dictionary(), Dying(at=10))
    with (Path(cfg.exp_result_path) / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\0\0")  # as file systems leave it when the power fails
    Trainer(cfg, resume=True).fit(make_dictionary(), stream())
    assert [line["step"] for line in metrics(cfg.exp_result_path)] == list(range(1, STEPS + 1))
