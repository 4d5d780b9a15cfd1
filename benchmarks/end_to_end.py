"""From text to a trained TopK SAE, in this library and in SAELens: the same language model, text, hook point and number of tokens.

    python benchmarks/end_to_end.py [--tokens 131072] [--rounds 1] [--json FILE]

The language model has the shape of Pythia-70M (GPT-NeoX, 6 layers of width 512) and random weights; its tokenizer is a byte-level BPE
trained on the text, which is the Python standard library. The clock runs from loading the language model to the saved dictionary, so it
counts tokenising, the language model, shuffling, initialisation and training; not the imports. "step" is what a training step takes with
all that feeds it, on average over the later three quarters of the run: what counts in a long one, where the set-up is small.
Each arm is a process of its own, the arms of a round follow each other. SAELens' environment is made below --venvs on the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
from peers import environments
from peers.pool import append, machine, now

D_MODEL, LAYERS, VOCABULARY, TOKENIZER_VOCABULARY = 512, 6, 50304, 8192
ARMS = {
    "lm_saes": ("lm_saes", ""),
    "sae-lens (sparse, huggingface)": ("sae_lens", "sparse,huggingface"),
    "sae-lens": ("sae_lens", ""),
}
PEERS = Path(__file__).parent / "peers"


def make_material(folder: Path, context: int, megabytes: float) -> None:
    """A language model, its tokenizer, text and held-out token ids in the folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from lm_saes.demo.corpus import documents

    texts, size = [], 0
    for document in documents("train"):
        texts.append(document.text)
        size += len(document.text)
        if size > megabytes * 1e6:
            break
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:100], trainer)
    end = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)

    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=D_MODEL, num_hidden_layers=LAYERS, num_attention_heads=8, intermediate_size=4 * D_MODEL,
            max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    held_out = fast("\n".join(document.text for document, _ in zip(documents("heldout"), range(30), strict=False)))["input_ids"]
    rows = min(16, len(held_out) // context)
    numpy.save(folder / "held_out.npy", numpy.array(held_out[: rows * context]).reshape(rows, context))


def run_arm(label: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one arm answers.

    Raises:
        SystemExit: it failed.
    """
    library, variant = ARMS[label]
    run = {
        "model": str(folder / "model"), "text": str(folder / "text.jsonl"), "held_out": str(folder / "held_out.npy"), "layer": arguments.layer,
        "d_model": D_MODEL, "d_sae": arguments.d_sae, "k": arguments.k, "tokens": arguments.tokens, "batch": arguments.batch,
        "context": arguments.context, "rows": arguments.rows, "buffer": arguments.buffer, "lr": arguments.lr, "threads": arguments.threads,
        "variant": variant,
    }  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    with tempfile.TemporaryDirectory() as output:
        command = [
            str(environments.python_of(library, arguments.venvs)),
            str(PEERS / f"run_{library}.py"),
            json.dumps({**run, "output": f"{output}/run"}),
        ]
        process = subprocess.run(command, capture_output=True, text=True, env=variables)
    if process.returncode or not process.stdout:
        raise SystemExit(f"error: {label} failed:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def table(record: dict[str, Any]) -> str:
    """A Markdown table of one record."""
    results, task = record["results"], record["task"]
    base = next(iter(results))
    lines = [
        f"**TopK, D {D_MODEL}, F {task['d_sae']}, k {task['k']}, batches of {task['batch']}, context {task['context']}, layer {task['layer']} of "
        f"{LAYERS}, {task['tokens']:,} tokens**, {len(results[base])} rounds, {task['threads']} threads, {record['date']}, {record['machine']}",
        "",
        f"| | whole run / {base} | CPU | step / {base} | CPU | seconds | before the first step | of a step | peak MiB | unexplained variance | L0 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = next(iter(results.values()))[0].keys() - {"version"}
    medians = {label: {name: statistics.median(answer[name] for answer in answers) for name in names} for label, answers in results.items()}
    for label, found in medians.items():
        ratios = " | ".join(f"{found[name] / medians[base][name]:.2f}" for name in ("wall", "cpu", "step", "step_cpu"))
        lines.append(
            f"| {label} | {ratios} | {found['wall']:.1f} | {found['setup']:.1f} | {found['step']:.2f} | {found['peak_mib']:.0f} | "
            f"{found['fvu']:.3f} | {found['l0']:.1f} |"
        )
    return "\n".join([*lines, "", "Versions: " + "; ".join(f"{label} {answers[0]['version']}" for label, answers in results.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32, help="contexts in one forward of the language model")
    parser.add_argument("--buffer", type=int, default=32768, help="activations in the shuffle buffer")
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venvs", type=Path, default=Path(__file__).parent / ".venvs")
    parser.add_argument("--torch-index", help="package index for torch when environments are made")
    parser.add_argument("--material", type=Path, help="where the language model and the text are kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="append what was measured to this file")
    arguments = parser.parse_args()
    arguments.venvs = arguments.venvs.resolve()
    for label in arguments.arms:
        if ARMS[label][0] in environments.PACKAGES:
            environments.make(ARMS[label][0], arguments.venvs, arguments.torch_index)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.material or Path(temporary)
        if not (folder / "held_out.npy").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_material(folder, arguments.context, megabytes=max(2, 12e-6 * arguments.tokens))
        results: dict[str, list[dict[str, Any]]] = {label: [] for label in arguments.arms}
        for number in range(arguments.rounds):
            for label in arguments.arms:
                results[label].append(run_arm(label, folder, arguments))
                print(f"round {number + 1}: {label} {results[label][-1]['wall']:.1f} s", file=sys.stderr)
    task = {name: getattr(arguments, name) for name in ("tokens", "d_sae", "k", "batch", "context", "rows", "buffer", "layer", "lr", "threads")}
    record = {"date": now(), "machine": machine(), "task": task, "results": results}
    if arguments.json:
        append(arguments.json, record)
    print(table(record))


if __name__ == "__main__":
    main()
