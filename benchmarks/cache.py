"""The activation cache: reading speed, shuffling, and what the data type on disk costs the dictionary that is trained.

    python benchmarks/cache.py throughput --folder /somewhere/on/the/disk --gigabytes 2 --rounds 7
    python benchmarks/cache.py shuffle --folder /somewhere --tokens 2000000 --width 768
    python benchmarks/cache.py training --folder /somewhere --tokens 600000 --seeds 3

`throughput` reads the files of a cold float16 cache one after the other with plain sequential reads, and the same cache as a stream (random order of
the groups, every byte checked), interleaved; before each reading the pages of the files are dropped from the system's cache. `training` trains TopK
dictionaries on caches of the same activations in the same order, and evaluates them on held-out text with the language model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lm_saes import (
    ActivationFactory,
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
    ActivationWriter,
    ActivationWriterConfig,
    DatasetConfig,
    EvalConfig,
    Evaluator,
    GenerateActivationsSettings,
    Initializer,
    InitializerConfig,
    LanguageModelConfig,
    SAEConfig,
    Trainer,
    TrainerConfig,
    generate_activations,
    load_model,
)
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_streams import StoredSamples
from lm_saes.activations.shuffle_quality import shuffle_quality

HOOK = "blocks.2.hook_resid_post"
BATCH = 2048
DTYPES = ("float32", "bfloat16", "float16", "int8")


# ------------------------------------------------------------------------------------------------------- throughput


def drop_from_memory(files: list[Path]) -> None:
    """Have the system forget what it holds of the files."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_sequential(files: list[Path]) -> int:
    """Read the files from front to back into one buffer, 4 MiB at a time."""
    buffer, total = memoryview(bytearray(4 * 2**20)), 0
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while n := os.readv(descriptor, [buffer]):
            total += n
        os.close(descriptor)
    return total


def plain_threads(files: list[Path], threads: int) -> int:
    """Read the files in pieces of 4 MiB, in order, by several threads side by side: what the disk gives to whoever asks for much at once."""

    def piece(place: tuple[int, int]) -> int:
        return len(os.pread(place[0], 4 * 2**20, place[1]))

    opened = [os.open(path, os.O_RDONLY) for path in files]
    places = [(descriptor, start) for descriptor in opened for start in range(0, os.fstat(descriptor).st_size, 4 * 2**20)]
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(piece, places))
    for descriptor in opened:
        os.close(descriptor)
    return total


def through_samples(folder: Path, workers: int) -> int:
    """Read the cache group by group in a random order, every group checked."""
    samples = StoredSamples(ActivationCache(folder), ["a"], seed=1, workers=workers, ahead=4)
    return sum(value.numel() * value.element_size() for item in samples for value in item.values() if value.is_floating_point())


def through_batches(folder: Path, workers: int) -> int:
    """Read shuffled batches, as a training gets them."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryActivationsSource(name="cache", path=str(folder), num_workers=workers, prefetch=4)],
        hook_points=["a"], batch_size=4096, buffer_size=65_536, outlier_norm_factor=0,
    )  # fmt: skip
    return sum(batch["a"].numel() * batch["a"].element_size() for batch in ActivationFactory(cfg).process())


def throughput(args: argparse.Namespace) -> None:
    """Print the rates of interleaved cold readings."""
    torch.set_num_threads(1)
    width = args.width
    folder = args.folder / "throughput"
    n = int(args.gigabytes * 2**30) // (2 * width)
    if not (folder / "manifest.json").is_file():
        generator = torch.Generator().manual_seed(0)
        batches = ({"a": torch.randn(min(8192, n - start), width, generator=generator)} for start in range(0, n, 8192))
        cfg = ActivationWriterConfig(hook_points=["a"], cache_dir=str(folder), target=ActivationFactoryTarget.ACTIVATIONS_1D, dtype="float16")
        ActivationWriter(cfg).process(batches)
    files = sorted(folder.glob("shard-*"))
    arms: dict[str, Callable[[], int]] = {"plain sequential": lambda: plain_sequential(files)}
    arms["plain sequential, 4 threads"] = lambda: plain_threads(files, 4)
    for workers in (1, 2, 4):
        arms[f"cache, {workers} threads"] = lambda workers=workers: through_samples(folder, workers)
    arms["cache, 4 threads, shuffled batches"] = lambda: through_batches(folder, 4)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, read in arms.items():
            drop_from_memory(files)
            start = time.perf_counter()
            n_bytes = read()
            rates[name].append(n_bytes / (time.perf_counter() - start) / 2**30)
            print(f"{name}: {rates[name][-1]:.2f}", file=sys.stderr, flush=True)
    if not args.rounds:
        return
    print("| | GiB/s, median | least | most | of plain | of plain, 4 threads |\n|---|---|---|---|---|---|")
    for name, values in rates.items():
        ratios = (
            statistics.median(value / plain for value, plain in zip(values, rates[base], strict=True))
            for base in ("plain sequential", "plain sequential, 4 threads")
        )
        row = [f"{number:.2f}" for number in (statistics.median(values), min(values), max(values), *ratios)]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


# ---------------------------------------------------------------------------------------------------------- shuffle


def generate(folder: Path, tokens: int, dtype: str, **fields: Any) -> None:
    """A cache of the demo."""
    settings = GenerateActivationsSettings(
        model=LanguageModelConfig(model_name="demo", device="cpu"), dataset_name="demo", hook_points=[HOOK], output_dir=str(folder),
        model_batch_size=16, context_size=256, total_tokens=tokens, override_dtype=dtype,
        **{"target": ActivationFactoryTarget.ACTIVATIONS_1D, "n_samples_per_chunk": 65_536, **fields},
    )  # fmt: skip
    generate_activations(settings)


def contexts(tokens: int, width: int) -> Iterator[dict[str, Any]]:
    """Contexts of 256 positions with zeros for activations: shuffling depends on where rows go, not on what is in them."""
    mask = torch.ones(16, 256, dtype=torch.bool)
    mask[:, 0] = False
    for _ in range(-(-tokens // (16 * 255))):
        yield {HOOK: torch.zeros(16, 256, width), "tokens": torch.zeros(16, 256, dtype=torch.int64), "mask": mask}


def shuffle(args: argparse.Namespace) -> None:
    """Print the numbers of several ways to write and to read."""
    print("| written as | buffer_size | rank correlation | distances | pairs in a batch |\n|---|---|---|---|---|")
    written: dict[str, dict[str, Any]] = {
        "1d, shards of 65,536": {"n_samples_per_chunk": 65_536},
        "1d, blocks of 262,144": {"n_samples_per_chunk": 65_536, "buffer_size": 262_144},
        "2d, shards of 256 sequences": {"target": ActivationFactoryTarget.ACTIVATIONS_2D, "n_samples_per_chunk": 256},
    }
    for number, (name, fields) in enumerate(written.items()):
        folder = args.folder / f"shuffle-{number}"
        table = {"target": ActivationFactoryTarget.ACTIVATIONS_1D, "hook_points": [HOOK], "cache_dir": str(folder), "dtype": "float16", **fields}
        ActivationWriter(ActivationWriterConfig(**table)).process(contexts(args.tokens, args.width))
        for buffer_size in (None, BATCH, 16_384, 65_536, 262_144):
            quality = shuffle_quality(str(folder), buffer_size=buffer_size, batch_size=BATCH)
            shown = "in order" if buffer_size is None else f"{buffer_size:,}"
            print(
                f"| {name} | {shown} | {quality.rank_correlation:+.4f} | {quality.distance:.4f} | {quality.same_context_in_batch:.2f} |", flush=True
            )


# --------------------------------------------------------------------------------------------------------- training


def evaluate(sae: Any, model: Any, tokens: int) -> dict[str, Any]:
    """On held-out text, spliced into the language model."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name="demo")], target=ActivationFactoryTarget.ACTIVATIONS_2D, hook_points=[HOOK],
        batch_size=8, model_batch_size=8, context_size=256,
    )  # fmt: skip
    held_out = {"demo": DatasetConfig(dataset_name_or_path="demo", split="heldout")}
    return Evaluator(EvalConfig(total_eval_tokens=tokens)).evaluate(sae, ActivationFactory(cfg).process(model, datasets=held_out), model=model)


def train(folder: Path, tokens: int, seed: int) -> Any:
    """A TopK dictionary from a cache; no language model."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryActivationsSource(name="cache", path=str(folder), num_workers=1)], hook_points=[HOOK], batch_size=BATCH,
        buffer_size=65_536,
    )  # fmt: skip
    stream = ActivationFactory(cfg).process(seed=seed)
    sae_cfg = SAEConfig(hook_point_in=HOOK, d_model=192, expansion_factor=8, act_fn="topk", top_k=32)
    initializer = InitializerConfig(bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=True)
    sae = Initializer(initializer).initialize_sae_from_config(sae_cfg, stream, seed=seed)
    with tempfile.TemporaryDirectory() as run:
        trainer = TrainerConfig(
            total_training_tokens=tokens, lr=1e-3, lr_warm_up_steps=0.05, clip_grad_norm=1.0, auxk_coefficient=1 / 32, k_aux=96,
            dead_threshold=200_000, n_checkpoints=0, exp_result_path=run, seed=seed,
        )  # fmt: skip
        Trainer(trainer).fit(sae, stream)
    sae.fold_activation_scale()
    return sae


def training(args: argparse.Namespace) -> None:
    """Print what each data type costs, mean and half range over seeds, and the differences to float32 seed by seed."""
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in DTYPES}
    sizes = {}
    generate(args.folder / "original", args.tokens + 100_000, "float32")
    for dtype in DTYPES:  # the language model runs once; all arms get its activations in the same order
        source = ActivationFactoryActivationsSource(name="original", path=str(args.folder / "original"))
        stream = ActivationFactory(ActivationFactoryConfig(sources=[source], hook_points=[HOOK], batch_size=BATCH)).process()
        cfg = ActivationWriterConfig(hook_points=[HOOK], cache_dir=str(args.folder / dtype), target=ActivationFactoryTarget.ACTIVATIONS_1D,
                                     dtype=dtype, n_samples_per_chunk=65_536)  # fmt: skip
        manifest = ActivationWriter(cfg).process(stream)
        assert manifest is not None
        sizes[dtype] = manifest.bytes / manifest.tokens
        print(f"{dtype}: {sizes[dtype]:.0f} bytes per token", flush=True)
    model = load_model(LanguageModelConfig(model_name="demo", device="cpu"))
    for seed in range(args.seeds):
        for dtype in DTYPES:
            start = time.monotonic()
            result = evaluate(train(args.folder / dtype, args.tokens, seed), model, args.eval_tokens)
            results[dtype].append(result)
            print(json.dumps({"dtype": dtype, "seed": seed, "ev": result["metrics/explained_variance"], "delta_ce": result["metrics/delta_ce"],
                              "seconds": round(time.monotonic() - start)}), flush=True)  # fmt: skip
    print("\n| | bytes per token | explained variance | to float32 | ΔCE (nats) | to float32 |\n|---|---|---|---|---|---|")
    for dtype in DTYPES:
        cells = []
        for key in ("metrics/explained_variance", "metrics/delta_ce"):
            values = [result[key] for result in results[dtype]]
            paired = [value - base[key] for value, base in zip(values, results["float32"], strict=True)]
            cells.append(f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}")
            cells.append("–" if dtype == "float32" else f"{statistics.mean(paired):+.4f} ({min(paired):+.4f} to {max(paired):+.4f})")
        print(f"| {dtype} | {sizes[dtype]:.0f} | {' | '.join(cells)} |")


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["throughput", "shuffle", "training"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lm-saes-cache-benchmark")
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--eval-tokens", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", action="store_true", help="leave the caches where they are")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    {"throughput": throughput, "shuffle": shuffle, "training": training}[args.part](args)
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
