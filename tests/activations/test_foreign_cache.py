"""Activations of other origins: matrices, chunk files, and files that want to be unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lm_saes.activations import foreign_cache
from lm_saes.errors import CacheError, ConfigError
from tests.activations.caches import TWO, cached


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_cache, "GROUP_BYTES", 200)


def rows(stream: Any, hook: str = "a") -> torch.Tensor:
    return torch.cat([batch[hook] for batch in stream])


def matrices(folder: Path, kind: str, dtype: Any = np.float32) -> torch.Tensor:
    """Three files with 10, 20 and 30 vectors of width 5."""
    folder.mkdir(parents=True)
    parts = [np.random.default_rng(n).normal(size=(n, 5)).astype(dtype) for n in (10, 20, 30)]
    for number, part in enumerate(parts):
        if kind == "npy":
            np.save(folder / f"{number}.npy", part)
        else:
            save_file({"embeddings": torch.from_numpy(part)}, folder / f"{number}.safetensors")
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_folder_of_matrices(tmp_path: Path, kind: str, dtype: Any) -> None:
    given = matrices(tmp_path / "vit", kind, dtype)
    fields = {"hook_points": ["a"], "batch_size": 1, "outlier_norm_factor": 0}
    assert torch.equal(rows(cached(tmp_path / "vit", buffer_size=None, **fields)), given)
    shuffled = rows(cached(tmp_path / "vit", buffer_size=30, **fields))
    assert not torch.equal(shuffled, given)
    assert torch.equal(shuffled[shuffled[:, 0].argsort()], given[given[:, 0].argsort()])
    batch = next(cached(tmp_path / "vit", hook_points=["a"], batch_size=4))
    assert (batch["tokens"].tolist(), batch["mask"].tolist()) == ([-1] * 4, [True] * 4)


def test_a_folder_for_each_hook_point_and_a_mapping_of_places(tmp_path: Path) -> None:
    matrices(tmp_path / "all" / "a", "npy")
    matrices(tmp_path / "all" / "b", "npy")
    batch = next(cached(tmp_path / "all", hook_points=["a", "b"], batch_size=9))
    assert torch.equal(batch["a"], batch["b"])
    batch = next(cached({"x": str(tmp_path / "all" / "a"), "y": str(tmp_path / "all" / "b" / "1.npy")} | {"x": str(tmp_path / "all" / "a" / "1.npy")},
                        hook_points=["x", "y"], batch_size=20))  # fmt: skip
    assert torch.equal(batch["x"], batch["y"])
    with pytest.raises(CacheError, match="path has no entry for hook point x"):
        cached({"y": "somewhere"}, hook_points=["x"])


def test_resuming_and_outliers(tmp_path: Path) -> None:
    given = matrices(tmp_path / "a", "npy")
    loud = np.load(tmp_path / "a" / "2.npy")
    loud[7] *= 1e4
    np.save(tmp_path / "a" / "2.npy", loud)
    fields = {"hook_points": ["a"], "batch_size": 7, "buffer_size": 20}
    whole = list(cached(tmp_path / "a", **fields))
    assert max(float(batch["a"].norm(dim=1).max()) for batch in whole) < 100
    stream = cached(tmp_path / "a", **fields)
    list(zip(range(3), stream, strict=False))
    resumed = cached(tmp_path / "a", **fields)
    resumed.load_state_dict(stream.state_dict())
    rest = list(resumed)
    assert torch.equal(rows(rest), rows(whole[len(whole) - len(rest) :]))
    assert resumed.counts()["dropped"]["outlier"] == 1
    assert len(given) == 60


def chunks(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Chunk files for two hook points: five sequences of six positions, the last two positions padded."""
    generator = torch.Generator().manual_seed(0)
    written: dict[str, list[torch.Tensor]] = {"h.0": [], "h.1": []}
    for number in range(3):
        tokens = torch.randint(0, 99, (5, 6), generator=generator)
        mask = torch.arange(6).repeat(5, 1) < 4
        for hook, parts in written.items():
            (folder / hook).mkdir(parents=True, exist_ok=True)
            activation = torch.randn(5, 6, 3, generator=generator)
            parts.append(activation[mask])
            tensors = {"activation": activation, "tokens": tokens, "mask": mask.clone(), "attention_mask": mask.clone()}
            path = folder / hook / f"shard-1-chunk-{number:08d}.{kind}"
            if kind == "pt":
                torch.save(tensors, path)
            else:
                save_file(tensors, path)
            meta = [{"context_idx": number * 5 + row, "dataset_name": "web", "shard_idx": 1, "n_shards": 2} for row in range(5)]
            path.with_suffix(".meta.json").write_text(json.dumps(meta))
    return {hook: torch.cat(parts) for hook, parts in written.items()}


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_chunk_files_of_upstream(tmp_path: Path, kind: str) -> None:
    given = chunks(tmp_path, kind)
    fields = {"hook_points": ["h.0", "h.1"], "buffer_size": None, "outlier_norm_factor": 0}
    for hook, values in given.items():
        assert torch.equal(rows(cached(tmp_path, batch_size=1, **fields), hook), values)
    sequences = list(cached(tmp_path, target=TWO, batch_size=5, **fields))
    assert [meta["context_idx"] for batch in sequences for meta in batch["meta"]] == list(range(15))
    assert sequences[0]["h.0"].shape == (5, 6, 3)
    assert sequences[0]["mask"].sum() == 20


def test_chunk_files_that_do_not_belong_together(tmp_path: Path) -> None:
    chunks(tmp_path, "safetensors")
    for number in range(3):
        path = tmp_path / "h.1" / f"shard-1-chunk-{number:08d}.safetensors"
        save_file({"activation": torch.randn(5, 6, 3), "tokens": torch.zeros(5, 6, dtype=torch.int64)}, path)
    with pytest.raises(CacheError, match="hold different tokens"):
        next(cached(tmp_path, hook_points=["h.0", "h.1"], batch_size=1))
    path.unlink()
    with pytest.raises(CacheError, match=r"each hook point needs as many files, got h\.0: 3, h\.1: 2"):
        cached(tmp_path, hook_points=["h.0", "h.1"], batch_size=1)


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in {
        "object.npy": lambda path: np.save(path, np.array([_Evil()], dtype=object), allow_pickle=True),
        "pickle.npy": lambda path: path.write_bytes(pickle.dumps(_Evil())),
        "torch.pt": lambda path: torch.save({"activation": _Evil()}, path),
        "pickle.pt": lambda path: path.write_bytes(pickle.dumps(_Evil())),
    }.items():  # fmt: skip
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        write(folder / name)
        with pytest.raises(CacheError, match=f"{name} cannot be read") as caught:
            cached(folder, hook_points=["a"], batch_size=1)
        assert "\n" not in str(caught.value)
        np.save(folder / "z.npy", np.ones((4, 2), dtype=np.float32))
        if name.endswith("npy"):
            assert len(rows(cached(folder, hook_points=["a"], batch_size=1, source={"skip_damaged": True}))) == 4
            assert f"skipping {folder / name}" in caplog.text
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: np.save(folder / "a.npy", np.ones((3, 4), dtype=np.int64)), "wanted float16, float32 or float64 in C order, got int64"),
        (lambda folder: np.save(folder / "a.npy", np.asfortranarray(np.ones((3, 4)))), "in C order"),
        (lambda folder: np.save(folder / "a.npy", np.ones(3)), r"wanted floating-point numbers \[n, D\] or \[n, S, D\]"),
        (lambda folder: np.save(folder / "a.npy", np.ones((0, 4))), r"wanted floating-point numbers"),
        (lambda folder: save_file({"x": torch.ones(2, 2), "y": torch.ones(2, 2)}, folder / "a.safetensors"), "wanted one tensor, or one named activation"),
        (lambda folder: save_file({"activation": torch.ones(2, 2), "mask": torch.ones(3)}, folder / "a.safetensors"), r"mask is \[3\]"),
        (lambda folder: (folder / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + b"\xff" * 40), "cannot be read"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b"\x00" * 4), "cannot be read"),
        (lambda folder: [np.save(folder / f"{n}.npy", np.ones((2, n))) for n in (3, 4)], r"holds \[4\] per sample"),
        (lambda folder: [np.save(folder / "a.npy", np.ones((2, 3))), save_file({"a": torch.ones(2, 2)}, folder / "b.safetensors")], "several kinds"),
        (lambda folder: None, "no activations; wanted"),
    ],
)  # fmt: skip
def test_files_that_are_no_activations(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(CacheError, match=message):
        cached(tmp_path, hook_points=["a"], batch_size=1)


def test_a_truncated_matrix_is_named(tmp_path: Path) -> None:
    matrices(tmp_path / "a", "npy")
    path = tmp_path / "a" / "1.npy"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CacheError, match=r"1\.npy cannot be read"):
        cached(tmp_path / "a", hook_points=["a"], batch_size=1)


def test_matrices_have_no_sequences(tmp_path: Path) -> None:
    matrices(tmp_path / "a", "npy")
    with pytest.raises(ConfigError, match="holds single activations"):
        cached(tmp_path / "a", hook_points=["a"], target=TWO, batch_size=1)
