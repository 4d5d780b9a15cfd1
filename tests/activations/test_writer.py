"""Writing: killed and gone on with, by several processes, on a disk that gets full, and everything that is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_saes.activations import cache_progress
from lm_saes.activations import writer as writer_module
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_format import MANIFEST_FILE
from lm_saes.activations.cache_progress import exclusive, finish_as_it_stands
from lm_saes.activations.documents import ListedDocuments, ShardOfDocuments
from lm_saes.errors import CacheError, ConfigError, DataError, NonFiniteError
from tests.activations.caches import ONE, TEXTS, TWO, cached, text_stream, write, writer
from tests.activations.fake import HOOKS, FakeLanguageModel

ATTRIBUTES = {"outlier_norm_factor": 10.0}


class KilledError(Exception):
    """Stands for the end of a process."""


def killed_after(stream: Any, batches: int) -> Any:
    """The stream, until the process is killed."""

    class Killed:
        given = 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.given == batches:
                raise KilledError
            self.given += 1
            return next(stream)

        state_dict, load_state_dict = stream.state_dict, stream.load_state_dict

    return Killed()


def content(folder: Path) -> dict[str, bytes]:
    """All files but the counts, which say how often something was read."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    return {**files, "manifest": json.dumps({**manifest, "counts": None}).encode()}


@pytest.mark.parametrize(
    "fields",
    [{}, {"buffer_size": 800}, {"target": TWO, "n_samples_per_chunk": 13}, {"dtype": "int8", "total_generating_tokens": 1111},
     {"target": TWO, "n_samples_per_chunk": 9, "buffer_size": 30, "total_generating_tokens": 1500}],
    ids=["1d", "1d in blocks", "2d", "int8, cut", "2d in blocks, cut"],
)  # fmt: skip
def test_killed_anywhere_and_gone_on_with_it_writes_the_same_bytes(tmp_path: Path, fields: dict[str, Any]) -> None:
    write(tmp_path / "whole", **fields)
    killed, stopped_early = tmp_path / "killed", 0
    for batches in [1, 2, 3, 7, 11, 5, 3, 2]:
        try:
            writer(killed, **fields).process(killed_after(text_stream(), batches), settings=ATTRIBUTES)
        except KilledError:
            stopped_early += 1
            with pytest.raises(CacheError, match=r"not finished|no such file|no activations"):
                cached(killed)
    write(killed, **fields)
    assert stopped_early >= 5
    assert content(killed) == content(tmp_path / "whole")
    assert not [name for name in os.listdir(killed) if name.startswith(("progress", ".unfinished"))]


class Wrapped:
    """A stream of somebody else, whose state is nested and has a number and an array of NumPy in it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.given = inner, np.zeros(2, dtype=np.int64)

    def __iter__(self):
        return self

    def __next__(self):
        self.given += 1
        return next(self.inner)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "given": self.given, "number": self.given[0], "none yet": float("inf")}

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state["inner"])
        self.given[:] = state["given"]
        assert self.given[1] == state["number"]


def test_a_stream_of_somebody_else_is_gone_on_with(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    killed = tmp_path / "killed"
    with pytest.raises(KilledError):
        writer(killed).process(killed_after(Wrapped(text_stream()), 11), settings=ATTRIBUTES)
    assert list(killed.glob("progress*"))
    writer(killed).process(Wrapped(text_stream()), settings=ATTRIBUTES)
    assert content(killed) == content(tmp_path / "whole")


def test_killed_between_two_shards_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"n_samples_per_chunk": 100, "buffer_size": 500}
    write(tmp_path / "whole", **fields)
    original, calls = writer_module.write_shard, [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise KilledError
        return original(*args)

    monkeypatch.setattr(writer_module, "write_shard", failing)
    for _ in range(40):
        try:
            write(tmp_path / "killed", **fields)
            break
        except KilledError:
            continue
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_process_that_is_killed_by_the_system_leaves_whole_shards_only(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.activations.caches import text_stream, writer
writer(Path({str(tmp_path / "killed")!r})).process(text_stream(), settings={ATTRIBUTES!r},
                                                  report=lambda tokens, n: os.kill(os.getpid(), 9) if tokens > 1000 else None)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == -9
    shards = sorted(path.name for path in (tmp_path / "killed").glob("shard-*"))
    assert len(shards) == 4
    write(tmp_path / "whole")
    for name in shards:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    write(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_several_processes_write_one_cache_and_the_last_finishes_it(tmp_path: Path) -> None:
    documents = ListedDocuments("text", TEXTS)
    for part in range(3):
        stream = text_stream(texts=ShardOfDocuments(documents, part, 3))  # pyright: ignore[reportArgumentType]
        manifest = writer(tmp_path, n_shards=3).process(stream, start_shard=part, settings=ATTRIBUTES)
        assert (manifest is None) == (part < 2)
        if part < 2:
            with pytest.raises(CacheError, match="is not finished"):
                cached(tmp_path)
    assert manifest is not None
    assert manifest.parts == len(manifest.counts) == 3
    parts = [sum(batch["mask"].sum() for batch in text_stream(texts=ShardOfDocuments(documents, part, 3))) for part in range(3)]  # pyright: ignore[reportArgumentType]
    assert manifest.tokens == sum(parts)
    assert sum(len(batch["tokens"]) for batch in cached(tmp_path, batch_size=1)) == manifest.tokens


@pytest.mark.parametrize("target", [ONE, TWO], ids=lambda target: target.value)
def test_the_token_limit(tmp_path: Path, target) -> None:
    manifest = write(tmp_path, target=target, total_generating_tokens=777)
    longest = 0 if target is ONE else 15
    assert 777 <= manifest.tokens <= 777 + longest


def test_writing_a_finished_cache_again_does_nothing_and_another_one_is_refused(tmp_path: Path) -> None:
    model = FakeLanguageModel()
    first = write(tmp_path, text_stream(model))
    calls = len(model.calls)
    assert write(tmp_path, text_stream(model)) == first
    assert len(model.calls) == calls
    with pytest.raises(CacheError, match="holds a finished cache with dtype = None, got 'float16'; choose another folder"):
        write(tmp_path, dtype="float16")


def test_going_on_with_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        writer(tmp_path).process(killed_after(text_stream(), 40), settings=ATTRIBUTES)
    with pytest.raises(CacheError, match="was begun with seed = 3, got 4; go on with the settings it was begun with"):
        write(tmp_path, seed=4)
    with pytest.raises(ConfigError, match="the saved stream had seed = 3, this one has 9"):
        write(tmp_path, text_stream(seed=9))
    with pytest.raises(CacheError, match="cannot be gone on with: this stream has no state"):
        write(tmp_path, ({**batch} for batch in text_stream()))
    (tmp_path / "shard-0-of-1-00000001.safetensors").unlink()
    with pytest.raises(CacheError, match=r"00000001\.safetensors was written and is gone or cut short"):
        write(tmp_path)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path, "0-of-1"), pytest.raises(CacheError, match=rf"part 0-of-1, is being written by process {os.getpid()} on"):
        write(tmp_path)
    write(tmp_path)


def test_a_disk_that_gets_full_is_said_before_and_each_finished_shard_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, original = [3], cache_progress.shutil.disk_usage

    def shrinking(path: Any) -> Any:
        room[0] -= 1
        return original(path)._replace(free=10**9 if room[0] >= 0 else 1000)

    monkeypatch.setattr(cache_progress.shutil, "disk_usage", shrinking)
    with pytest.raises(
        CacheError, match=r"is full \(the next shard needs .* are free\); 3 shards with 900 tokens are kept: free some space and run again"
    ):
        write(tmp_path / "full")
    assert len(list((tmp_path / "full").glob("shard-*"))) == 3
    room[0] = 100
    write(tmp_path / "full")
    write(tmp_path / "whole")
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def test_a_write_that_fails_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = writer_module.write_shard, [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(writer_module, "write_shard", failing)
    with pytest.raises(CacheError, match=r"is full \(a write failed\); 2 shards with 600 tokens are kept"):
        write(tmp_path)
    manifest = finish_as_it_stands(tmp_path)
    assert (manifest.tokens, manifest.complete) == (600, False)
    assert ActivationCache(tmp_path).verify() == []
    assert sum(len(batch["tokens"]) for batch in cached(tmp_path, batch_size=10)) == 600
    with pytest.raises(CacheError, match="is finished"):
        finish_as_it_stands(tmp_path)
    with pytest.raises(CacheError, match="holds no cache that was begun"):
        finish_as_it_stands(tmp_path.parent)


def test_numbers_that_are_none_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = FakeLanguageModel()
    model.scale[ord("q")] = float("nan")
    with pytest.raises(NonFiniteError, match=r"activations at blocks.1.hook_resid_post are NaN or infinite"):
        write(tmp_path / "nan", text_stream(model))
    model.scale[ord("q")] = 1e6
    with pytest.raises(NonFiniteError, match=r'are too large for torch\.float16; store them as "bfloat16"'):
        write(tmp_path / "large", text_stream(model, outlier_norm_factor=0), dtype="float16")
    write(tmp_path / "int8", text_stream(model, outlier_norm_factor=0), dtype="int8")


def test_streams_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the stream ended before it gave a sample"):
        write(tmp_path, iter(()))
    with pytest.raises(DataError, match="the stream has no hook point x; it has"):
        write(tmp_path, hook_points=["x"])
    with pytest.raises(ConfigError, match=r"a cache of sequences \(activations-2d\) needs batches of sequences"):
        write(tmp_path, ({HOOKS[0]: torch.randn(3, 4)} for _ in range(3)), target=TWO, hook_points=HOOKS[:1])
    with pytest.raises(ConfigError, match="executor must be None"):
        writer_module.ActivationWriter(writer(tmp_path).cfg, executor=object())
    with pytest.raises(ConfigError, match="device_mesh must be None"):
        writer(tmp_path).process([], device_mesh=object())
    with pytest.warns(UserWarning, match="num_workers"):
        writer(tmp_path, num_workers=2)
