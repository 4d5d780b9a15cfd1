"""What is done about a run that does not fit: batches cut where that changes nothing, else one change that would help."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from lm_saes import fitting, memory
from lm_saes.config import TrainSAESettings
from lm_saes.errors import ConfigError
from lm_saes.lm.language_model import LanguageModel
from lm_saes.runners import train_sae
from lm_saes.training.loggers import Logger
from tests.lm.tiny_models import save_tiny
from tests.test_memory import HOOK, changed


class StopAt(Logger):
    """Keeps what is said, and interrupts after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step, self.lines = step, list[str]()

    def progress(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def settings(tmp_path: Path) -> TrainSAESettings:
    """Whose largest phase is the step: dense codes [8192, 2048]."""
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some words that a tiny model reads. " * 12000)
    table = {
        "sae_name": "small", "device_type": "cpu", "eval": False,
        "sae": {"hook_point_in": HOOK, "d_model": 32, "expansion_factor": 64, "act_fn": "relu"},
        "trainer": {"total_training_tokens": 3 * 8192, "exp_result_path": str(tmp_path / "run"), "n_checkpoints": 1,
                    "sparsity_loss_type": "power", "lr": 1e-3},
        "initializer": {"n_batches": 1},
        "model": {"model_name": str(tmp_path / "model")}, "datasets": {"text": {"dataset_name_or_path": str(tmp_path / "text.txt")}},
        "activation_factory": {"sources": [{"name": "text"}], "hook_points": [HOOK], "batch_size": 8192, "buffer_size": 8192,
                               "context_size": 32, "model_batch_size": 4},
    }  # fmt: skip
    return TrainSAESettings.model_validate(table)


@pytest.fixture(autouse=True)
def _python_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_saes.memory.resident_memory", lambda: 300 * 2**20)


def cut(settings: TrainSAESettings, n: int) -> TrainSAESettings:
    return changed(settings, trainer={"gradient_accumulation_steps": n})


def test_batches_are_cut_into_as_few_pieces_as_it_takes(settings: TrainSAESettings) -> None:
    room = memory.peak([cut(settings, 4)], None)
    assert memory.peak([cut(settings, 2)], None) > room
    (fitted,), line = fitting.cut_to_fit([settings], None, room)
    assert fitted.trainer.gradient_accumulation_steps == 4
    assert line is not None
    assert "cut into 4 micro-batches" in line
    assert fitting.cut_to_fit([settings], None, memory.peak([settings], None)) == ([settings], None)


@pytest.mark.parametrize(
    "fields",
    [
        {"sae": {"act_fn": "batchtopk", "top_k": 32}, "trainer": {"sparsity_loss_type": None}},
        {"trainer": {"sparsity_loss_type": "tanh-quad"}},
        {"trainer": {"auxk_coefficient": 0.03}},
        {"trainer": {"gradient_accumulation_steps": 1}},  # set, hence obeyed
    ],
    ids=lambda fields: json.dumps(fields),
)
def test_batches_are_left_whole_where_cutting_would_change_something(settings: TrainSAESettings, fields: dict[str, dict[str, object]]) -> None:
    settings = changed(settings, **fields)
    assert fitting.cut_to_fit([settings], None, memory.peak([settings], None) - 1) == ([settings], None)


def test_of_runs_together_those_are_cut_that_may_be(settings: TrainSAESettings) -> None:
    whole = changed(settings, sae={"expansion_factor": 1}, trainer={"auxk_coefficient": 0.03})
    members, line = fitting.cut_to_fit([settings, whole], None, memory.peak([settings, whole], None) - 1)
    assert [member.trainer.gradient_accumulation_steps for member in members] == [2, 1]
    assert line is not None


def test_the_remedy_is_the_smallest_change_that_is_enough(settings: TrainSAESettings) -> None:
    halved = memory.peak([cut(settings, 2)], None)
    assert fitting.remedy(settings, None, halved) == "set trainer.gradient_accumulation_steps = 2"
    whole = changed(settings, trainer={"auxk_coefficient": 0.03})  # may not be cut
    for room in (memory.peak([whole], None) - 1, memory.peak([changed(whole, activation_factory={"batch_size": 256})], None)):
        change = fitting.remedy(whole, None, room)
        assert change is not None
        assert change.startswith("set activation_factory.batch_size = ")
        assert memory.peak([changed(whole, activation_factory={"batch_size": int(change.split()[-1])})], None) <= room
    assert fitting.remedy(settings, None, 1) is None


def test_training_cuts_its_batches_and_goes_on_so(settings: TrainSAESettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of a run that was asked to cut; also where there is room again when it is resumed."""
    asked = changed(settings, trainer={"gradient_accumulation_steps": 2, "exp_result_path": str(tmp_path / "asked")})
    wanted = train_sae(asked).state_dict()
    settings = changed(settings, trainer={"n_checkpoints": 2})
    halved, whole = (memory.phases(of, None)["training"][memory.STEP] for of in (cut(settings, 2), settings))

    models: list[LanguageModel | None] = []

    def noticed(settings: TrainSAESettings, model: LanguageModel | None) -> torch.device:
        models.append(model)
        return memory.device_of(settings, model)

    monkeypatch.setattr("lm_saes.estimate_sweep.device_of", noticed)
    monkeypatch.setattr("lm_saes.estimate_sweep.available_memory", lambda _: memory.peak([cut(settings, 2)], models[-1]) + (whole - halved) // 2)
    stop = StopAt(2)
    with pytest.raises(KeyboardInterrupt):
        train_sae(settings, loggers=[stop])
    assert [line for line in stop.lines if "cut into 2 micro-batches" in line]
    monkeypatch.setattr("lm_saes.estimate_sweep.available_memory", fitting.available_memory)
    assert memory.peak([settings], None) < fitting.available_memory(torch.device("cpu"))
    gone_on = train_sae(settings, resume=True).state_dict()
    assert gone_on.keys() == wanted.keys()
    assert all(torch.equal(gone_on[name], wanted[name]) for name in wanted)


def test_a_run_that_goes_on_is_refused_where_it_does_not_fit_any_more(settings: TrainSAESettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches were whole so far; others would round differently."""
    with pytest.raises(KeyboardInterrupt):
        train_sae(settings, loggers=[StopAt(1)])
    room = memory.peak([settings], None)
    monkeypatch.setattr("lm_saes.estimate.available_memory", lambda _: int(room / 1.3))
    monkeypatch.setattr("lm_saes.estimate_sweep.available_memory", lambda _: int(room / 1.3))
    with pytest.raises(ConfigError, match=r"needs about .*; set trainer.gradient_accumulation_steps = \d+$"):
        train_sae(settings, resume=True)


def test_what_cannot_fit_is_refused_in_one_line(settings: TrainSAESettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = changed(settings, sae={"act_fn": "batchtopk", "top_k": 32}, trainer={"sparsity_loss_type": None})
    room = memory.peak([changed(settings, activation_factory={"batch_size": 2048})], None)
    monkeypatch.setattr("lm_saes.estimate.available_memory", lambda _: room)
    monkeypatch.setattr("lm_saes.estimate_sweep.available_memory", lambda _: room)
    monkeypatch.setenv("LM_SAES_OPS", "reference")
    with pytest.raises(ConfigError, match=r"needs about .*; it does not fit in memory: .*; set activation_factory.batch_size = \d+$"):
        train_sae(settings)
    assert not list((tmp_path / "run").glob("*"))


def groups(system: Path, of_this_process: str, tree: dict[str, tuple[str, int, int]]) -> list[int]:
    """What is left to a process of a system with these control groups: limit, use and inactive files of each."""
    (system / "proc/self").mkdir(parents=True)
    (system / "proc/self/cgroup").write_text(of_this_process)
    for name, (limit, used, files) in tree.items():
        folder = system / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        old = name.startswith("memory")
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if old else "memory.current")).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 500\ninactive_file {0 if old else files}\nactive_file 50\ntotal_inactive_file {files}\n")
    return list(fitting._left_to_groups(system))


def test_a_process_has_what_the_limits_of_its_groups_leave(tmp_path: Path) -> None:
    own = {"job/step": ("max", 10, 5), "job": ("1000", 700, 150), "another": ("1", 1, 0)}
    assert groups(tmp_path, "0::/job/step\n", own) == [450]  # the root has none of these files


def test_inside_a_container_the_root_is_its_own_group(tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/docker/of-the-host\n", {"": ("1000", 1100, 50)}) == [0]


def test_control_groups_of_the_older_kind(tmp_path: Path) -> None:
    own = {"memory/job": ("1000", 700, 150), "memory": (str(2**63 - 4096), 900, 0), "cpu/job": ("1", 1, 0)}
    assert groups(tmp_path, "5:cpu:/job\n4:hugetlb,memory:/job\n0::/\n", own) == [450, 2**63 - 4096 - 900]


def test_without_control_groups_there_are_no_limits(tmp_path: Path) -> None:
    assert list(fitting._left_to_groups(tmp_path)) == []


def test_a_system_without_limits_has_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As most desktops: it ended in a traceback."""
    monkeypatch.setattr(fitting, "_left_to_groups", lambda: iter(()))
    assert fitting.available_memory(torch.device("cpu")) > fitting.resident_memory()
    monkeypatch.setattr(fitting, "_left_to_groups", lambda: iter((1000, 0)))
    if Path("/proc/meminfo").exists():
        assert fitting.available_memory(torch.device("cpu")) < 2 * fitting.resident_memory()
