"""How long a checkpoint holds up training: the pause, against a step and against the time of a plain copy of the same state; and what steps cost while the
copy is written.

    python benchmarks/checkpoints.py --width 512 --latents 8192 --buffer 100000
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

from lm_saes import SAEConfig, TrainerConfig
from lm_saes.activations.replay import state_bytes
from lm_saes.activations.shuffle import ShuffleBuffer
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training import loop
from lm_saes.training.run import Run

HOOK, BATCH = "blocks.0.hook_resid_post", 2048


class Activations:
    """Noise of some width, in items of a language model's batch, that comes again from its position."""

    def __init__(self, width: int) -> None:
        self.position, self._noise = 0, torch.randn(BATCH + 64, width)

    def __iter__(self) -> Activations:
        return self

    def __next__(self) -> dict[str, Any]:
        self.position += 1
        start = self.position % 64
        return {HOOK: self._noise[start : start + BATCH], "tokens": torch.arange(BATCH), "mask": torch.ones(BATCH, dtype=torch.bool)}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Timed(loop._Saving):
    """Takes the time of each save, and of a plain copy of what it copies."""

    seen: ClassVar[list[tuple[float, float, int]]] = []

    def save(self, runs: Any) -> Any:
        self._writer.wait()
        start = time.perf_counter()
        saved = super().save(runs)
        pause = time.perf_counter() - start
        self._writer.wait()
        training = [tensor for run in runs for tensor in (*run.sae.state_dict().values(), *run._training.state_tensors().values())]
        tensors = [*training, *(value for value in self._stream.state_dict().values() if isinstance(value, torch.Tensor))]
        start = time.perf_counter()
        copies = [tensor.clone() for tensor in tensors]
        copy = time.perf_counter() - start
        self.seen.append((pause, copy, state_bytes(copies)))
        return saved


def measure(width: int, latents: int, buffer: int, repeatable: bool, steps: int, every: int) -> dict[str, float]:
    """Seconds and bytes: medians over the checkpoints of a run."""
    Timed.seen = []
    loop._Saving = Timed  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(0)
    sae = SparseDictionary.from_config(SAEConfig(hook_point_in=HOOK, d_model=width, expansion_factor=latents / width, act_fn="topk", top_k=32))
    sae.set_dataset_average_activation_norm({HOOK: width**0.5})
    stream = ShuffleBuffer(Activations(width), BATCH, buffer, repeatable=repeatable)
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainerConfig(total_training_tokens=BATCH * steps, exp_result_path=folder, n_checkpoints=steps // every, check_point_save_mode="linear")
        run = Run(sae, cfg)
        times: list[float] = []
        original = run.step

        def step(batch: Any) -> None:
            start = time.perf_counter()
            original(batch)
            times.append(time.perf_counter() - start)

        run.step = step  # pyright: ignore[reportAttributeAccessIssue]
        loop.train([run], stream)
        on_disk = sum(path.stat().st_size for path in (Path(folder) / "checkpoints" / f"step_{steps}").rglob("*") if path.is_file())
    pause, copy, n_bytes = (statistics.median(values) for values in zip(*Timed.seen, strict=True))
    ratio = statistics.median(one[0] / one[1] for one in Timed.seen)
    return {"step": statistics.median(times), "pause": pause, "copy": copy, "ratio": ratio, "state": n_bytes, "disk": on_disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("latents", 8192), ("buffer", 100_000), ("steps", 20), ("every", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print("buffer     step ms   pause ms    copy ms   pause/copy   copied MB   on disk MB")
    for repeatable in (False, True):
        result = measure(given.width, given.latents, given.buffer, repeatable, given.steps, given.every)
        label = "origins" if repeatable else "entries"
        times = "".join(f"{1e3 * result[name]:11.1f}" for name in ("step", "pause", "copy"))
        print(f"{label}{times}{result['ratio']:13.2f}{result['state'] / 1e6:12.1f}{result['disk'] / 1e6:13.1f}")


if __name__ == "__main__":
    main()
