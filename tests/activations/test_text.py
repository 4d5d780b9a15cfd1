"""Every kind of dataset, and what is said when it is not there or not what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_saes.activations.documents import Documents, StreamedTable
from lm_saes.activations.text import as_documents, load_dataset, load_dataset_shard
from lm_saes.config import DatasetConfig
from lm_saes.demo import corpus
from lm_saes.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _no_bars() -> Any:
    import datasets

    datasets.disable_progress_bars()


def read(place: Any, tokenized: bool = False, **fields: Any) -> list[Any]:
    documents = load_dataset(DatasetConfig(dataset_name_or_path=str(place), **fields), tokenized)
    assert isinstance(documents, Documents)
    return [document.ids if tokenized else document.text for document in documents]


def test_demo_is_the_standard_library_by_split() -> None:
    train, heldout = (load_dataset(DatasetConfig(dataset_name_or_path="demo", split=split)) for split in ("train", "heldout"))
    assert isinstance(train, Documents)
    assert isinstance(heldout, Documents)
    assert len(train) > 10 * len(heldout) > 0
    document = heldout[0]
    assert (corpus.split_of(train[0].name), corpus.split_of(document.name)) == ("train", "heldout")
    assert document.text == (corpus.standard_library() / document.name).read_text(encoding="utf-8", errors="replace")


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b" / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "ignored.md").write_text("no")
    assert read(tmp_path / "a.txt") == ["one\ntwo"]
    for place in (tmp_path, f"{tmp_path}/**/*.txt"):
        documents = load_dataset(DatasetConfig(dataset_name_or_path=str(place)))
        assert isinstance(documents, Documents)
        assert [(document.name, document.text, document.repaired) for document in documents] == [
            ("a.txt", "one\ntwo", False),
            ("b/c.txt", "caf�", True),
        ]


ROWS = [{"id": 1, "text": "first\nline"}, {"id": 2, "text": "zweite – Zeile"}, {"id": 3, "text": ""}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    match path.suffix:
        case ".jsonl":
            path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv":
            datasets.Dataset.from_list(rows).to_csv(path)
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        case _:
            datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "saved"])
def test_tables(tmp_path: Path, name: str) -> None:
    place = write(tmp_path / name, ROWS)
    cache: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    assert read(place, **cache) == [row["text"] for row in ROWS]
    renamed = write(tmp_path / f"renamed_{name}", [{"content": row["text"], "texts": "x"} for row in ROWS])
    assert read(renamed, text_column="content", **cache)[1] == ROWS[1]["text"]
    with pytest.raises(DataError, match=r"no column 'text'; did you mean 'texts'\? \(columns: content, texts; set text_column\)"):
        read(renamed, **cache)
    with pytest.raises(DataError, match="must hold text, got int 1"):
        read(place, text_column="id", **cache)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet"])
@pytest.mark.parametrize("column", ["tokens", "input_ids"])
def test_tokenised_tables(tmp_path: Path, name: str, column: str) -> None:
    cache: dict[str, Any] = {"cache_dir": str(tmp_path / "cache")}
    place = write(tmp_path / name, [{column: [1, 2]}, {column: [3]}])
    assert read(place, tokenized=True, **cache) == [[1, 2], [3]]
    with pytest.raises(DataError, match=r"no column 'tokens' or 'input_ids'.*is_dataset_tokenized"):
        read(write(tmp_path / f"text_{name}", ROWS), tokenized=True, **cache)


@pytest.mark.parametrize("ids", [["a"], "ab", [-1], 3])
def test_what_is_no_list_of_token_ids(ids: Any) -> None:
    documents, _ = as_documents("x", [ids], is_dataset_tokenized=True)
    with pytest.raises(DataError, match="lists of token ids"):
        documents[0]  # pyright: ignore[reportIndexIssue]


def test_json_lines_in_a_json_file_and_bare_strings(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "strings.jsonl").write_text('"a"\n"b"\n')
    (tmp_path / "strings.json").write_text('["a", "b"]')
    assert read(tmp_path / "lines.json") == read(tmp_path / "strings.jsonl") == read(tmp_path / "strings.json") == ["a", "b"]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    for name, data in (("a.txt", b"a"), ("a.jsonl", b'"a"\n'), ("a.json", b'["a"]')):
        (tmp_path / name).write_bytes(mark + data)
        assert read(tmp_path / name) == ["a"]


def test_words_that_csv_readers_take_for_missing_values_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text\nNA\nnull\n""\n')
    assert read(tmp_path / "x.csv", cache_dir=str(tmp_path / "cache")) == ["NA", "null", ""]


def test_damaged_files_say_where(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"x.jsonl:2 is not valid JSON"):
        read(tmp_path / "x.jsonl")
    (tmp_path / "x.json").write_text('[{"text": ')
    with pytest.raises(DataError, match=r"x.json is not valid JSON"):
        read(tmp_path / "x.json")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"cannot read .*x.parquet"):
        read(tmp_path / "x.parquet", cache_dir=str(tmp_path / "cache"))


def test_invalid_utf8_in_a_line_is_repaired_and_marked(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "b"}\n')
    documents = load_dataset(DatasetConfig(dataset_name_or_path=str(tmp_path / "x.jsonl")))
    assert isinstance(documents, Documents)
    assert [(document.text, document.repaired) for document in documents] == [("caf�", True), ("b", False)]


def test_splits_on_disk(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "d")
    assert len(read(tmp_path / "d", is_dataset_on_disk=True)) == 3
    assert len(read(tmp_path / "d", split="validation")) == 1
    with pytest.raises(DataError, match="no split 'valid'; did you mean 'validation'"):
        read(tmp_path / "d", split="valid")


def test_absent_places(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no file at .*texts.jsonl; did you mean 'text.jsonl'"):
        read(tmp_path / "texts.jsonl")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", f"{tmp_path}/*.txt"):
        with pytest.raises(DataError, match="nothing to read"):
            read(place)
    with pytest.raises(DataError, match="no folder at"):
        read(tmp_path / "none", is_dataset_on_disk=True)


def test_a_hub_name_that_cannot_be_read_names_its_page() -> None:
    with pytest.raises(DataError, match=r"someone/nothing.*https://huggingface.co/datasets/someone/nothing") as caught:
        load_dataset(DatasetConfig(dataset_name_or_path="someone/nothing"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"streaming": True}, {"name": "en"}, {"revision": "main"}])
def test_fields_of_the_hub_are_refused_elsewhere(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "a.txt").write_text("a")
    for place in ("demo", str(tmp_path / "a.txt")):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))} = .* has no meaning"):
            read(place, **fields)


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match='"train" and "heldout", got "held"'):
        read("demo", split="held")
    with pytest.raises(ConfigError, match="has no splits"):
        read(tmp_path / "a.txt", split="test")


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:80%]", range(8)),
        ("train[80%:]", range(8, 10)),
        ("train[25%:75%]", range(2, 8)),
        ("train[:3]", range(3)),
        ("train[3:]", range(3, 10)),
        ("train[8:200]", range(8, 10)),
    ],
)
def test_a_part_of_files_by_the_number_of_the_document(tmp_path: Path, split: str, numbers: range) -> None:
    import datasets

    rows = [{"text": str(number)} for number in range(10)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for place in ("x.jsonl", "saved"):
        assert read(tmp_path / place, split=split) == [str(number) for number in numbers]


def test_a_part_that_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(["a", "b", "c"]))
    for split in ("train[5:]", "train[2:1]", "train[:10%]"):
        with pytest.raises(ConfigError, match="holds none of the 3 documents"):
            read(tmp_path / "x.json", split=split)
    for split in ("train[a:]", "test[:50%]", "train[:50%", "train[-1:]"):
        with pytest.raises(ConfigError, match=r"name a part of it, such as 'train\[:95%\]'"):
            read(tmp_path / "x.json", split=split)


def test_the_demo_corpus_has_no_columns() -> None:
    with pytest.raises(ConfigError, match="leave text_column out"):
        load_dataset(DatasetConfig(dataset_name_or_path="demo", text_column="body"))


def test_shards(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(["a", "b", "c"]))
    cfg = DatasetConfig(dataset_name_or_path=str(tmp_path / "x.json"))
    assert [[document.text for document in load_dataset_shard(cfg, shard, 2)] for shard in range(2)] == [["a", "c"], ["b"]]
    for shard in (-1, 2):
        with pytest.raises(ConfigError, match="shard_idx"):
            load_dataset_shard(cfg, shard, 2)


def test_what_a_user_holds() -> None:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    assert as_documents("x", (table, {"shard_idx": 0})).metadata == {"shard_idx": 0}
    assert as_documents("x", (table, None)).metadata == {}
    documents = as_documents("x", table).documents
    assert isinstance(documents, Documents)
    assert documents[1].text == ROWS[1]["text"]
    assert isinstance(as_documents("x", table.to_iterable_dataset()).documents, StreamedTable)
    assert as_documents("x", documents).documents is documents
    assert len(as_documents("x", ("one", "two", "three")).documents) == 3  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"has splits \(train\): pass one of them"):
        as_documents("x", datasets.DatasetDict({"train": table}))
    with pytest.raises(DataError, match=r"must be a DatasetConfig, a list of texts or a datasets.Dataset, got int"):
        as_documents("x", 3)
