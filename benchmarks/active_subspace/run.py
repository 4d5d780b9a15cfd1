"""Do attention outputs live in a small subspace, does that kill latents, and does it help to start inside it?

    pip install -r benchmarks/active_subspace/requirements.txt
    python benchmarks/active_subspace/run.py                          # everything; what results.jsonl has already is not done again
    python benchmarks/active_subspace/run.py --device cuda --large    # longer and wider
    python benchmarks/active_subspace/run.py --sources demo --no-depth --widths 16 --tokens 1048576 --arms random,active-auto,active-.25    # longer

1. `dimensions.json`: both measures of dimensionality at attention output, MLP output and residual stream of every block of the demo model and of MiniLM.
2. `results.jsonl`, one line for each dictionary: a TopK SAE for each arm (arms.py), width, seed and source of activations (sources.py, and
   lowrank.py, where the effective rank is chosen); tied random and both active subspaces also at every hook point of the demo model.
3. `tables.md` and `active_subspace.png` from these files (report.py).

Activations are captured once and kept in the folder `--cache`. Every arm of a seed sees the same tokens in the same order, and has the same centring.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, Arm, start
from lowrank import activations
from measure import Cost, quality
from sources import SOURCES, Captured, captured, contexts, documentation, open_model

from lm_saes import SAEConfig, Trainer, TrainerConfig, inspect_activations
from lm_saes.inspection.inspect import inspect_batches

HERE = Path(__file__).parent
RANKS = (0.3, 0.6, 0.9)
DOSE_ARMS = ("random", "active-auto", "active-.25")
INITIALISED_FROM = 16_384
"""Tokens, at least; as many as there are latents where those are more."""


@dataclass(frozen=True)
class Job:
    """One dictionary: the fields by which its line in the results is known."""

    source: str
    hook_point: str
    arm: str
    expansion: int
    k: int
    seed: int
    tokens: int
    batch: int

    def is_in(self, results: list[dict[str, Any]]) -> bool:
        return any(all(line.get(name) == value for name, value in asdict(self).items()) for line in results)


class Bench:
    """The models, what was captured, and what is done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results_path = options.out / "results.jsonl"
        self._captured: dict[tuple[str, str], Captured] = {}
        self._costs: dict[tuple[str, str], Cost] = {}

    @cached_property
    def models(self) -> dict[str, Any]:
        return {name: open_model(name, self.options.device) for name in self.options.sources if name in SOURCES}

    def dimensions(self) -> None:
        path = self.options.out / "dimensions.json"
        for name in (name for name in self.options.sources if name in SOURCES and name not in read_json(path)):
            text = "demo" if name == "demo" else documentation("train")
            report = inspect_activations(self.models[name], text=text, tokens=self.options.inspected, context_size=SOURCES[name].context_size)
            measured = {
                hook: {
                    "variance_99": record.dimensionality.variance_99_share,
                    "effective_rank": record.dimensionality.effective_rank_share,
                    "gamma": record.gamma,
                    "tokens": record.tokens,
                    "width": record.d_model,
                }
                for hook, record in report.hook_points.items()
            }
            path.write_text(json.dumps(read_json(path) | {name: measured}, indent=1) + "\n")

    # --------------------------------------------------------------------------------------------------------- jobs

    def jobs(self) -> Iterator[Job]:
        """What tells most first: the arms on the models, seed by seed; then the control, seed by seed; then the other hook points."""
        o = self.options
        for seed in range(o.seeds):
            for name in (name for name in o.sources if name != "synthetic"):
                for width in o.widths[name]:
                    yield from (Job(name, SOURCES[name].layer, arm, width, o.k, seed, o.tokens, o.batch) for arm in o.arms)
        if "synthetic" in o.sources:
            for seed, width, share in product(range(o.seeds), o.widths["synthetic"], RANKS):
                yield from (Job("synthetic", f"rank {share:g}", arm, width, o.k // 2, seed, o.tokens, o.batch) for arm in DOSE_ARMS)
        if "demo" in o.sources and o.depth:
            for hook in read_json(o.out / "dimensions.json")["demo"]:
                yield from (Job("demo", hook, arm, o.widths["demo"][0], o.k, 0, o.tokens, o.batch) for arm in DOSE_ARMS)

    def data(self, job: Job) -> Captured:
        if (job.source, job.hook_point) not in self._captured:
            o = self.options
            self._captured = {key: value for key, value in self._captured.items() if key[0] != job.source}  # one of each source in memory
            if job.source == "synthetic":
                share = float(job.hook_point.removeprefix("rank "))
                found = Captured(activations(share, o.tokens, seed=1), activations(share, o.heldout, seed=2), {"effective_rank": share})
            else:
                hooks = [SOURCES[job.source].layer]
                if job.hook_point not in hooks:
                    hooks = [hook for hook in read_json(o.out / "dimensions.json")["demo"] if hook not in hooks]
                found = captured(job.source, hooks, o.tokens, o.heldout, o.cache, self.models[job.source])[job.hook_point]
            self._captured[job.source, job.hook_point] = found
        return self._captured[job.source, job.hook_point]

    def cost(self, job: Job) -> Cost | None:
        if job.source not in SOURCES or job.hook_point != SOURCES[job.source].layer:
            return None
        if (job.source, job.hook_point) not in self._costs:
            model = self.models[job.source]
            self._costs[job.source, job.hook_point] = Cost(model, contexts(job.source, job.hook_point, self.options.spliced, model))
        return self._costs[job.source, job.hook_point]

    def run(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.dimensions()
        for job in self.jobs():
            if job.is_in(read_results(self.results_path)):
                continue
            data = self.data(job)
            line = {**asdict(job), **train(job, ARMS[job.arm], data, self.options.device, self.cost(job))}
            with self.results_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none where there is none yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def train(job: Job, arm: Arm, data: Captured, device: str, cost: Cost | None) -> dict[str, Any]:
    """Train and measure one dictionary."""
    width = data.train.shape[1]
    cfg = SAEConfig(hook_point_in=job.hook_point, d_model=width, expansion_factor=job.expansion, act_fn="topk", top_k=job.k, device=device)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(job.seed))[: job.tokens]
    batches = [{job.hook_point: data.train[rows].float(), "tokens": rows} for rows in order.split(job.batch)]
    n_start = -(-max(INITIALISED_FROM, cfg.d_sae) // job.batch)
    sae, d_active = start(arm, cfg, batches[:n_start], job.seed)
    heldout = data.heldout.to(sae.device)
    record = inspect_batches([{job.hook_point: data.heldout}], [job.hook_point], tokens=None)[job.hook_point]
    before = quality(sae, heldout)
    extra = {"k_aux": width // 2} if "auxk_coefficient" in arm.trainer else {}
    clock = time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = TrainerConfig(total_training_tokens=job.tokens, n_checkpoints=0, seed=job.seed, exp_result_path=folder, **arm.trainer, **extra)
        Trainer(trainer).fit(sae, batches)
    seconds = time.process_time() - clock
    after = quality(sae, heldout)
    return {
        "d_model": width, "d_sae": cfg.d_sae, "d_active": d_active, "lr": trainer.lr, "effective_rank": record.dimensionality.effective_rank_share,
        "variance_99": record.dimensionality.variance_99_share, "dead_start": before["dead"], "dead": after["dead"],
        "explained_variance_start": before["explained_variance"], "explained_variance": after["explained_variance"],
        "cost": None if cost is None else cost(sae), "cpu_seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
    }  # fmt: skip


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default="demo,minilm,synthetic", help="of demo, minilm, synthetic")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", help="latents over D, as 16,64, instead of those of each source")
    parser.add_argument("--tokens", type=int, default=262_144, help="training tokens of each dictionary")
    parser.add_argument("--heldout", type=int, default=24_576, help="tokens for explained variance; dead latents are judged on the first 20 F / k")
    parser.add_argument("--spliced", type=int, default=8_192, help="tokens for the cost of the reconstruction")
    parser.add_argument("--inspected", type=int, default=60_000, help="tokens for the dimensionalities")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32, help="active latents; half as many on synthetic activations")
    parser.add_argument("--no-depth", dest="depth", action="store_false", help="leave out the other hook points of the demo model")
    parser.add_argument("--large", action="store_true", help="for a GPU: 64 and 256 times the width, 50 million tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/active_subspace"))
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(words)
    options.sources, options.arms = options.sources.split(","), options.arms.split(",")
    unknown = [name for name in (*options.sources, *options.arms) if name not in {*SOURCES, "synthetic", *ARMS}]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    widths = {"demo": (16, 64), "minilm": (8, 32), "synthetic": (16, 64)}
    if options.widths:
        widths = dict.fromkeys(widths, tuple(int(width) for width in options.widths.split(",")))
    if options.large:
        widths = dict.fromkeys(widths, (64, 256))
        options.tokens, options.batch, options.heldout = 50_000_000, 8192, 131_072
    options.widths = widths
    return options


if __name__ == "__main__":
    chosen = options_of()
    torch.set_num_threads(chosen.threads)
    Bench(chosen).run()
    from report import write

    write(chosen.out)
