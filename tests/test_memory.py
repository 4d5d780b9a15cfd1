"""What is counted beside what a process really takes: the peak of training steps, and of a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm_saes import memory
from lm_saes.assembly import dictionary_config
from lm_saes.config import SAEConfig, TrainerConfig, TrainSAESettings
from lm_saes.ops import native
from tests.lm.tiny_models import save_tiny

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")

SHAPES = {"wide": (256, 4096, 32, 4096), "flat": (64, 16384, 16, 2048)}
"""D, F, k, N."""
DENSE = (128, 2048, 32, 1024)
"""Dense codes are kept small beside Python: how much the allocator adds to them is not the same from one process to the next."""
CASES = {
    **{f"{act_fn} {how}": (how, SHAPES["wide"], {"act_fn": act_fn}, {}) for act_fn in ("topk", "batchtopk") for how in ("screened", "native", "sparse")},
    "topk native flat": ("native", SHAPES["flat"], {"act_fn": "topk"}, {}),
    "batchtopk native flat": ("native", SHAPES["flat"], {"act_fn": "batchtopk"}, {}),
    "topk reference": ("reference", DENSE, {"act_fn": "topk"}, {}),
    "batchtopk reference": ("reference", DENSE, {"act_fn": "batchtopk"}, {}),
    "relu native": ("native", DENSE, {"act_fn": "relu"}, {"sparsity_loss_type": "power"}),
    "jumprelu native": ("native", DENSE, {"act_fn": "jumprelu"}, {"sparsity_loss_type": "tanh"}),
    "jumprelu sparse": ("sparse", DENSE, {"act_fn": "jumprelu"}, {"sparsity_loss_type": "tanh"}),
    "topk cut in four": ("native", SHAPES["wide"], {"act_fn": "topk"}, {"gradient_accumulation_steps": 4}),
    "topk GLU": ("native", SHAPES["wide"], {"act_fn": "topk", "use_glu_encoder": True}, {}),
}  # fmt: skip
"""Implementation of ops, shape, fields of the dictionary and of the trainer."""

# One process imports everything, and forks one for each case: what those have beyond it is the dictionary's and the step's.
CHILD = """
import json, os, sys, torch
from pathlib import Path
from lm_saes.config import SAEConfig, TrainerConfig
from lm_saes.models import SparseDictionary
from lm_saes.training.nonfinite import NonFiniteWatch
from lm_saes.training.schedules import resolve
from lm_saes.training.step import TrainingStep

def status(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))

def train(cfg, trainer, rows, steps):
    sae = SparseDictionary.from_config(SAEConfig.model_validate(cfg)).train()
    step = TrainingStep(sae, resolve(TrainerConfig.model_validate(trainer), 1000, rows, lambda line: None), 1000, NonFiniteWatch("."))
    batch = {"h": torch.randn(rows, cfg["d_model"]), "tokens": torch.zeros(rows, dtype=torch.long), "mask": torch.ones(rows, dtype=torch.bool)}
    for number in range(steps):
        step(batch, number, measure=True)

for name, implementation, cfg, trainer, rows in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    os.environ["LM_SAES_OPS"] = implementation
    torch.set_num_threads(2)
    train({**cfg, "d_model": 16, "top_k": 2}, trainer, 64, 2)  # libraries make their preparations
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    train(cfg, trainer, rows, 3)
    print(json.dumps([name, before, status("VmHWM")]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    """Bytes before the dictionary is made, and at the peak."""
    jobs = [(name, how, *tables(name), shape[3]) for name, (how, shape, *_) in CASES.items() if can_run(how)]
    result = subprocess.run([sys.executable, "-c", CHILD, json.dumps(jobs)], capture_output=True, text=True, check=True)
    return {name: (before, peak) for name, before, peak in map(json.loads, result.stdout.splitlines())}


def tables(name: str) -> tuple[dict[str, object], dict[str, object]]:
    _, (d_model, d_sae, k, _), sae, trainer = CASES[name]
    shape = {
        "hook_point_in": "h",
        "d_model": d_model,
        "expansion_factor": d_sae / d_model,
        "top_k": k,
        "device": "cpu",
        "norm_activation": "token-wise",
    }
    return {**shape, **sae}, {"total_training_tokens": 10**6, "clip_grad_norm": 1.0, **trainer}


def can_run(how: str) -> bool:
    return native.available() or how in ("sparse", "reference")


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_training_is_what_was_counted(name: str, measured: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    how, (d_model, *_, rows), *_ = CASES[name]
    if name not in measured:
        pytest.skip("the native kernels are not compiled here")
    monkeypatch.setenv("LM_SAES_OPS", how)
    fields, options = tables(name)
    sae, trainer = SAEConfig.model_validate(fields), TrainerConfig.model_validate(options)
    batch = memory.Batch(rows, 4 * d_model + 9)
    counted = 16 * memory.n_parameters(sae) + batch.bytes + memory.step_bytes(sae, trainer, batch, torch.device("cpu"))
    before, peak = measured[name]
    assert before + counted == pytest.approx(peak, rel=memory.ERROR)
    assert counted > 0.1 * before  # else the sizes of Python alone would pass


HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def settings(tmp_path: Path) -> TrainSAESettings:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some words that a tiny model reads. " * 4000)
    table = {
        "sae_name": "small", "device_type": "cpu",
        "sae": {"hook_point_in": HOOK, "d_model": 32, "expansion_factor": 64, "act_fn": "relu"},
        "trainer": {"total_training_tokens": 4096, "exp_result_path": str(tmp_path / "run"), "n_checkpoints": 1},
        "model": {"model_name": str(tmp_path / "model")}, "datasets": {"text": {"dataset_name_or_path": str(tmp_path / "text.txt")}},
        "activation_factory": {"sources": [{"name": "text"}], "hook_points": [HOOK], "batch_size": 1024, "buffer_size": 4096,
                               "context_size": 32, "model_batch_size": 4},
    }  # fmt: skip
    return TrainSAESettings.model_validate(table)


def changed(settings: TrainSAESettings, **rooms: dict[str, object]) -> TrainSAESettings:
    """With some fields set; the others stay as unset as they were."""
    table = settings.model_dump(mode="json", exclude_unset=True)
    return TrainSAESettings.model_validate({**table, **{room: {**(table.get(room) or {}), **fields} for room, fields in rooms.items()}})


def test_phases(settings: TrainSAESettings) -> None:
    phases = memory.phases(settings, None)
    weights = 4 * memory.n_parameters(dictionary_config(settings))
    assert set(phases) == {"initialisation", "reading", "training"}
    assert [phases[name][memory.DICTIONARY] // weights for name in ("initialisation", "reading", "training")] == [1, 4, 4]
    assert {parts[memory.BUFFER] for parts in phases.values()} == {4096 * (32 * 4 + 9 + 16)}
    assert phases["training"][memory.CHECKPOINT] == phases["reading"][memory.CHECKPOINT] == 3 * weights
    ahead = memory.phases(changed(settings, activation_factory={"prefetch": 2}, trainer={"n_checkpoints": 0}), None)
    assert set(ahead) == {"initialisation", "training"}  # reading and training are one
    assert memory.CHECKPOINT not in ahead["training"]
    assert ahead["training"][memory.STEP] == phases["training"][memory.STEP] + 2 * 1024 * (32 * 4 + 9)
    assert memory.largest({"a": {"x": 1, "y": 2}, "b": {"x": 4}}) == {"x": 4}


def test_runs_together_have_a_dictionary_each_and_the_rest_once(settings: TrainSAESettings) -> None:
    larger = changed(settings, sae={"expansion_factor": 128})
    one, other = (memory.phases(of, None)["training"] for of in (settings, larger))
    both = memory.phases_together([settings, larger], None)["training"]
    for part in (memory.DICTIONARY, memory.CHECKPOINT):
        assert both[part] == one[part] + other[part]
    for part in (memory.STEP, memory.BUFFER, memory.SNAPSHOT):
        assert both[part] == max(one[part], other[part])
