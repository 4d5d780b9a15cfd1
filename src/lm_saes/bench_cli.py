"""The command `lm-saes bench`; `cli.py` registers it. Like there, heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from lm_saes.errors import ConfigError

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Any field of SyntheticBenchmarkConfig: `--model.zipf_exponent 0.7 --l0 6`.")]

bench = App(name="bench", help="Benchmarks with known answers.", default_parameter=Parameter(negative=()))


@bench.command
def synthetic(
    *overrides: Overrides,
    size: Literal["mini", "16k"] = "mini",
    seeds: int = 1,
    kinds: str = "all",
    samples: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    baseline: list[str] | None = None,
) -> None:
    """Train dictionaries on activations that are made of known features, and score how well they find them (SynthSAEBench).

    What is done is kept and not done again; what was interrupted goes on when the command is given again.

    Parameters
    ----------
    size
        `mini` takes minutes; `16k` is the size of the paper and wants a GPU.
    seeds
        Dictionaries of each kind, from different starts and samples.
    kinds
        Which, separated by commas: batchtopk, matryoshka, matryoshka-annealed, topk, jumprelu, relu.
    samples
        Training samples for each dictionary, if not those of the size.
    out
        The folder of runs and scores; `runs/bench/synthetic_<size>` if left out. Each generator and protocol wants a folder of its own.
    device
        auto, cpu, cuda, cuda:N or mps.
    baseline
        Train and score a BatchTopK dictionary beside them that could not learn everything: `frozen-decoder` or `frozen-encoder`. May be given several
        times.
    """
    from lm_saes import bench_commands
    from lm_saes.config.base import parse_overrides

    changes = parse_overrides(overrides)
    if samples is not None:
        if "n_training_samples" in changes:
            raise ConfigError("--samples is n_training_samples; give one of the two")
        changes["n_training_samples"] = samples
    names = None if kinds == "all" else [name.strip() for name in kinds.split(",")]
    bench_commands.synthetic(size, seeds, names, {**changes, "device": device}, out or Path("runs/bench") / f"synthetic_{size}", baseline or ())
