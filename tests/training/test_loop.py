"""Many runs on one stream: each becomes what it would have become alone, and they go on together."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes.config import TrainerConfig
from lm_saes.errors import DataError, RunFolderError
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training import checkpoint as checkpoint_module
from lm_saes.training.checkpoint import checkpoint_folders, load_weights, newest_checkpoint, read_checkpoint
from lm_saes.training.loggers import Logger
from lm_saes.training.loop import train
from lm_saes.training.resume import newest_moment
from lm_saes.training.run import Run
from lm_saes.training.run_folder import failure_of
from lm_saes.training.trainer import Trainer
from tests.training.synthetic import HOOK, SyntheticStream, make_dictionary

OTHER = "blocks.1.hook_resid_post"
MEMBERS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "topk": ({"act_fn": "topk"}, 16, {"auxk_coefficient": 0.1, "dead_threshold": 200}),
    "batchtopk, short": ({"act_fn": "batchtopk", "seed": 1}, 6, {"lr": 1e-3, "n_checkpoints": 3}),
    "relu, other hook": ({"act_fn": "relu", "hook": OTHER}, 16, {"sparsity_loss_type": "tanh", "target_l0": 6.0, "lr_warm_up_steps": 2}),
}


class TwoHooks(SyntheticStream):
    """A second hook point beside the first; counts what is drawn."""

    drawn = 0

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        self.drawn += 1
        return {**batch, OTHER: batch[HOOK].flip(-1) * 2}


def dictionary(act_fn: str, hook: str = HOOK, seed: int = 0) -> SparseDictionary:
    sae = make_dictionary(act_fn, seed=seed)
    if hook == HOOK:
        return sae
    other = SparseDictionary.from_config(sae.cfg.replace(hook_point_in=hook, hook_point_out=hook, dataset_average_activation_norm=None))
    other.load_state_dict(sae.state_dict())
    other.set_dataset_average_activation_norm({hook: 2 * SyntheticStream().mean_norm()})
    return other


@pytest.fixture
def config(trainer_config):
    def make(name: str, folder: str) -> TrainerConfig:
        _, steps, options = MEMBERS[name]
        return trainer_config(
            steps, f"{folder}/{name}", **{"n_checkpoints": 2, "keep_checkpoints": 9, "log_frequency": 5, "dead_threshold": 1000, **options}
        )

    return make


def together(
    configs: dict[str, TrainerConfig], stream: Any, folders: list[Path] | None = None, loggers: list[Logger] | None = None
) -> dict[str, Run]:
    runs = {}
    for index, (name, cfg) in enumerate(configs.items()):
        sae = dictionary(**MEMBERS[name][0])
        checkpoint = None
        if folders is not None:
            load_weights(sae, folders[index])
            checkpoint = read_checkpoint(folders[index])
        runs[name] = Run(sae, cfg, checkpoint=checkpoint, loggers=loggers or [])
    train(list(runs.values()), stream)
    return runs


def metrics(cfg: TrainerConfig) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (Path(cfg.exp_result_path) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def assert_same(one: TrainerConfig, other: TrainerConfig, step: int) -> None:
    assert metrics(one) == metrics(other)
    folders = [Path(cfg.exp_result_path) / "checkpoints" / f"step_{step}" for cfg in (one, other)]
    for name in ("sae_weights.safetensors", "optimizer.safetensors", "stream/tensors.safetensors"):
        a, b = (load_file(folder / name) for folder in folders)
        assert a.keys() == b.keys()
        own = [key for key in a if not key.startswith("random/")]  # the rest is the process's generators, from which training draws nothing
        assert all(torch.equal(a[key], b[key]) for key in own), name


@pytest.fixture
def alone(config) -> dict[str, TrainerConfig]:
    """Each member trained alone, on a stream of its own."""
    configs = {name: config(name, "alone") for name in MEMBERS}
    for name, cfg in configs.items():
        Trainer(cfg).fit(dictionary(**MEMBERS[name][0]), TwoHooks())
    return configs


def test_each_becomes_what_it_would_have_become_alone(alone, config):
    configs, stream = {name: config(name, "together") for name in MEMBERS}, TwoHooks()
    runs = together(configs, stream)
    assert stream.drawn == 16, "the stream is read once"
    for name, cfg in configs.items():
        assert_same(alone[name], cfg, MEMBERS[name][1])
        assert runs[name].finished
        assert runs[name].error is None
        assert not runs[name].sae.training


def test_checkpoints_are_written_together_and_share_the_streams_state(config):
    configs = {name: config(name, "together") for name in MEMBERS}
    together(configs, TwoHooks())
    steps = {name: set(checkpoint_folders(cfg.exp_result_path)) for name, cfg in configs.items()}
    planned = {4, 16}  # of those with 16 steps; the short one has three in 6 steps
    assert steps["topk"] == steps["relu, other hook"] == planned | {2, 3, 6}
    assert steps["batchtopk, short"] == {2, 3, 4, 6}
    files = [Path(cfg.exp_result_path) / "checkpoints/step_4/stream/tensors.safetensors" for cfg in configs.values()]
    assert len({os.stat(file).st_ino for file in files}) == 1
    shutil.rmtree(configs["topk"].exp_result_path)
    checkpoint = read_checkpoint(Path(configs["batchtopk, short"].exp_result_path) / "checkpoints/step_4")
    assert checkpoint.stream is not None
    assert checkpoint.stream["position"] == 4


def test_where_the_file_system_has_no_links_the_streams_state_is_copied(config, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(checkpoint_module.os, "link", refused)
    configs = {name: config(name, "together") for name in MEMBERS}
    together(configs, TwoHooks())
    for cfg in configs.values():
        checkpoint = read_checkpoint(Path(cfg.exp_result_path) / "checkpoints/step_4")
        assert checkpoint.stream is not None
        assert checkpoint.stream["nested"]["marker"].tolist() == [4]


class StopAt(Logger):
    """Sends a signal while the first run is in step `at`."""

    def __init__(self, at: int) -> None:
        self.at, self.messages = at, []

    def progress(self, step: int) -> None:
        if step == self.at:
            self.at = -1
            os.kill(os.getpid(), signal.SIGINT)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize("at", [5, 9], ids=["while all run", "after one has ended"])
def test_interrupted_they_all_finish_the_step_and_go_on_together(alone, config, at):
    configs, stop = {name: config(name, "together") for name in MEMBERS}, StopAt(at)
    with pytest.raises(KeyboardInterrupt):
        together(configs, TwoHooks(), loggers=[stop])
    folders = newest_moment(list(configs.values())).checkpoints
    assert folders is not None
    assert [folder.name for folder in folders] == [f"step_{min(at, steps)}" for _, steps, _ in MEMBERS.values()]
    assert sum("can be resumed" in text for text in stop.messages) == (3 if at == 5 else 2)
    together(configs, TwoHooks(), folders)
    for name, cfg in configs.items():
        assert_same(alone[name], cfg, MEMBERS[name][1])


def test_a_member_goes_on_alone_too(alone, config):
    configs = {name: config(name, "together") for name in MEMBERS}
    with pytest.raises(KeyboardInterrupt):
        together(configs, TwoHooks(), loggers=[StopAt(9)])
    cfg = configs["relu, other hook"]
    Trainer(cfg, resume=True).fit(dictionary(**MEMBERS["relu, other hook"][0]), TwoHooks())
    assert_same(alone["relu, other hook"], cfg, 16)


def test_killed_between_two_checkpoints_of_a_moment_they_go_on_from_the_one_before(alone, config):
    configs = {name: config(name, "together") for name in MEMBERS}
    with pytest.raises(KeyboardInterrupt):
        together(configs, TwoHooks(), loggers=[StopAt(9)])
    last = Path(configs["relu, other hook"].exp_result_path) / "checkpoints/step_9"
    (last / "optimizer.safetensors").write_bytes(b"")
    folders = newest_moment(list(configs.values())).checkpoints
    assert folders is not None
    assert [folder.name for folder in folders] == ["step_6"] * 3
    together(configs, TwoHooks(), folders)
    for name, cfg in configs.items():
        assert_same(alone[name], cfg, MEMBERS[name][1])


def test_no_moment_in_common(config):
    configs = {name: config(name, "together") for name in MEMBERS}
    together(configs, TwoHooks())
    cfgs = list(configs.values())
    for path in checkpoint_folders(cfgs[2].exp_result_path).values():
        shutil.rmtree(path)
    with pytest.raises(RunFolderError, match=r"relu, other hook lacks some that others have"):
        newest_moment(cfgs)
    for cfg in cfgs[:2]:
        for step, path in checkpoint_folders(cfg.exp_result_path).items():
            if step != 2:
                shutil.rmtree(path)
    assert newest_moment(cfgs).checkpoints is None, "killed while the first was written"


def test_one_that_was_made_longer_is_not_at_its_end(config):
    configs = {name: config(name, "together") for name in MEMBERS}
    together(configs, TwoHooks())
    cfgs = list(configs.values())
    assert [folder.name for folder in newest_moment(cfgs).checkpoints or []] == ["step_16", "step_6", "step_16"]
    cfgs[1] = cfgs[1].replace(total_training_tokens=64 * 10)
    assert [folder.name for folder in newest_moment(cfgs).checkpoints or []] == ["step_6"] * 3


def test_one_that_meets_nan_stops_and_the_others_go_on(alone, config):
    configs, stream, messages = {name: config(name, "together") for name in MEMBERS}, TwoHooks(), StopAt(-1)
    runs = {name: Run(dictionary(**MEMBERS[name][0]), cfg, loggers=[messages]) for name, cfg in configs.items()}
    calls = 0

    def broken(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return gradient * (float("nan") if calls == 4 else 1.0)

    runs["topk"].sae.W_D.register_hook(broken)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert train(list(runs.values()), stream) is False
    assert "step 4: NaN or infinity in the gradient of W_D" in str(runs["topk"].error)
    assert [text for text in messages.messages if text.startswith("stopped")] == [f"stopped: {runs['topk'].error}"]
    assert failure_of(configs["topk"].exp_result_path) == str(runs["topk"].error)
    assert runs["topk"].cur_step == 3
    assert max(checkpoint_folders(configs["topk"].exp_result_path)) == 3
    for name in ("batchtopk, short", "relu, other hook"):
        assert failure_of(configs[name].exp_result_path) is None
        assert_same(alone[name], configs[name], MEMBERS[name][1])


def test_a_run_that_goes_on_forgets_what_stopped_it(config):
    class Broken(TwoHooks):
        def __next__(self):
            batch = super().__next__()
            return {**batch, HOOK: batch[HOOK] * float("nan")} if self.position == 10 else batch

    cfg = config("topk", "one")
    trainer = Trainer(cfg)
    with pytest.raises(Exception, match="the activations at"):
        trainer.fit(make_dictionary(), Broken())
    assert failure_of(cfg.exp_result_path) is not None
    Trainer(cfg, resume=True).fit(make_dictionary(), TwoHooks())
    assert failure_of(cfg.exp_result_path) is None


def test_a_stream_that_ends_early_ends_all(config):
    configs = {name: config(name, "together") for name in MEMBERS}
    messages = StopAt(-1)
    runs = [Run(dictionary(**MEMBERS[name][0]), cfg, loggers=[messages]) for name, cfg in configs.items()]
    assert train(runs, TwoHooks(n_batches=8)) is True
    assert [run.cur_step for run in runs] == [8, 6, 8]
    assert sum("the stream ended after step 8 of 16" in text for text in messages.messages) == 2
    newest = newest_checkpoint(configs["topk"].exp_result_path)
    assert newest is not None
    assert newest.name == "step_8"


def test_a_hook_point_that_the_stream_lacks_is_named(config):
    cfgs = [config(name, "together") for name in ("topk", "relu, other hook")]
    runs = [Run(dictionary("topk"), cfgs[0]), Run(dictionary("topk", OTHER), cfgs[1])]
    with pytest.raises(DataError, match=OTHER):
        train(runs, SyntheticStream())


def test_the_rate_of_the_steps_alone_leaves_out_the_stream(config):
    import time

    class Slow(TwoHooks):
        def __next__(self):
            time.sleep(0.02)
            return super().__next__()

    cfg = config("topk", "slow")
    Trainer(cfg).fit(make_dictionary(), Slow())
    last = json.loads((Path(cfg.exp_result_path) / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["time/step_tokens_per_second"] > 1.2 * last["time/tokens_per_second"] > 0
