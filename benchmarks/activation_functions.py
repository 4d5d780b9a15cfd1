"""ReLU, JumpReLU, TopK and BatchTopK at the same L0, on the same tokens of the demo language model.

    python benchmarks/activation_functions.py --tokens 1000000 --seeds 3

Every arm sees the same activations in the same order (captured once, shuffled once per seed), the same initialisation recipe and number of steps,
and its own learning rate (`ARMS`). ReLU and JumpReLU reach the L0 by `target_l0`. All are evaluated on the held-out files, in eval mode, beside
PCA of the same rank. Prints a Markdown table, mean and half range over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lm_saes import (
    ActivationFactory,
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    DatasetConfig,
    EvalConfig,
    Evaluator,
    Initializer,
    InitializerConfig,
    LanguageModelConfig,
    SAEConfig,
    Trainer,
    TrainerConfig,
    load_model,
)
from lm_saes.evaluation.pca import PCABaseline

HOOK = "blocks.2.hook_resid_post"
BATCH = 2048
ARMS: dict[str, dict[str, Any]] = {
    "relu": {"lr": 1e-3, "sparsity_loss_type": "power", "l1_coefficient": 0.5},
    "jumprelu": {"lr": 1e-3, "sparsity_loss_type": "tanh", "l1_coefficient": 0.5, "lp_coefficient": 3e-6},
    "topk": {"lr": 1e-3, "auxk_coefficient": 1 / 32, "k_aux": 96},
    "batchtopk": {"lr": 1e-3, "auxk_coefficient": 1 / 32, "k_aux": 96},
}
COLUMNS = {
    "L0": ("metrics/l0", "{:.2f}", "{:.2f}"),
    "explained variance": ("metrics/explained_variance", "{:.4f}", "{:.4f}"),
    "ΔCE (nats)": ("metrics/delta_ce", "{:.4f}", "{:.4f}"),
    "recovered (zero)": ("metrics/recovered_fraction", "{:.4f}", "{:.4f}"),
    "dead": ("metrics/dead_fraction", "{:.2%}", "{:.2%}"),
    "dense": ("metrics/dense_fraction", "{:.2%}", "{:.2%}"),
}


class Batches:
    """Captured activations, given out in a fixed order."""

    def __init__(self, activations: torch.Tensor, tokens: torch.Tensor, hook: str = HOOK):
        self.activations, self.tokens, self.hook = activations, tokens, hook

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.tokens) - BATCH + 1, BATCH):
            rows = slice(start, start + BATCH)
            yield {self.hook: self.activations[rows].float(), "tokens": self.tokens[rows], "mask": torch.ones(BATCH, dtype=torch.bool)}


def capture(model: Any, n_tokens: int, seed: int, split: str = "train") -> Batches:
    """`n_tokens` shuffled activations of the training files, or of the held-out ones."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name="demo")],
        hook_points=[HOOK],
        batch_size=BATCH,
        buffer_size=65_536,
        context_size=256,
        model_batch_size=16,
    )
    stream = ActivationFactory(cfg).process(model=model, datasets={"demo": DatasetConfig(dataset_name_or_path="demo", split=split)}, seed=seed)
    activations, tokens = (
        torch.empty(n_tokens // BATCH * BATCH, model.d_model, dtype=torch.float32),
        torch.empty(n_tokens // BATCH * BATCH, dtype=torch.int64),
    )
    for index, batch in enumerate(stream):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        if rows.stop > len(tokens):
            break
        activations[rows], tokens[rows] = batch[HOOK], batch["tokens"]
    return Batches(activations, tokens)


def held_out(model: Any) -> Any:
    """The held-out files in context."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name="demo")],
        target="activations-2d",
        hook_points=[HOOK],
        batch_size=8,
        context_size=256,
        model_batch_size=8,
    )
    return ActivationFactory(cfg).process(model=model, datasets={"demo": DatasetConfig(dataset_name_or_path="demo", split="heldout")}, seed=0)


def train(arm: str, batches: Batches, model: Any, l0: int, expansion: int, seed: int, evaluation: EvalConfig) -> dict[str, Any]:
    """One arm, one seed; its held-out metrics."""
    options = dict(ARMS[arm])
    if "sparsity_loss_type" in options:
        options["target_l0"] = l0
    stream = iter(batches)
    cfg = SAEConfig(hook_point_in=HOOK, d_model=model.d_model, expansion_factor=expansion, act_fn=arm, top_k=l0)
    recipe = InitializerConfig(bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=True)
    sae = Initializer(recipe).initialize_sae_from_config(cfg, stream, seed=seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        n_tokens = len(batches.tokens) - 8 * BATCH
        trainer = TrainerConfig(
            total_training_tokens=n_tokens, lr_warm_up_steps=0.05, clip_grad_norm=1.0, dead_threshold=n_tokens // 8, n_checkpoints=0,
            seed=seed, exp_result_path=str(Path(folder) / arm), **options,
        )  # fmt: skip
        Trainer(trainer).fit(sae, stream)
    seconds = time.perf_counter() - start
    metrics = Evaluator(evaluation).evaluate(sae, held_out(model), model=model)
    return {**metrics, "seconds": seconds}


def row(name: str, results: list[dict[str, Any]], columns: dict[str, tuple[str, str, str]] = COLUMNS) -> str:
    cells = []
    for metric, mean_format, spread_format in columns.values():
        values = [result[metric] for result in results]
        mean, half_range = sum(values) / len(values), (max(values) - min(values)) / 2
        cells.append(mean_format.format(mean) + (f" ± {spread_format.format(half_range)}" if len(values) > 1 else ""))
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load_model(LanguageModelConfig(model_name="demo"))
    evaluation = EvalConfig(total_eval_tokens=args.eval_tokens)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    batches = None
    for seed in range(args.seeds):
        batches = capture(model, args.tokens + 8 * BATCH, seed)
        for arm in args.arms:
            results[arm].append(train(arm, batches, model, args.l0, args.expansion, seed, evaluation))
            print(f"seed {seed} {row(arm, results[arm][-1:])} {results[arm][-1]['seconds']:.0f} s", flush=True)
    assert batches is not None
    baseline = PCABaseline(args.l0, HOOK).fit(batches, n_tokens=200_000)
    results[f"pca-{args.l0}"] = [Evaluator(evaluation).evaluate(baseline, held_out(model), model=model)]
    print("\n| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for name, runs in results.items():
        print(row(name, runs))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
