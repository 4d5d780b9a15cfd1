"""What the recipe of benchmarks/synthetic does on activations of language models, part by part.

    python benchmarks/recipe.py                                   # demo model: explained variance, ΔCE
    pip install -r benchmarks/active_subspace/requirements.txt
    python benchmarks/recipe.py --source minilm                   # the encoder all-MiniLM-L6-v2: explained variance

The recipe changes three things of a BatchTopK dictionary: nested prefixes (Matryoshka), k falling from 2.75 times its last value over the first four
fifths, three times the learning rate. Here all eight combinations, at the same last k: the same tokens in the same order for all arms of a seed, the
same initialisation, AuxK in all. Evaluated on held-out text in eval mode, at the same L0: BatchTopK's threshold, a moving average that lags behind while
k falls and that other text shifts, is set once more on held-out activations. Prints a Markdown table, mean and half range over the seeds. What the file
`--out` has already is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from activation_functions import BATCH, COLUMNS, HOOK, Batches, capture, held_out, row

from lm_saes import EvalConfig, Evaluator, Initializer, InitializerConfig, LanguageModelConfig, SAEConfig, Trainer, TrainerConfig, load_model
from lm_saes.config import MatryoshkaConfig

MINILM_HOOK = "blocks.3.hook_resid_post"
NESTED = (32, 8, 2)
"""Matryoshka's prefixes, as d_sae over their widths."""
FROM_K = 2.75
"""k at the start over k at the end."""
LR = 1e-3
CALIBRATED_ON = 16_384
"""Held-out tokens of the demo model that thresholds are set on."""
PARTS = ("nested", "annealed", "3 lr")
MINILM_COLUMNS = {name: COLUMNS[name] for name in ("L0", "explained variance", "dead", "dense")}


def name_of(parts: tuple[str, ...]) -> str:
    return " + ".join(["batchtopk", *parts])


ARMS = {name_of(parts): parts for size in range(len(PARTS) + 1) for parts in combinations(PARTS, size)}


def train(parts: tuple[str, ...], batches: Batches, hook: str, d_model: int, l0: int, expansion: int, seed: int) -> tuple[Any, float]:
    """A dictionary with some parts of the recipe, and the seconds of its training."""
    d_sae, stream = d_model * expansion, iter(batches)
    matryoshka = MatryoshkaConfig(widths=tuple(d_sae // share for share in NESTED)) if "nested" in parts else None
    cfg = SAEConfig(hook_point_in=hook, d_model=d_model, expansion_factor=expansion, act_fn="batchtopk", top_k=l0, matryoshka=matryoshka)
    start = InitializerConfig(bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=True)
    sae = Initializer(start).initialize_sae_from_config(cfg, stream, seed=seed)
    annealed = {"initial_k": round(FROM_K * l0), "k_warmup_steps": 0.8} if "annealed" in parts else {}
    n_tokens, clock = len(batches.tokens) - 8 * BATCH, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TrainerConfig(
            total_training_tokens=n_tokens, lr=LR * (3 if "3 lr" in parts else 1), lr_warm_up_steps=0.05, clip_grad_norm=1.0, auxk_coefficient=1 / 32,
            k_aux=d_model // 2, dead_threshold=n_tokens // 8, n_checkpoints=0, seed=seed, exp_result_path=folder, **annealed,
        )  # fmt: skip
        Trainer(trainer).fit(sae, stream)
    return sae, time.perf_counter() - clock


class Demo:
    """The demo language model, spliced on held-out files."""

    hook, columns = HOOK, COLUMNS

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.model = options, load_model(LanguageModelConfig(model_name="demo"))
        self.d_model = self.model.d_model
        self.heldout = capture(self.model, CALIBRATED_ON, 0, "heldout")

    def batches(self, seed: int) -> Batches:
        return capture(self.model, self.options.tokens + 8 * BATCH, seed)

    def evaluate(self, sae: Any) -> dict[str, Any]:
        return Evaluator(EvalConfig(total_eval_tokens=self.options.eval_tokens)).evaluate(sae, held_out(self.model), model=self.model)


class MiniLM:
    """Captured activations of the encoder, read over and over in new orders."""

    hook, columns = MINILM_HOOK, MINILM_COLUMNS

    def __init__(self, options: argparse.Namespace) -> None:
        sys.path.append(str(Path(__file__).parent / "active_subspace"))
        from sources import captured, open_model

        self.options, model = options, open_model("minilm", "cpu")
        found = captured("minilm", [self.hook], options.captured, options.eval_tokens, options.cache, model)[self.hook]
        self.train, self.d_model = found.train, found.train.shape[1]
        self.heldout = Batches(found.heldout, torch.arange(len(found.heldout)), self.hook)

    def batches(self, seed: int) -> Batches:
        draw, n = torch.Generator().manual_seed(seed), self.options.tokens + 8 * BATCH
        passes = -(-n // len(self.train))
        order = torch.cat([torch.randperm(len(self.train), generator=draw) for _ in range(passes)])[: n // BATCH * BATCH]
        return Batches(self.train[order], order, self.hook)

    def evaluate(self, sae: Any) -> dict[str, Any]:
        return Evaluator(EvalConfig(total_eval_tokens=len(self.heldout.tokens))).evaluate(sae, self.heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("demo", "minilm"), default="demo")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="that each dictionary is trained on")
    parser.add_argument("--captured", type=int, default=262_144, help="different ones among them, for minilm")
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--cache", type=Path, default=Path("runs/active_subspace"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    source = Demo(options) if options.source == "demo" else MiniLM(options)
    results: dict[str, list[dict[str, Any]]] = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    for seed in range(options.seeds):
        missing = [arm for arm in options.arms if len(results.setdefault(arm, [])) <= seed]
        if not missing:
            continue
        batches = source.batches(seed)
        for arm in missing:
            sae, seconds = train(ARMS[arm], batches, source.hook, source.d_model, options.l0, options.expansion, seed)
            sae.calibrate([sae.normalize_activations(batch) for batch in source.heldout])
            results[arm].append({**source.evaluate(sae), "seconds": seconds})
            print(f"seed {seed} {row(arm, results[arm][-1:], source.columns)} {seconds:.0f} s", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n| | seeds | " + " | ".join(source.columns) + " |\n|---|" + "---:|" * (len(source.columns) + 1))
    for arm in (arm for arm in ARMS if results.get(arm)):
        print(row(f"{arm} | {len(results[arm])}", results[arm], source.columns))


if __name__ == "__main__":
    main()
