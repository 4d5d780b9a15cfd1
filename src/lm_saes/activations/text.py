"""From a `DatasetConfig`, or from what a user already holds, to documents.

What `dataset_name_or_path` may be, in the order in which it is tried:

1. `"demo"`: the sources of the Python standard library, split "train" or "heldout";
2. a folder that `datasets.Dataset.save_to_disk` wrote;
3. a file, a folder or a pattern with `*`: `.txt` (one document per file), `.jsonl`, `.json`, `.csv`, `.parquet`;
4. a name on the Hugging Face hub, downloaded first or streamed.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_saes.activations.documents import (
    Documents,
    Field,
    FileDocuments,
    JoinedDocuments,
    JsonLinesDocuments,
    ListedDocuments,
    ShardOfDocuments,
    SomeDocuments,
    StreamedTable,
    TableDocuments,
    decoded,
)
from lm_saes.config import DatasetConfig
from lm_saes.config.activations import SLICE
from lm_saes.demo import corpus
from lm_saes.errors import ConfigError, DataError, did_you_mean
from lm_saes.files import inside, parse_json, read_json_object

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")


def load_dataset(cfg: DatasetConfig, is_dataset_tokenized: bool = False) -> Documents | StreamedTable:
    """The documents of `cfg`; a `StreamedTable` if it is streamed from the hub.

    With `is_dataset_tokenized`, rows hold token ids in a column `tokens` or `input_ids` instead of text.
    Raises `DataError` if there is nothing there or it cannot be read, `ConfigError` if a field does not go with the kind of dataset.
    """
    place, field = cfg.dataset_name_or_path, Field(cfg.text_column, is_dataset_tokenized)
    if place == "demo":
        _only_for_the_hub(cfg, "name", "revision", "streaming", "is_dataset_on_disk")
        if cfg.text_column != "text":
            raise ConfigError(f"the demo corpus has no columns; leave text_column out (got '{cfg.text_column}')")
        return _demo(cfg.split, field)
    if cfg.is_dataset_on_disk or (Path(place) / "state.json").is_file() or (Path(place) / "dataset_dict.json").is_file():
        _only_for_the_hub(cfg, "name", "revision", "streaming")
        return _on_disk(cfg, field)
    if Path(place).exists() or Path(place).suffix.lower() in SUFFIXES or "*" in place:
        _only_for_the_hub(cfg, "name", "revision", "streaming")
        return _part(_files(place, cfg, field), cfg)
    return _from_hub(cfg, field)


def load_dataset_shard(cfg: DatasetConfig, shard_idx: int, n_shards: int) -> Documents:
    """Every `n_shards`-th document of `cfg`, from `shard_idx` on: the shards are disjoint and together they are the dataset."""
    if not 0 <= shard_idx < n_shards:
        raise ConfigError(f"shard_idx must lie in [0, n_shards) = [0, {n_shards}), got {shard_idx}")
    documents = load_dataset(cfg)
    if isinstance(documents, StreamedTable):
        raise ConfigError("a streamed dataset has no shards; set streaming = false")
    return ShardOfDocuments(documents, shard_idx, n_shards)


class NamedDocuments(NamedTuple):
    """A source's documents and what is to stand in the meta of its rows."""

    documents: Documents | StreamedTable
    metadata: dict[str, Any]


def as_documents(name: str, dataset: Any, is_dataset_tokenized: bool = False) -> NamedDocuments:
    """The documents of whatever was passed as the dataset `name`: a `DatasetConfig`, documents, a list of texts, a `datasets.Dataset` or
    `IterableDataset`, or a pair of one of these and a dict of metadata (or None)."""
    if isinstance(dataset, tuple) and len(dataset) == 2 and (dataset[1] is None or isinstance(dataset[1], dict)):
        documents, metadata = as_documents(name, dataset[0], is_dataset_tokenized)
        return NamedDocuments(documents, {**metadata, **(dataset[1] or {})})
    if isinstance(dataset, DatasetConfig):
        return NamedDocuments(load_dataset(dataset, is_dataset_tokenized), {})
    if isinstance(dataset, Documents | StreamedTable):
        return NamedDocuments(dataset, {})
    if isinstance(dataset, list | tuple):
        return NamedDocuments(ListedDocuments(name, dataset, is_dataset_tokenized), {})
    if isinstance(dataset, dict) and dataset and all(hasattr(table, "column_names") for table in dataset.values()):
        raise DataError(f"dataset '{name}' has splits ({', '.join(dataset)}): pass one of them, such as dataset['{next(iter(dataset))}']")
    if hasattr(dataset, "column_names"):
        return NamedDocuments(_table(name, dataset, Field(tokenized=is_dataset_tokenized)), {})
    raise DataError(f"dataset '{name}' must be a DatasetConfig, a list of texts or a datasets.Dataset, got {type(dataset).__name__}")


def _only_for_the_hub(cfg: DatasetConfig, *fields: str) -> None:
    for field in fields:
        if getattr(cfg, field) != DatasetConfig.model_fields[field].default:
            raise ConfigError(
                f"{field} = {getattr(cfg, field)!r} has no meaning for {cfg.dataset_name_or_path}, which is not on the hub; leave it out"
            )


def _table(name: str, table: Any, field: Field) -> Documents | StreamedTable:
    return TableDocuments(name, table, field) if hasattr(table, "__len__") else StreamedTable(name, table, field)


def _demo(split: str, field: Field) -> Documents:
    if field.tokenized:
        raise ConfigError("the demo corpus is text; leave is_dataset_tokenized out")
    if split not in ("train", "heldout"):
        raise ConfigError(f'the demo corpus has the splits "train" and "heldout", got "{split}"{did_you_mean(split, ["train", "heldout"])}')
    root = corpus.standard_library()
    return FileDocuments(corpus.paths(split, root), root)


def _on_disk(cfg: DatasetConfig, field: Field) -> Documents:
    place = cfg.dataset_name_or_path
    if not Path(place).is_dir():
        raise DataError(f"no folder at {place}; is_dataset_on_disk wants one that datasets.Dataset.save_to_disk wrote")
    import datasets

    _check_names(Path(place))
    try:
        table = datasets.load_from_disk(place)
    except Exception as error:
        raise DataError(f"cannot read {place} as a dataset on disk: {_one_line(error)}") from None
    if isinstance(table, dict):
        if cfg.split not in table:
            splits = [str(split) for split in table]
            raise DataError(f"{place} has no split '{cfg.split}'{did_you_mean(cfg.split, splits)} (there: {', '.join(splits)})")
        table = table[cfg.split]
    else:
        return _part(TableDocuments(Path(place).name, table, field), cfg)
    return TableDocuments(Path(place).name, table, field)


def _part(documents: Documents, cfg: DatasetConfig) -> Documents:
    """The documents, or those that a slice names as it does for a dataset of the hub: "train[:95%]", "train[95%:]", "train[1000:2000]"."""
    if cfg.split == "train":
        return documents
    found = SLICE.fullmatch(cfg.split)
    if found is None or found[1] != "train" or not cfg.split.endswith("]"):
        raise ConfigError(
            f"{cfg.dataset_name_or_path} has no splits: leave split out, or name a part of it, such as 'train[:95%]' (got split = '{cfg.split}')"
        )
    _, start, start_in, stop, stop_in = found.groups()
    ends = [
        round(int(end) * len(documents) / 100) if unit else int(end)
        for end, unit in ((start or "0", start_in), (stop or "100", stop_in if stop else "%"))
    ]
    chosen = range(len(documents))[ends[0] : ends[1]]
    if not chosen:
        raise ConfigError(f"split = '{cfg.split}' holds none of the {len(documents):,} documents of {cfg.dataset_name_or_path}")
    return SomeDocuments(documents, chosen)


def _check_names(folder: Path) -> None:
    """The files and splits that a saved dataset names are in its folder. Raises `DataError`."""
    if (splits := folder / "dataset_dict.json").is_file():
        table = read_json_object(splits, DataError)
        for name in _listed(table.get("splits")):
            _check_names(inside(folder, name, DataError, str(splits)))
    if (state := folder / "state.json").is_file():
        for entry in _listed(read_json_object(state, DataError).get("_data_files")):
            inside(folder, entry.get("filename") if isinstance(entry, dict) else entry, DataError, str(state))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _files(place: str, cfg: DatasetConfig, field: Field) -> Documents:
    path = Path(place)
    if path.is_dir():
        found, root = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES), path
    elif path.is_file():
        found, root = [path], path.parent
    else:
        found = sorted(file for file in map(Path, glob.glob(place, recursive=True)) if file.is_file())
        root = Path(*_before_pattern(path))
    if not found:
        if "*" in place or path.is_dir():
            raise DataError(f"nothing to read at {place}: wanted files that end in {', '.join(SUFFIXES)}")
        near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"no file at {place}{near}")
    parts: list[Documents] = []
    for suffix in SUFFIXES:
        files = [file for file in found if file.suffix.lower() == suffix]
        if files:
            parts.append(_files_of_a_kind(suffix, files, root, cfg, field))
    if not parts:
        raise DataError(f"cannot read {found[0]}: wanted a file that ends in {', '.join(SUFFIXES)}")
    return parts[0] if len(parts) == 1 else JoinedDocuments(parts)


def _before_pattern(path: Path) -> Sequence[str]:
    """The folders of `path` up to the first with a `*`."""
    return list(itertools.takewhile(lambda name: "*" not in name, path.parts))


def _files_of_a_kind(suffix: str, files: list[Path], root: Path, cfg: DatasetConfig, field: Field) -> Documents:
    match suffix:
        case ".txt":
            if field.tokenized:
                raise ConfigError(f"{files[0]} is text; a tokenised dataset is a .jsonl, .json or .parquet file")
            return FileDocuments(files, root)
        case ".jsonl":
            return JoinedDocuments([JsonLinesDocuments(file, field) for file in files])
        case ".json":
            return JoinedDocuments([_json(file, field) for file in files])
        case kind:
            import datasets

            options: dict[str, Any] = {"encoding_errors": "replace", "keep_default_na": False} if kind == ".csv" else {}
            try:
                table = datasets.load_dataset(kind[1:], data_files=[str(file) for file in files], split="train", cache_dir=cfg.cache_dir, **options)
            except Exception as error:
                raise DataError(f"cannot read {files[0]}: {_one_line(error)}") from None
            return TableDocuments(files[0].name if len(files) == 1 else root.name, table, field, repaired=kind == ".csv")


def _json(path: Path, field: Field) -> Documents:
    """A JSON array of objects or strings; anything else is read as JSON lines."""
    with path.open("rb") as file:
        is_array = decoded(file.read(1024))[0].lstrip().startswith("[")
    if not is_array:
        return JsonLinesDocuments(path, field)
    data, repaired = decoded(path.read_bytes())
    try:
        records = parse_json(data, tolerant=True)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    values = [record[field.find(list(record), path.name)] if isinstance(record, dict) else record for record in records]
    return ListedDocuments(path.name, values, field.tokenized, repaired)


def _from_hub(cfg: DatasetConfig, field: Field) -> Documents | StreamedTable:
    import datasets

    place = cfg.dataset_name_or_path
    try:
        table = datasets.load_dataset(place, cfg.name, split=cfg.split, cache_dir=cfg.cache_dir, revision=cfg.revision, streaming=cfg.streaming)
    except Exception as error:  # the library's errors, the hub's and the network's have no common base
        page = f"https://huggingface.co/datasets/{place} (a private or gated one needs access and HF_TOKEN)"
        raise DataError(f"cannot load the dataset '{place}', which is neither a local path nor readable at {page}: {_one_line(error)}") from None
    return _table(place, table, field)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
