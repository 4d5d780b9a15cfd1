"""Train the bundled language model on the Python standard library.

    python scripts/train_demo_lm.py --minutes 40 --out src/lm_saes/demo/language_model

What it does, in order:

1. reads the standard library of the running interpreter (`lm_saes.demo.corpus`; held-out files by path hash, tests excluded) and, for
   the training side only, Python sources of permissively licensed packages that are installed anyway. A package file that shares lines
   with a held-out file (a vendored copy, say) is dropped;
2. fits a byte-level BPE tokenizer on the training side;
3. trains a small Llama-shaped model: Muon for the matrices, AdamW for embeddings and norms, bfloat16 compute, float32 weights, a
   warm-up-hold-decay schedule in wall-clock time, so a slow machine gets fewer steps and not a broken schedule;
4. measures bits per byte on the held-out files (every byte counted once, each token predicted from at least half a context, each file
   on its own) beside `xz -9e` on the same files as one stream;
5. saves in Hugging Face format in float16, with a model card that holds what was measured.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_saes.demo import corpus

SEPARATOR, PAD = "<|endoftext|>", "<|pad|>"
# A line break with its indentation is one piece, an identifier's words are pieces of their own: code costs few tokens and reads well.
PIECES = r"\n+[ \t]*| ?[A-Z]?[a-z]+| ?[A-Z]+|_[A-Z]?[a-z]+|_[A-Z]+| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+"
PACKAGES = {
    "numpy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
}


# ------------------------------------------------------------------------------------------------------------------ text


def significant_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


def package_documents(limit_bytes: int, heldout_lines: set[str], seed: int) -> tuple[list[str], dict[str, int], int]:
    """Sources of PACKAGES, up to `limit_bytes` each; returns texts, bytes used per package and the number of files dropped as copies."""
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    used: dict[str, int] = {}
    dropped = 0
    site = Path(np.__file__).parent.parent
    for package in PACKAGES:
        files = sorted(path for path in (site / package).rglob("*.py") if not any("test" in part for part in path.parts))
        used[package] = 0
        for index in rng.permutation(len(files)):
            text = files[index].read_text(encoding="utf-8", errors="replace")
            lines = significant_lines(text)
            if len(text) < 500 or len(text) > 200_000:
                continue
            if lines and len(lines & heldout_lines) > max(1, len(lines) // 50):
                dropped += 1
                continue
            texts.append(text)
            used[package] += len(text.encode())
            if used[package] > limit_bytes:
                break
    return texts, used, dropped


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one row of ids, each preceded by the separator."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.append(tokenizer.bos_token_id)
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------------- optimizer


def orthogonalised(gradient: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix (Jordan et al. 2024, Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = gradient / (gradient.norm() + 1e-7)
    transposed = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if transposed else matrix
    for _ in range(steps):
        gram = matrix @ matrix.T
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix.T if transposed else matrix


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the matrices inside the blocks."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def schedule(fraction: float) -> float:
    """Warm-up over 1 % of the time, hold, linear decay to zero over the last 60 %."""
    return min(1.0, fraction / 0.01, max(0.0, (1 - fraction) / 0.6))


# ------------------------------------------------------------------------------------------------------------ evaluation


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int) -> float:
    """Held-out code length: sum over files of -log2 p(tokens), over the files' UTF-8 bytes; windows overlap by half."""
    model.eval()
    nats, stride = 0.0, context // 2
    for text in texts:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(text).ids])
        scored = 1
        for start in range(0, max(1, len(ids) - 1), stride):
            window = ids[start : start + context]
            end = start + len(window)
            if end <= scored:
                break
            logits = model(window[None]).logits[0].float()
            new = slice(scored - start - 1, len(window) - 1)
            nats += torch.nn.functional.cross_entropy(logits[new], window[scored - start :], reduction="sum").item()
            scored = end
    model.train()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


# ------------------------------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--package-bytes", type=int, default=9_000_000)
    parser.add_argument("--package-share", type=float, default=0.35)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss (1.5 times faster; needs a C++ compiler)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    train = [document.text for document in corpus.documents("train")]
    heldout = [document.text for document in corpus.documents("heldout")]
    heldout_lines = set().union(*(significant_lines(text) for text in heldout))
    packages, package_bytes, dropped = package_documents(args.package_bytes, heldout_lines, args.seed)
    raw = b"".join(text.encode() for text in heldout)
    xz = 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)

    tokenizer = train_tokenizer(train, args.vocab_size)
    streams = [pack(tokenizer, [train[i] for i in rng.permutation(len(train))]), pack(tokenizer, packages)]
    corpus_bytes = sum(len(text.encode()) for text in train)
    print(
        f"stdlib {corpus_bytes / 1e6:.1f} MB = {len(streams[0]) / 1e6:.2f} M tokens; packages {sum(package_bytes.values()) / 1e6:.1f} MB = "
        f"{len(streams[1]) / 1e6:.2f} M tokens ({dropped} files dropped as copies); held out {len(raw) / 1e6:.2f} MB, xz -9e {xz:.4f} bits/byte",
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.width, intermediate_size=args.width * 8 // 3, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, max_position_embeddings=args.context, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, args.lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.lr / 5, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peak = [args.lr, args.lr / 5]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.lm_head(model.model(ids[:, :-1], use_cache=False).last_hidden_state)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    if args.compile:
        loss_of = torch.compile(loss_of)
        loss_of(torch.zeros(args.batch, args.context + 1, dtype=torch.long)).backward()  # compiled before the clock starts
        model.zero_grad(set_to_none=True)

    start, step, average = time.monotonic(), 0, math.nan
    while (elapsed := time.monotonic() - start) < args.minutes * 60:
        scale = schedule(elapsed / (args.minutes * 60))
        for optimizer, lr in zip(optimizers, peak, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
        rows = []
        for _ in range(args.batch):
            stream = streams[int(rng.random() < args.package_share)]
            offset = int(rng.integers(len(stream) - args.context - 1))
            rows.append(stream[offset : offset + args.context + 1])
        ids = torch.stack(rows).long()
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            rate = step * args.batch * args.context / (time.monotonic() - start)
            print(f"step {step}  {elapsed / 60:.1f} min  loss {average:.3f}  {rate / 1e3:.1f}k tokens/s  lr x{scale:.2f}", flush=True)
        if step % 1000 == 0:
            print(f"step {step}  held-out bits/byte on the first files {bits_per_byte(model, tokenizer, heldout[:8], args.context):.4f}", flush=True)

    train_seconds = time.monotonic() - start
    model.half().float()  # measured as it is stored
    model_bpb = bits_per_byte(model, tokenizer, heldout, args.context)
    train_bpb = bits_per_byte(model, tokenizer, [train[i] for i in rng.permutation(len(train))[:40]], args.context)
    facts = {
        "parameters": n_parameters, "steps": step, "tokens": step * args.batch * args.context, "minutes": round(train_seconds / 60, 1),
        "threads": torch.get_num_threads(), "heldout_bytes": len(raw), "heldout_files": len(heldout), "heldout_bits_per_byte": round(model_bpb, 4),
        "train_bits_per_byte": round(train_bpb, 4), "xz_bits_per_byte": round(xz, 4), "ratio": round(model_bpb / xz, 4),
        "python": platform.python_version(), "stdlib_train_bytes": corpus_bytes, "package_bytes": package_bytes, "package_share": args.package_share, "seed": args.seed,
    }  # fmt: skip
    print(json.dumps(facts, indent=1), flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(config, facts))
    print(f"saved to {args.out}", file=sys.stderr)


def model_card(config: LlamaConfig, facts: dict) -> str:
    packages = ", ".join(f"{name} ({PACKAGES[name]}, {size / 1e6:.1f} MB)" for name, size in facts["package_bytes"].items())
    return f"""---
license: mit
library_name: transformers
---
# The demo language model of lm_saes

A small causal language model of Python source code, carried by the package so that everything works offline.

| | |
|---|---|
| shape | Llama, width {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, context {config.max_position_embeddings}, vocabulary {config.vocab_size}, tied embeddings |
| parameters | {facts["parameters"]:,} (float16 on disk) |
| corpus | standard library of Python {facts["python"]} without its tests: {facts["stdlib_train_bytes"] / 1e6:.1f} MB for training; packages on the training side: {packages} |
| mixture | {1 - facts["package_share"]:.0%} standard library, {facts["package_share"]:.0%} packages |
| held out | {facts["heldout_files"]} files of the standard library ({facts["heldout_bytes"] / 1e6:.2f} MB), chosen by a hash of their paths; package files that share lines with them are left out of training |
| training | {facts["steps"]:,} steps, {facts["tokens"] / 1e6:.1f} M tokens, {facts["minutes"]} minutes on {facts["threads"]} CPU threads, seed {facts["seed"]} |
| **held-out bits per byte** | **{facts["heldout_bits_per_byte"]:.3f}** (`xz -9e` on the same files as one stream: {facts["xz_bits_per_byte"]:.3f}; ratio {facts["ratio"]:.3f}) |
| bits per byte on training files | {facts["train_bits_per_byte"]:.3f} |

Made by `scripts/train_demo_lm.py`. It predicts Python sources and nothing else; use it to try things, not to write code.
"""


if __name__ == "__main__":
    main()
