"""The dry run's estimate of memory beside the peak that a run really has, over a table of configurations.

    python benchmarks/memory.py [--only TEXT] [--ops native sparse reference]

Each run is a process of its own: a randomly initialised language model of two layers and the width in question reads the demo corpus; the
dictionary is initialised, trained for a few steps and saved, with one checkpoint. Its peak is the largest resident set that the system
saw. `beyond` leaves Python and its libraries out of both figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HOOK = "blocks.1.hook_resid_post"
STEPS = 4
MIB = 2**20

ROWS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"sae": {"act_fn": "batchtopk"}},
    "relu": {"sae": {"act_fn": "relu"}, "trainer": {"sparsity_loss_type": "power"}},
    "jumprelu": {"sae": {"act_fn": "jumprelu"}, "trainer": {"sparsity_loss_type": "tanh"}},
    "topk, GLU": {"sae": {"use_glu_encoder": True}},
    "topk, AuxK": {"trainer": {"auxk_coefficient": 0.03125, "dead_threshold": 1}},
    "topk, 4 micro-batches": {"trainer": {"gradient_accumulation_steps": 4}},
    "relu, 4 micro-batches": {"sae": {"act_fn": "relu"}, "trainer": {"gradient_accumulation_steps": 4, "sparsity_loss_type": "power"}},
    "topk, buffer of 65,536": {"activation_factory": {"buffer_size": 65_536}},
    "topk, one initialisation batch": {"initializer": {"n_batches": 1}},
    "topk, 16,384 latents": {"sae": {"expansion_factor": 32}, "initializer": {"n_batches": 1}},
    "topk, width 768": {"sae": {"d_model": 768}, "initializer": {"n_batches": 1}},
    "topk, width 768, batch of 8,192": {"sae": {"d_model": 768}, "activation_factory": {"batch_size": 8192}},
    "topk, two batches ahead": {"activation_factory": {"prefetch": 2}},
    "transcoder": {"sae": {"hook_point_out": "blocks.0.hook_resid_post"}, "activation_factory": {"hook_points": [HOOK, "blocks.0.hook_resid_post"]}},
}


def settings_of(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a row, as a table."""
    table: dict[str, Any] = {
        "sae_name": "memory", "device_type": "cpu", "model": {"model_name": str(folder / "model")},
        "sae": {"hook_point_in": HOOK, "d_model": 512, "expansion_factor": 8, "act_fn": "topk", "top_k": 32},
        "trainer": {"exp_result_path": str(folder / "run"), "n_checkpoints": 1, "clip_grad_norm": 1.0, "log_frequency": 1},
        "activation_factory": {"sources": [{"name": "demo"}], "hook_points": [HOOK], "batch_size": 4096, "buffer_size": 16_384,
                               "context_size": 256, "model_batch_size": 4},
    }  # fmt: skip
    for room, fields in changes.items():
        table[room] = {**table.get(room, {}), **fields}
    table["trainer"]["total_training_tokens"] = STEPS * table["activation_factory"]["batch_size"]
    return table


def save_model(folder: Path, width: int) -> None:
    """A random language model with the demo model's tokenizer."""
    import transformers

    from lm_saes.config import LanguageModelConfig
    from lm_saes.lm.huggingface import load_tokenizer

    tokenizer = load_tokenizer(LanguageModelConfig(model_name="demo"))
    config = transformers.GPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=4 * width,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def child(task: str, table: dict[str, Any]) -> dict[str, Any]:
    """One task in this process: "save" the model, "estimate", or "run"."""
    import torch

    torch.set_num_threads(2)
    if task == "save":
        save_model(Path(table["model"]["model_name"]), table["sae"]["d_model"])
        return {}
    from lm_saes.config import TrainSAESettings

    settings = TrainSAESettings.model_validate(table)
    if task == "estimate":
        from lm_saes.estimate import estimate

        result = estimate(settings, calibrate=False)
        return {"memory": result.memory, "phases": result.phases}
    from lm_saes.runners import train_sae

    train_sae(settings)
    status = Path("/proc/self/status").read_text().splitlines()
    return {"peak": next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))}


def ask(task: str, table: dict[str, Any], ops: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, __file__, "--child", task, json.dumps(table)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LM_SAES_OPS": ops},
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--ops", nargs="+", default=["native"], help="implementations of lm_saes.ops")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child[0], json.loads(arguments.child[1]))))
        return
    print("| ops | | estimate, MiB | peak, MiB | estimate / peak | beyond | largest phase |\n|---|---|---|---|---|---|---|")
    for ops in arguments.ops:
        for name, changes in ROWS.items():
            if arguments.only not in name:
                continue
            with tempfile.TemporaryDirectory() as folder:
                table = settings_of(Path(folder), changes)
                ask("save", table, ops)
                estimated, measured = ask("estimate", table, ops), ask("run", table, ops)["peak"]
            total, libraries = sum(estimated["memory"].values()), estimated["memory"]["python and libraries"]
            phase = max(estimated["phases"], key=lambda phase: sum(estimated["phases"][phase].values()))
            beyond = (total - libraries) / (measured - libraries)
            print(f"| {ops} | {name} | {total / MIB:.0f} | {measured / MIB:.0f} | {total / measured:.2f} | {beyond:.2f} | {phase} |", flush=True)


if __name__ == "__main__":
    main()
