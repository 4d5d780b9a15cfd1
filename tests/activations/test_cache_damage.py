"""Caches that were damaged, and caches that were made to do harm: an error of one line that names the file, or a skip that is said."""

from __future__ import annotations

import json
import logging
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lm_saes.activations import writer as writer_module
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_format import MANIFEST_FILE
from lm_saes.errors import CacheError
from tests.activations.caches import ONE, TWO, cached, write
from tests.activations.fake import HOOKS


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 2000)


@pytest.fixture(params=[ONE, TWO], ids=lambda target: target.value)
def cache(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write(tmp_path, target=request.param, dtype="int8", n_samples_per_chunk=800 if request.param is ONE else 60)
    return tmp_path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


def read_all(folder: Path, **source: Any) -> int:
    stream = cached(folder, batch_size=16, source={"num_workers": 0, **source})
    return sum(len(batch["tokens"]) for batch in stream) + stream.counts()["remainder"]


@pytest.mark.parametrize("harm", ["missing", "cut short", "longer", "a link"])
def test_a_shard_that_is_not_there_in_its_length(cache: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    whole, victim = read_all(cache), shards(cache)[1]
    if harm == "missing":
        victim.unlink()
    elif harm == "a link":
        victim.rename(cache / "elsewhere")
        victim.symlink_to(cache / "elsewhere")
    else:
        data = victim.read_bytes()
        victim.write_bytes(data[:-100] if harm == "cut short" else data + b"more")
    with pytest.raises(CacheError, match=f"{victim.name} is damaged or missing: .*; write it again, or set skip_damaged = true"):
        cached(cache)
    with caplog.at_level(logging.WARNING, logger="lm_saes"):
        kept = read_all(cache, skip_damaged=True)
    assert 0 < kept < whole
    assert f"skipping damaged {victim.name}" in caplog.text
    assert [damage.file for damage in ActivationCache(cache, skip_damaged=True).verify()] == [victim.name]


def test_any_flipped_bit_is_found(cache: Path) -> None:
    """In the header, the activations, the scales, the tokens, the tables: by reading (but for bytes no reader looks at) and by `verify`."""
    victim = shards(cache)[1]
    data, draw = victim.read_bytes(), random.Random(1)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    found = 0
    places = [draw.randrange(8), *(draw.randrange(8, header) for _ in range(4)), *(draw.randrange(header, len(data)) for _ in range(12))]
    for place in places:
        victim.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
        assert [damage.file for damage in ActivationCache(cache).verify()] == [victim.name]
        with suppress(CacheError):
            read_all(cache)
            continue
        found += 1
    assert found >= 0.5 * len(places)  # single activations are read without the tables of their contexts
    victim.write_bytes(data)
    assert ActivationCache(cache).verify() == []


def test_a_flipped_bit_costs_its_group_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, dtype="float32", n_samples_per_chunk=800)
    whole, victim = read_all(tmp_path), shards(tmp_path)[1]
    data = bytearray(victim.read_bytes())
    samples = ActivationCache(tmp_path).read(15, HOOKS)
    assert samples is not None
    place = data.index(samples[HOOKS[0]].numpy().tobytes())
    data[place] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(
        CacheError, match=rf"{victim.name} is damaged or missing: samples \d+ to \d+ of activations/{HOOKS[0]} are not what was written"
    ):
        read_all(tmp_path)
    with caplog.at_level(logging.WARNING, logger="lm_saes"):
        stream = cached(tmp_path, source={"skip_damaged": True})
        kept = sum(len(batch["tokens"]) for batch in stream) + stream.counts()["remainder"]
    assert whole - kept == ActivationCache(tmp_path).manifest.samples_per_group == stream.counts()["damaged"]
    assert "passed over" in stream.description()
    assert caplog.text.count("skipping") == 1


def test_resuming_past_damage_gives_the_same_batches(tmp_path: Path) -> None:
    write(tmp_path, n_samples_per_chunk=800)
    for victim in shards(tmp_path)[1:3]:
        data = bytearray(victim.read_bytes())
        data[-5] ^= 1
        victim.write_bytes(bytes(data))
    fields = {"batch_size": 32, "source": {"skip_damaged": True}}
    whole = [batch["tokens"].tolist() for batch in cached(tmp_path, **fields)]
    for stop in (1, 20, 60):
        stream = cached(tmp_path, **fields)
        for _ in range(stop):
            next(stream)
        resumed = cached(tmp_path, **fields)
        resumed.load_state_dict(stream.state_dict())
        assert [batch["tokens"].tolist() for batch in resumed] == whole[stop:]


def test_nothing_but_damage(tmp_path: Path) -> None:
    write(tmp_path)
    for path in shards(tmp_path):
        path.unlink()
    with pytest.raises(CacheError, match="every shard of the cache is damaged"):
        read_all(tmp_path, skip_damaged=True)


# ---------------------------------------------------------------------------------------------------------- hostile


def with_manifest(folder: Path, change: Any) -> None:
    table = json.loads((folder / MANIFEST_FILE).read_text())
    change(table)
    (folder / MANIFEST_FILE).write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["shards"][0].update(file="../../etc/passwd"), "shards.0.file"),
        (lambda table: table["shards"][0].update(file="/etc/passwd"), "shards.0.file"),
        (lambda table: table["shards"][0].update(file="shard-0-of-1-00000000.safetensors/../x"), "shards.0.file"),
        (lambda table: table["shards"].append(table["shards"][0]), "the same shard is listed twice"),
        (lambda table: table.update(samples=10**18), "the shards' samples do not add up"),
        (lambda table: table["shards"][0].update(samples=-1), "shards.0.samples"),
        (lambda table: table.update(hook_points={"a": 2**60}), "the width of a hook point"),
        (lambda table: table.update(hook_points={}), "hook_points"),
        (lambda table: table.update(dtype="object"), "dtype"),
        (lambda table: table.update(samples_per_group=0), "samples_per_group"),
        (lambda table: table.update(extra=1), "has no field 'extra'"),
        (lambda table: table.pop("settings"), "settings"),
        (lambda table: table.update(schema_version=2), "schema version 2, this library reads up to 1; update the library"),
        (lambda table: table.update(format="other"), "format"),
    ],
)  # fmt: skip
def test_hostile_manifests(tmp_path: Path, change: Any, message: str) -> None:
    write(tmp_path)
    with_manifest(tmp_path, change)
    with pytest.raises(CacheError, match=message) as caught:
        cached(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b'{"schema_version": 1e999}', b"null"])
def test_manifests_that_are_none(tmp_path: Path, text: bytes) -> None:
    write(tmp_path)
    (tmp_path / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(CacheError, match=MANIFEST_FILE):
        cached(tmp_path)


def test_absurd_shapes_are_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path)
    with_manifest(tmp_path, lambda table: table["hook_points"].update({HOOKS[0]: 2**24}))
    with pytest.raises(CacheError, match=r"the manifest says torch.float32 \[300, 16777216\]"):
        read_all(tmp_path)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def replace_header(path: Path, table: Any, body: bytes) -> None:
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def overlapping(table: Any) -> None:
    table["tokens"]["data_offsets"] = table[f"activations/{HOOKS[0]}"]["data_offsets"]


def beyond(table: Any) -> None:
    table["tokens"]["data_offsets"] = [10**12, 10**12 + 1200]


def huge(table: Any) -> None:
    table["tokens"]["shape"] = [2**62, 2**62]


def checksums(table: Any) -> None:
    table["__metadata__"] = {"checksums": "{}"}


@pytest.mark.parametrize("harm", [overlapping, beyond, huge, checksums, lambda table: table.pop("tokens"), lambda table: table.pop("__metadata__")])
def test_hostile_shards(tmp_path: Path, harm: Any) -> None:
    write(tmp_path)
    victim = shards(tmp_path)[0]
    table, body = header_of(victim)
    harm(table)
    replace_header(victim, table, body)
    with_manifest(tmp_path, lambda manifest: manifest["shards"][0].update(bytes=victim.stat().st_size))
    with pytest.raises(CacheError, match=rf"{victim.name} is damaged or missing"):
        read_all(tmp_path)


def test_a_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    write(tmp_path)
    victim = shards(tmp_path)[0]
    victim.write_bytes(struct.pack("<Q", 2**62) + victim.read_bytes()[8:])
    with pytest.raises(CacheError, match=victim.name):
        read_all(tmp_path)
