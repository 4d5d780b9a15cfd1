"""The command line as a person meets it: what it prints, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import command
from tests.lm.tiny_models import save_tiny

HOOK = "blocks.0.hook_resid_post"
WIDTH = 32


class Said(NamedTuple):
    """What a command printed, and how it ended."""

    code: int
    out: str
    error: str

    @property
    def line(self) -> str:
        """The one line of an error, without its "error: "."""
        assert self.code == 2, self
        assert "Traceback" not in self.out + self.error
        lines = [line for line in self.error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.error
        assert self.error.splitlines()[-1] == lines[0]
        return lines[0].removeprefix("error: ")


Terminal = Callable[..., Said]


def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    """`lm-saes` in this process."""

    def run(*words: object) -> Said:
        monkeypatch.setenv("COLUMNS", "1000")
        capsys.readouterr()
        code = command.run(*words, monkeypatch=monkeypatch)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


def make_material(folder: Path) -> Path:
    """A tiny language model in `model`, and `text.jsonl`, enough for some thousand tokens."""
    save_tiny("gpt_neox", folder / "model")
    lines = (json.dumps({"text": f"number {i} of a few documents, with some words in it that repeat. " * 10}) for i in range(60))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def training(material: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a training of 16 steps, as JSON values; `changes` by dotted names with `__` for the dots."""
    table: dict[str, Any] = {
        "sae_name": "small", "device_type": "cpu", "sae": {"hook_point_in": HOOK, "d_model": WIDTH, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "initializer": {"n_batches": 1},
        "trainer": {"total_training_tokens": 2048, "exp_result_path": str(run), "log_frequency": 1, "n_checkpoints": 4, "check_point_save_mode": "linear"},
        "model": {"model_name": str(material / "model")}, "datasets": {"text": {"dataset_name_or_path": str(material / "text.jsonl")}},
        "activation_factory": {"sources": [{"type": "dataset", "name": "text"}], "hook_points": [HOOK], "batch_size": 128, "buffer_size": 512,
                               "context_size": 32, "model_batch_size": 4},
    }  # fmt: skip
    return changed(table, changes)


def generation(material: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a cache of 4 shards."""
    table: dict[str, Any] = {
        "model": {"model_name": str(material / "model")}, "dataset_name": "text", "dataset": {"dataset_name_or_path": str(material / "text.jsonl")},
        "hook_points": [HOOK], "output_dir": str(cache), "target": "activations-1d", "model_batch_size": 4, "context_size": 32,
        "n_samples_per_chunk": 500, "total_tokens": 2000, "device_type": "cpu",
    }  # fmt: skip
    return changed(table, changes)


def changed(table: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        place = table
        *way, last = name.split("__")
        for step in way:
            place = place[step]
        place[last] = value
    return table


def settings_file(folder: Path, table: dict[str, Any]) -> Path:
    path = folder / "settings.json"
    path.write_text(json.dumps(table))
    return path


def weights(run: Path) -> bytes:
    return (run / "sae_weights.safetensors").read_bytes()


def checkpoints(run: Path) -> list[str]:
    return sorted((path.name for path in (run / "checkpoints").glob("step_*")), key=lambda name: int(name[5:]))
