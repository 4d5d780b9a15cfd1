"""Faults of data and of the language model: what the user sees, what is kept, what continues. `docs/reliability.md` has them as a table.

Every test runs the command line and asserts the very line that it prints.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes import generate as generate_module
from lm_saes.lm.huggingface import HuggingFaceLanguageModel
from tests.faults.terminal import HOOK, WIDTH, Terminal, changed, checkpoints, generation, make_material, settings_file, terminal, training, weights
from tests.lm.tiny_models import save_tiny


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training without faults: its folder."""
    from lm_saes.config import TrainSAESettings
    from lm_saes.runners import train_sae

    folder = tmp_path_factory.mktemp("whole") / "run"
    train_sae(TrainSAESettings.model_validate(training(material, folder)))
    return folder


@pytest.fixture
def lm_saes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.setattr(generate_module.estimate_generation, "__defaults__", (None, 0.05))
    return terminal(monkeypatch, capsys)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def text_of(tmp_path: Path, name: str, data: bytes) -> str:
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


# --------------------------------------------------------------------------------------------------- a model that fails


def failing(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception) -> None:
    """The language model raises on its forward number `after` + 1."""
    forward, calls = HuggingFaceLanguageModel.inputs, [0]

    def inputs(self: Any, ids: Any, attention_mask: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return forward(self, ids, attention_mask)

    monkeypatch.setattr(HuggingFaceLanguageModel, "inputs", inputs)


def failing_forward(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception) -> None:
    """A module inside the language model raises."""
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

    forward, calls = GPTNeoXMLP.forward, [0]

    def raising(self: Any, x: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return forward(self, x)

    monkeypatch.setattr(GPTNeoXMLP, "forward", raising)


def test_a_language_model_that_raises_while_training(
    material: Path, whole: Path, run: Path, tmp_path: Path, lm_saes: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings_file(tmp_path, training(material, run))
    with monkeypatch.context() as patch:
        failing_forward(patch, 14, RuntimeError("CUBLAS_STATUS_INTERNAL_ERROR\nat line 5"))
        assert lm_saes("train", path).line == (
            f"the language model {material / 'model'} failed (RuntimeError: CUBLAS_STATUS_INTERNAL_ERROR at line 5) on 4 rows of 32 tokens; "
            "what was written before is kept; run again to go on (train: --resume)"
        )
    assert checkpoints(run) == ["step_4", "step_8"]
    assert lm_saes("train", path, "--resume").code == 0
    assert weights(run) == weights(whole)


def test_a_language_model_that_runs_out_of_memory(
    material: Path, run: Path, tmp_path: Path, lm_saes: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_forward(monkeypatch, 14, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert lm_saes("train", settings_file(tmp_path, training(material, run))).line == (
        f"the language model {material / 'model'} ran out of memory on 4 rows of 32 tokens; lower model_batch_size or context_size"
    )


def test_a_language_model_that_raises_while_generating(material: Path, tmp_path: Path, lm_saes: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, clean = tmp_path / "cache", tmp_path / "clean"
    (tmp_path / "clean.json").write_text(json.dumps(generation(material, clean)))
    assert lm_saes("generate", tmp_path / "clean.json").code == 0
    path = settings_file(tmp_path, generation(material, cache))
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "estimate_generation", lambda *_, **__: generate_module.GenerationEstimate(None, 1.0, None, 2**40, 1.0))
        failing_forward(patch, 11, ZeroDivisionError("division by zero"))
        assert (
            "failed (ZeroDivisionError: division by zero) on 4 rows of 32 tokens; what was written before is kept" in lm_saes("generate", path).line
        )
    kept = sorted(file.name for file in cache.glob("shard-*"))
    assert 0 < len(kept) < 4
    assert lm_saes("generate", path).code == 0
    for shard in clean.glob("shard-*"):
        assert (cache / shard.name).read_bytes() == shard.read_bytes()


# ------------------------------------------------------------------------------------------------------------- text


def test_text_that_ends_early(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    said = lm_saes("train", settings_file(tmp_path, training(material, run, trainer__total_training_tokens=10**6)))
    assert said.code == 0
    assert "the stream ended after step " in said.out + said.error
    assert "the learning rate and other schedules did not reach their end" in said.out + said.error
    assert (run / "sae_weights.safetensors").is_file()
    assert "used up: text" in said.out


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("none.jsonl", b"", "dataset 'text' holds no documents"),
        ("blank.jsonl", b"\n \n", "dataset 'text' holds no documents"),
        (
            "empty.jsonl",
            b'{"text": ""}\n{"text": null}\n{"text": " "}\n',
            "the text ended before one batch of 128 was full (kept 0 of 0 tokens; 3 documents (3 empty); used up: text); use more text or a smaller batch_size",
        ),
        (
            "short.jsonl",
            b'{"text": "ab"}',
            "the text ended before one batch of 128 was full (kept 0 of 2 tokens; dropped 2 in rows that were not full; 1 documents; used up: text); "
            "use more text or a smaller batch_size",
        ),
    ],
)
def test_text_that_holds_nothing(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal, name: str, data: bytes, line: str) -> None:
    path = settings_file(tmp_path, training(material, run, datasets__text={"dataset_name_or_path": text_of(tmp_path, name, data)}))
    assert lm_saes("train", path).line == line
    assert not run.exists()


def test_some_documents_are_empty(material: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    """They are counted and said, and leave no trace in what is learned, not even a separator: the same weights as without them."""
    document = (material / "text.jsonl").read_bytes().splitlines()[0]  # all the same, so that the order in which they are read does not matter
    empty = [b'{"text": ""}', b'{"text": null}', b'{"text": " \\n"}'] * 8
    counted = {}
    for name, documents in (("without", [document] * 24), ("with", [document, *empty] * 24)):
        text = {"dataset_name_or_path": text_of(tmp_path, f"{name}.jsonl", b"\n".join(documents))}
        said = lm_saes("train", settings_file(tmp_path, training(material, tmp_path / name, datasets__text=text)))
        assert said.code == 0
        (counted[name],) = (line for line in said.out.splitlines() if line.startswith("kept "))
    tokens, _, documents = counted["without"].rpartition("; ")
    read = re.fullmatch(re.escape(tokens) + r"; (\d+) documents \((\d+) empty\)", counted["with"])
    assert read is not None, counted
    assert int(read[1]) - int(read[2]) == int(documents.split()[0]) < 24
    assert int(read[2]) >= 3
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "is not valid JSON: Unterminated string starting at: line 1 column 10 (char 9)"),
        (b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not valid JSON: it holds a number of thousands of digits"),
        (b'{"text": [1, 2]}', "column 'text' must hold text, got list [1, 2]; set text_column to a column of text"),
        (b'{"words": "a"}', "has no column 'text' (columns: words; set text_column)"),
    ],
)
def test_a_line_of_text_that_is_none(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal, line: bytes, reason: str) -> None:
    good = (material / "text.jsonl").read_bytes()
    path = text_of(tmp_path, "bad.jsonl", good + b"\n" + line)
    said = lm_saes(
        "train", settings_file(tmp_path, training(material, run, datasets__text={"dataset_name_or_path": path}, trainer__total_training_tokens=10**5))
    )
    assert said.line.replace("bad.jsonl:61:", "bad.jsonl:61") == f"bad.jsonl:61 {reason}"


def test_text_that_is_not_utf_8(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    """It is repaired, counted and said; training goes on."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.txt").write_bytes(f"document {index} ".encode() * 30 + (b"\xff\xfe\x00 caf\xe9 " if index % 2 else b""))
    said = lm_saes("train", settings_file(tmp_path, training(material, run, datasets__text={"dataset_name_or_path": str(folder)})))
    assert said.code == 0
    assert "with invalid UTF-8, repaired)" in said.out


@pytest.mark.parametrize("kind", ["one line", pytest.param("no spaces", marks=pytest.mark.slow)])
def test_a_document_of_many_megabytes(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal, kind: str) -> None:
    """Read in pieces: what is tokenised at a time is bounded, and a run needs only as much of it as it has tokens."""
    words = b"some words of a very long document " if kind == "one line" else b"abcdefghij"
    path = text_of(tmp_path, "huge.txt", words * (30_000_000 // len(words)))
    said = lm_saes("train", settings_file(tmp_path, training(material, run, datasets__text={"dataset_name_or_path": path})))
    assert said.code == 0
    assert "; 1 documents" in said.out


@pytest.mark.parametrize(("kind", "what"), [("parquet", "cannot read {path}: "), ("arrow", "cannot read {path} as a dataset on disk: ")])
def test_tables_that_are_cut_short(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal, kind: str, what: str) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": [f"words of document {index} " * 20 for index in range(200)]})
    if kind == "parquet":
        path = tmp_path / "text.parquet"
        table.to_parquet(path)
        victim = path
    else:
        path = tmp_path / "saved"
        table.save_to_disk(path)
        victim = next(path.glob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    dataset = {"dataset_name_or_path": str(path), "cache_dir": str(tmp_path / "hub")}
    said = lm_saes("train", settings_file(tmp_path, training(material, run, datasets__text=dataset)))
    assert said.line.startswith(what.format(path=path)) or said.line.startswith("cannot read saved[")


# ------------------------------------------------------------------------------------------ tokens and widths that do not fit


def test_token_ids_beyond_the_vocabulary(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    path = text_of(tmp_path, "ids.jsonl", b"\n".join(json.dumps({"tokens": [5, 6, 7, 99_999] * 50}).encode() for _ in range(20)))
    source = {"type": "dataset", "name": "text", "is_dataset_tokenized": True}
    table = training(material, run, datasets__text={"dataset_name_or_path": path}, activation_factory__sources=[source])
    line = lm_saes("train", settings_file(tmp_path, table)).line
    assert line.startswith("token ids must be between 0 and ")
    assert line.endswith(f" for {material / 'model'}, got 0 to 99999; use text that was tokenised for this model")
    text_of(tmp_path, "ids.jsonl", b"\n".join(json.dumps({"tokens": [5, 2**70]}).encode() for _ in range(20)))
    assert lm_saes("train", settings_file(tmp_path, table)).line.endswith(
        ": a tokenised dataset holds lists of token ids (integers, not negative, below 2^31), got list [5, 1180591620717411303424]"
    )


def test_a_tokenizer_that_is_not_the_models(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    model = tmp_path / "model"
    shutil.copytree(material / "model", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {"id": 10**6, "content": "<beyond>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    )
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = lm_saes("train", settings_file(tmp_path, training(material, run, model__model_name=str(model)))).line
    assert line.startswith("the tokenizer goes up to id ")
    assert line.endswith("tokens; use the model's own tokenizer")


def test_a_cache_of_another_tokenizer(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    cache = tmp_path / "cache"
    assert lm_saes("generate", settings_file(tmp_path, generation(material, cache))).code == 0
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["provenance"]["model_identity"]["tokenizer_hash"] = "0" * 64
    (cache / "manifest.json").write_text(json.dumps(manifest))
    source = [{"type": "activations", "name": "text", "path": str(cache)}]
    assert lm_saes("train", settings_file(tmp_path, training(material, run, activation_factory__sources=source))).line == (
        f"source 'text' was written with another tokenizer than that of {material / 'model'}; use the model that it was written with"
    )


def test_a_hook_point_of_another_width(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    assert lm_saes("train", settings_file(tmp_path, training(material, run, sae__d_model=48))).line == (
        f"d_model is 48, but '{HOOK}' is {WIDTH} wide; set sae.d_model = {WIDTH}"
    )
    cache = tmp_path / "cache"
    assert lm_saes("generate", settings_file(tmp_path, generation(material, cache))).code == 0
    table = training(material, run, activation_factory__sources=[{"type": "activations", "name": "text", "path": str(cache)}], sae__d_model=48)
    table.pop("model")
    table.pop("datasets")
    assert lm_saes("train", settings_file(tmp_path, table)).line == f"d_model is 48, but '{HOOK}' is {WIDTH} wide on disk; set sae.d_model = {WIDTH}"
    save_tiny("gpt_neox", tmp_path / "wide", hidden_size=64)
    table = training(material, run, activation_factory__sources=[{"type": "activations", "name": "text", "path": str(cache)}])
    table["model"] = {"model_name": str(tmp_path / "wide")}
    assert lm_saes("train", settings_file(tmp_path, table)).line.startswith(f"d_model is {WIDTH}, but '{HOOK}' is 64 wide")
    assert not run.exists()


# ------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("harm", ["cut short", "a flipped bit"])
def test_a_damaged_shard(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal, harm: str) -> None:
    cache = tmp_path / "cache"
    assert lm_saes("generate", settings_file(tmp_path, generation(material, cache))).code == 0
    victim = sorted(cache.glob("shard-*"))[1]
    data = bytearray(victim.read_bytes())
    size = len(data)
    if harm == "cut short":
        data = data[: size // 2]
    else:
        header = 8 + int.from_bytes(data[:8], "little")
        data[header + (size - header) // 2] ^= 4  # among the activations, which stand first
    victim.write_bytes(data)
    table = training(material, run, activation_factory__sources=[{"type": "activations", "name": "text", "path": str(cache)}])
    table.pop("model")
    table.pop("datasets")
    line = lm_saes("train", settings_file(tmp_path, table)).line
    what = (
        f"it has {len(data):,} bytes instead of {size:,}"
        if harm == "cut short"
        else f"samples 0 to 499 of activations/{HOOK} are not what was written (checksum)"
    )
    assert line == f"{victim} is damaged or missing: {what}; write it again, or set skip_damaged = true"
    assert lm_saes("cache", "verify", cache).line == (
        f"1 of 4 shards of {cache} are damaged or missing, first {victim.name}; write it again or set skip_damaged"
    )
    changed(table["activation_factory"]["sources"][0], {"skip_damaged": True})
    said = lm_saes("train", settings_file(tmp_path, changed(table, {"trainer__total_training_tokens": 1024, "trainer__exp_result_path": f"{run}2"})))
    assert said.code == 0


FILES = ("sae_weights.safetensors", "optimizer.safetensors", "stream/tensors.safetensors", "state.json")
QUICK = [("state.json", "missing"), ("optimizer.safetensors", "cut short"), *((name, "a flipped bit") for name in FILES)]
REST = [(name, harm) for name in FILES for harm in ("cut short", "missing") if (name, harm) not in QUICK]


@pytest.mark.parametrize(("name", "harm"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_a_damaged_checkpoint(material: Path, whole: Path, tmp_path: Path, lm_saes: Terminal, name: str, harm: str) -> None:
    """The one before is gone on from, and the run ends as if nothing had happened."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for left in ("sae_weights.safetensors", "config.json"):
        (run / left).unlink()
    newest = run / "checkpoints" / checkpoints(run)[-1]
    victim = newest / name
    if not victim.is_file():  # how the stream's state is kept is its own affair
        pytest.skip(f"checkpoints have no {name}")
    data = bytearray(victim.read_bytes())
    if harm == "missing":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 1
        victim.write_bytes(data if harm == "a flipped bit" else data[: len(data) // 2])
    table = training(material, run)
    said = lm_saes("train", settings_file(tmp_path, table), "--resume")
    assert said.code == 0, said
    assert weights(run) == weights(whole)
    assert newest.name in said.out + said.error  # the damage is said


def test_a_tokenizer_that_has_changed_since_the_run_began(material: Path, run: Path, tmp_path: Path, lm_saes: Terminal) -> None:
    model = tmp_path / "model"
    shutil.copytree(material / "model", model)
    path = settings_file(tmp_path, training(material, run, model__model_name=str(model)))
    assert lm_saes("train", path).code == 0
    for left in ("sae_weights.safetensors", "config.json"):
        (run / left).unlink()
    shutil.rmtree(run / "checkpoints" / checkpoints(run)[-1])
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = lm_saes("train", path, "--resume").line
    assert line.startswith("the saved stream had tokenizer_hash = '")
    assert line.endswith("; resume with the settings of the run")
