"""Memory that does not grow: buffers keep to their budgets, and ten thousand steps need what a hundred need. Measured, not computed."""

from __future__ import annotations

import gc
import multiprocessing
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes.activations.documents import Document, Documents
from lm_saes.activations.factory import ActivationFactory
from lm_saes.activations.prefetch import Prefetch
from lm_saes.activations.shuffle import Rebatch, ShuffleBuffer
from lm_saes.config import ActivationFactoryConfig, ActivationFactoryDatasetSource, SAEConfig, TrainerConfig
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.loggers import Logger
from lm_saes.training.trainer import Trainer
from tests.activations.caches import text_stream, write
from tests.activations.fake import HOOKS, WIDTH, FakeLanguageModel

MIB = 2**20


def live_bytes() -> int:
    """Bytes of all tensors that Python knows, each memory counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # isinstance would ask proxies of other libraries; sparse tensors, which only tests hold as they are, have no storage
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """What the operating system has given this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Wide:
    """Endless items of `n` activations of 4 KiB."""

    def __init__(self, n: int) -> None:
        self.n, self.given = n, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        self.given += 1
        return {"x": torch.full((self.n, 1024), float(self.given)), "tokens": torch.zeros(self.n, dtype=torch.int64)}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: Any) -> None:
        self.given = state["given"]


ITEM, BATCH = 64, 32
PER_ENTRY = 4096 + 8


def test_a_shuffle_buffer_keeps_to_its_budget() -> None:
    """Beside it there are at most the item that is being read, the batch that is given out, and one more of either while it is copied."""
    budget = 4 * MIB
    before = live_bytes()
    buffer = ShuffleBuffer(Wide(ITEM), BATCH, capacity=10**6, max_bytes=budget)
    for step in range(200):
        batch = next(buffer)
        if step % 20 == 0:
            used = live_bytes() - before
            assert used <= budget + 2 * (ITEM + BATCH) * PER_ENTRY
    assert buffer.allocated_bytes <= budget
    assert live_bytes() - before >= 0.9 * budget  # it is used, too
    del batch


def grown_by_a_buffer(budget: int) -> int:
    """Resident bytes that a shuffle buffer adds to a process."""
    warm = ShuffleBuffer(Wide(ITEM), BATCH, capacity=512, max_bytes=2 * MIB)
    for _ in range(20):
        next(warm)
    before = resident_bytes()
    buffer = ShuffleBuffer(Wide(ITEM), BATCH, capacity=10**6, max_bytes=budget)
    for _ in range(100):
        next(buffer)
    return resident_bytes() - before


def test_the_operating_system_sees_the_same() -> None:
    budget = 96 * MIB
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # this process may hold freed memory already, from tests before
        grown = fresh.apply(grown_by_a_buffer, (budget,))
    assert 0.8 * budget < grown < 1.2 * budget, f"{grown / MIB:.1f} MiB"


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_reading_ahead_holds_as_many_batches_as_it_says(depth: int) -> None:
    before = live_bytes()
    ahead = Prefetch(Rebatch(Wide(ITEM), BATCH), depth)
    try:
        for _ in range(30):
            next(ahead)
        with ahead.paused():
            used = live_bytes() - before
    finally:
        ahead.close()
    assert used <= (2 * depth + 4) * ITEM * PER_ENTRY  # views of batches keep the items they were cut from


def test_writing_a_cache_holds_one_block(tmp_path: Path) -> None:
    """However long the text is: `buffer_size` samples, and a copy of one shard."""
    texts = [f"document {index}: the quick fox number {index * 7} jumps over {index} lazy dogs and goes home again" for index in range(400)]
    most = [0]
    before = live_bytes()

    class Watched:
        def __init__(self) -> None:
            self.stream = text_stream(texts=texts)

        def __iter__(self) -> Any:
            for number, batch in enumerate(self.stream):
                if number % 200 == 100:
                    most[0] = max(most[0], live_bytes() - before)
                yield batch

    manifest = write(tmp_path, Watched(), n_samples_per_chunk=500, buffer_size=2000)
    per_sample = 2 * WIDTH * 4 + 8 + 3 * 4
    assert manifest.samples > 25_000
    block = 2000 * per_sample
    contexts = manifest.samples // 2 * 0 + 2000 * 17 * 4  # at most a context of 16 tokens for each sample of the block
    assert most[0] <= 2 * block + contexts + 64 * 1024, most[0]


# --------------------------------------------------------------------------------------------------- ten thousand steps


class Endless(Documents):
    """A million documents that are made when they are read."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Document:
        return Document(f"document {index}", f"the quick fox number {index * 7} jumps over {index} lazy dogs and goes home again")


class Gauge(Logger):
    """Looks at the memory at some steps."""

    def __init__(self, at: list[int]) -> None:
        self.at, self.tensors, self.objects, self.resident = at, [], [], []

    def progress(self, step: int) -> None:
        if step in self.at:
            self.tensors.append(live_bytes())
            self.objects.append(len(gc.get_objects()))
            self.resident.append(resident_bytes())


def train(steps: int, at: list[int], folder: Path) -> Gauge:
    """From text to weights: language model, shuffle buffer, training with every statistic, metrics, checkpoints."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name="text")], hook_points=HOOKS[:1], batch_size=64, buffer_size=1024, context_size=16, model_batch_size=4
    )  # fmt: skip
    stream = ActivationFactory(cfg).process(model=FakeLanguageModel(), datasets={"text": Endless()})
    sae = SparseDictionary.from_config(
        SAEConfig(hook_point_in=HOOKS[0], d_model=WIDTH, expansion_factor=8, act_fn="batchtopk", top_k=4, norm_activation="batch-wise")
    )
    trainer = TrainerConfig(
        total_training_tokens=64 * steps, exp_result_path=str(folder), n_checkpoints=4, check_point_save_mode="linear", log_frequency=10,
        auxk_coefficient=1 / 32, k_aux=8, non_finite="skip",
    )  # fmt: skip
    gauge = Gauge(at)
    Trainer(trainer, loggers=[gauge]).fit(sae, stream)
    assert len(gauge.tensors) == len(at)
    return gauge


def test_hundreds_of_steps_hold_no_more_than_the_first(tmp_path: Path) -> None:
    gauge = train(400, [250, 390], tmp_path)  # after the first checkpoints, which load what writes them
    assert abs(gauge.tensors[1] - gauge.tensors[0]) < 64 * 1024, gauge.tensors  # items of one size or another wait to be given out
    assert gauge.objects[1] - gauge.objects[0] < 70, gauge.objects  # less than one in two steps


@pytest.mark.slow
def test_ten_thousand_steps_hold_no_more_than_the_first(tmp_path: Path) -> None:
    gauge = train(10_000, [3990, 6990, 9990], tmp_path)
    print(f"\ntensors {gauge.tensors}, objects {gauge.objects}, resident {[value / MIB for value in gauge.resident]} MiB")
    assert abs(gauge.tensors[2] - gauge.tensors[0]) < 64 * 1024
    assert gauge.objects[2] - gauge.objects[0] < 600
    assert gauge.resident[2] - gauge.resident[0] < 8 * MIB
