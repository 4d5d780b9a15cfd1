"""The jobs that are killed: small, but each with what makes resumption hard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faults.kills import Job, forwards, lines_of_metrics, result_of_run, shards
from tests.lm.tiny_models import save_tiny

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
BATCH, STEPS = 64, 40
DURING_A_RUN = ("work", "work", "checkpoint", "last save", "initialisation")

TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "topk, AuxK, k annealing, read ahead": (
        {"act_fn": "topk", "top_k": 4},
        {"auxk_coefficient": 1 / 32, "dead_threshold": 200, "k_aux": 8, "initial_k": 0.5, "k_warmup_steps": 0.8},
        {"prefetch": 2},
    ),
    "batchtopk, batch-wise, evaluated": ({"act_fn": "batchtopk", "top_k": 4, "norm_activation": "batch-wise"}, {"eval_frequency": 7}, {}),
    "jumprelu, target_l0": (
        {"act_fn": "jumprelu"},
        {"sparsity_loss_type": "tanh-quad", "lp_coefficient": 3e-6, "target_l0": 6.0, "lr_warm_up_steps": 2, "l1_coefficient_warmup_steps": 3},
        {},
    ),
    "relu, target_l0, micro-batches, read ahead": (
        {"act_fn": "relu"},
        {"sparsity_loss_type": "tanh", "l1_coefficient": 0.1, "target_l0": 6.0, "lr_warm_up_steps": 2, "gradient_accumulation_steps": 2},
        {"prefetch": 1},
    ),
}
"""Dictionary, trainer and stream of each run that is trained."""


def material(folder: Path) -> Path:
    """A tiny language model and some text."""
    save_tiny("gpt_neox", folder / "model")
    lines = (json.dumps({"text": f"Number {i} of a few documents, with some words in it. " * (3 + i % 9)}) for i in range(300))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def _written(folder: Path, name: str, table: dict[str, Any]) -> str:
    path = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
    path.write_text(json.dumps(table))
    return str(path)


def settings(given: Path, name: str, cache: Path | None = None) -> dict[str, Any]:
    """The settings of one of `TRAINED`, as JSON values; its activations from the text, or from a cache."""
    sae, trainer, factory = TRAINED[name]
    source: dict[str, Any] = {"name": "text"} if cache is None else {"type": "activations", "name": "text", "path": str(cache), "num_workers": 2}
    text = {"model": {"model_name": str(given / "model")}, "datasets": {"text": {"dataset_name_or_path": str(given / "text.jsonl")}}}
    stream = {"context_size": 32, "model_batch_size": 2} if cache is None else {}
    return {
        "sae_name": "small", "device_type": "cpu", "sae": {"hook_point_in": HOOKS[0], "d_model": 32, "expansion_factor": 2, **sae},
        "initializer": {"grid_search_init_norm": True, "n_batches": 3},
        "trainer": {"total_training_tokens": BATCH * STEPS, "log_frequency": 1, "n_checkpoints": 10, "check_point_save_mode": "linear",
                    "lr": 1e-3, **trainer},
        "activation_factory": {"sources": [source], "hook_points": HOOKS[:1], "batch_size": BATCH, "buffer_size": 512, **stream, **factory},
        "eval": "eval_frequency" in trainer, "eval_config": {"total_eval_tokens": 64}, **(text if cache is None else {}),
    }  # fmt: skip


def train(given: Path, name: str, folder: Path, cache: Path | None = None) -> Job:
    """`lm-saes train`."""
    label = f"train {'from a cache' if cache else 'on the fly'}: {name}"
    words = ["train", _written(given, label.replace(":", ""), settings(given, name, cache)), "--trainer.exp_result_path", str(folder), "--resume"]
    return Job(label, words, folder, lines_of_metrics, STEPS, result_of_run, DURING_A_RUN)


def sweep(given: Path, folder: Path, cache: Path | None = None) -> Job:
    """`lm-saes sweep`: three dictionaries of different lengths."""
    name = "topk, AuxK, k annealing, read ahead"
    words = ["sweep", _written(given, f"sweep{cache is not None}", settings(given, name, cache)), "--out", str(folder), "--resume",
             "--grid", f"trainer.total_training_tokens={BATCH * STEPS},{BATCH * STEPS // 2}", "--grid", "trainer.lr=1e-3,1e-4"]  # fmt: skip
    return Job(f"sweep {'from a cache' if cache else 'on the fly'}", words, folder, lines_of_metrics, STEPS, result_of_run, DURING_A_RUN)


def generate(given: Path, folder: Path, **options: Any) -> Job:
    """`lm-saes generate`."""
    table = {
        "model": {"model_name": str(given / "model")}, "dataset_name": "text", "dataset": {"dataset_name_or_path": str(given / "text.jsonl")},
        "hook_points": HOOKS, "output_dir": str(folder), "target": "activations-1d", "model_batch_size": 2, "context_size": 32,
        "n_samples_per_chunk": 250, "total_tokens": 4000, "device_type": "cpu", **options,
    }  # fmt: skip
    label = f"generate {table['target']} {options.get('override_dtype', 'float32')}"
    n_shards = 16 if table["target"] == "activations-1d" else 10
    return Job(label, ["generate", _written(given, label + folder.name, table)], folder, shards, n_shards, result_of_run)


def analyses(run: Path) -> list[Job]:
    """`lm-saes evaluate` and `lm-saes show` of a finished run: both write what they found into its folder."""
    return [
        Job(f"analyse: {words[0]}", [*words, str(run)], run, forwards, total, result_of_run) for words, total in ((["evaluate"], 8), (["show"], 300))
    ]
