"""Documents, and the order in which they are read.

`Documents` is a collection with random access: a list of texts, a folder of files, the lines of a JSON-lines file, a table. `StreamedTable`
is one that can only be read from front to back. `DocumentStream` goes through either once: a collection in an order drawn from a seed, a
streamed table as it comes. There are no silent epochs: when the documents are used up the stream ends.
"""

from __future__ import annotations

import bisect
import copy
import itertools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from lm_saes.activations.stream import State
from lm_saes.errors import DataError, LmSaesError, did_you_mean
from lm_saes.files import parse_json

PIECE_CHARACTERS = 1_000_000
"""Longer documents are handed out in pieces of at most this length, so that one file of a gigabyte does not have to be tokenised at once."""


class Document(NamedTuple):
    """A text, or a piece of a long one; in a tokenised dataset the token ids instead."""

    name: str
    text: str = ""
    ids: list[int] | None = None
    repaired: bool = False
    """Some of it was not valid UTF-8 and stands as replacement characters."""
    first: bool = True
    """False where this goes on with the document before it."""


class Field(NamedTuple):
    """Which column of a table is read."""

    column: str = "text"
    tokenized: bool = False

    def find(self, columns: Sequence[str], where: str) -> str:
        """The column to read among `columns`. Raises `DataError` if it is not there."""
        wanted = ["tokens", "input_ids"] if self.tokenized else [self.column]
        for name in wanted:
            if name in columns:
                return name
        fix = "is_dataset_tokenized needs one of them" if self.tokenized else "set text_column"
        near = did_you_mean(self.column, columns) if not self.tokenized else ""
        raise DataError(f"{where} has no column {' or '.join(map(repr, wanted))}{near} (columns: {', '.join(columns) or 'none'}; {fix})")

    def document(self, name: str, value: Any) -> Document:
        """The document that one cell holds. An absent text is an empty document."""
        if self.tokenized:
            if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(token, int) and 0 <= token < 2**31 for token in value):
                raise DataError(f"{name}: a tokenised dataset holds lists of token ids (integers, not negative, below 2^31), got {_shown(value)}")
            return Document(name, ids=list(value))
        if value is not None and not isinstance(value, str):
            raise DataError(f"{name}: column '{self.column}' must hold text, got {_shown(value)}; set text_column to a column of text")
        return Document(name, value or "")


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


# ---------------------------------------------------------------------------------------------- collections


class Documents(ABC):
    """Documents by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Document:
        """Document `index`; raises IndexError beyond the end, DataError if it cannot be read."""
        ...

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever a library or the disk raises while a document is read, in one line.

    Raises:
        DataError: naming the document.
    """
    try:
        yield
    except (LmSaesError, StopIteration, IndexError):
        raise
    except Exception as error:
        raise DataError(f"cannot read {name}: {type(error).__name__}: {str(error)[:300]}") from error


class ListedDocuments(Documents):
    """Texts (or lists of token ids) in memory, named by their position. `repaired`: they were decoded with replacement characters."""

    def __init__(self, name: str, texts: Sequence[Any], tokenized: bool = False, repaired: bool = False) -> None:
        self._name, self._texts, self._field, self._repaired = name, texts, Field(tokenized=tokenized), repaired

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Document:
        document = self._field.document(f"{self._name}[{index}]", self._texts[index])
        return document._replace(repaired=self._repaired and "\ufffd" in document.text)


class FileDocuments(Documents):
    """One document per text file, named by its path below `root`. Bytes that are not UTF-8 become replacement characters."""

    def __init__(self, paths: Sequence[Path], root: Path) -> None:
        self._paths, self._root = paths, root

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Document:
        path = self._paths[index]
        with reading(str(path)):
            data = path.read_bytes()
        text, repaired = decoded(data)
        return Document(path.relative_to(self._root).as_posix(), text, repaired=repaired)


class JsonLinesDocuments(Documents):
    """One JSON object (or string) per line. Only where the lines begin is held in memory; blank lines are passed over."""

    def __init__(self, path: Path, field: Field) -> None:
        self._path, self._field = path, field
        self._numbers, self._starts = array("q"), array("q")  # of each line: its number in the file, the byte at which it begins
        with reading(str(path)), path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._numbers.append(number)
                    self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Document:
        with reading(str(self._path)), self._path.open("rb") as file:
            file.seek(self._starts[index])
            line, repaired = decoded(file.readline())
        return json_document(f"{self._path.name}:{self._numbers[index]}", line, self._field, repaired)


class TableDocuments(Documents):
    """The rows of a `datasets.Dataset`."""

    def __init__(self, name: str, table: Any, field: Field, repaired: bool = False) -> None:
        self._column = field.find(table.column_names or [], name)
        self._name, self._field, self._repaired = name, field, repaired
        self._rows = table.select_columns([self._column])  # the other columns are never decoded

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Document:
        name = f"{self._name}[{index}]"
        with reading(name):
            value = self._rows[index][self._column]
        document = self._field.document(name, value)
        return document._replace(repaired=self._repaired and "\ufffd" in document.text)


class JoinedDocuments(Documents):
    """Several collections, one behind the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        return self._parts[which][index - (self._ends[which - 1] if which else 0)]


class SomeDocuments(Documents):
    """Those of `whole` that have the numbers `indices`."""

    def __init__(self, whole: Documents, indices: range) -> None:
        self._whole, self._indices = whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Document:
        return self._whole[self._indices[index]]


class ShardOfDocuments(SomeDocuments):
    """Every `n_shards`-th document, from `shard_idx` on."""

    def __init__(self, whole: Documents, shard_idx: int, n_shards: int) -> None:
        super().__init__(whole, range(shard_idx, len(whole), n_shards))


class StreamedTable:
    """A `datasets.IterableDataset`: rows that come one after the other, with a position that can be saved."""

    def __init__(self, name: str, table: Any, field: Field) -> None:
        self.name, self.table, self.field = name, table, field
        if table.column_names:  # not every streamed table knows them before the first row
            field.find(table.column_names, name)


def json_document(name: str, line: str, field: Field, repaired: bool = False) -> Document:
    """The document in one line of JSON: an object with the field's column, or (untokenised) a string."""
    try:
        record = parse_json(line, tolerant=True)
    except ValueError as error:
        raise DataError(f"{name} is not valid JSON: {error}") from None
    return record_document(name, record, field)._replace(repaired=repaired)


def record_document(name: str, record: Any, field: Field) -> Document:
    """The document in one parsed JSON value."""
    return field.document(name, record[field.find(list(record), name)] if isinstance(record, Mapping) else record)


def decoded(data: bytes) -> tuple[str, bool]:
    """UTF-8 text, without a byte order mark, and whether bytes of it were invalid and stand as replacement characters."""
    try:
        return data.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", errors="replace"), True


# ---------------------------------------------------------------------------------------------- in order


class _Permuted:
    """Reads a collection in an order drawn from a seed."""

    def __init__(self, documents: Documents, seed: int) -> None:
        self._documents = documents
        self._order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        self._position = 0

    def read(self) -> Document:
        if self._position == len(self._order):
            raise StopIteration
        document = self._documents[int(self._order[self._position])]
        self._position += 1
        return document

    def state(self) -> Any:
        return {"position": self._position, "documents": len(self._order)}

    def load(self, state: Any) -> None:
        if state["documents"] != len(self._order):
            raise DataError(
                f"the text has changed: {state['documents']} documents when the run was saved, {len(self._order)} now; resume with the same text"
            )
        self._position = state["position"]


class _Sequential:
    """Reads a streamed table from front to back."""

    def __init__(self, source: StreamedTable) -> None:
        self._source = source
        self._table = copy.deepcopy(source.table)  # it carries its position, which is ours alone
        self._rows: Iterator[Mapping[str, Any]] = iter(self._table)
        self._position = 0

    def read(self) -> Document:
        name = f"{self._source.name}[{self._position}]"
        with reading(name):
            row = next(self._rows)
        self._position += 1
        return record_document(name, row, self._source.field)

    def state(self) -> Any:
        return {"position": self._position, "table": self._table.state_dict()}

    def load(self, state: Any) -> None:
        self._table.load_state_dict(state["table"])
        self._rows, self._position = iter(self._table), state["position"]


class DocumentStream:
    """Documents, each once, empty ones passed over; long ones in pieces.

    `counts` holds `documents` (read, the empty ones among them), `empty_documents`, `invalid_utf8_documents`.
    """

    def __init__(self, documents: Documents | StreamedTable, seed: int = 0, piece_characters: int = PIECE_CHARACTERS) -> None:
        self._reader = _Sequential(documents) if isinstance(documents, StreamedTable) else _Permuted(documents, seed)
        self._piece_characters = piece_characters
        self._current: Document | None = None
        self._offset = 0
        self._before_current: Any = None  # where the reader stood before the current document: a state holds no text, it reads it again
        self.counts = {"documents": 0, "empty_documents": 0, "invalid_utf8_documents": 0}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Document:
        while self._current is None:
            self._before_current = self._reader.state()
            document = _encodable(self._reader.read())
            self.counts["documents"] += 1
            self.counts["invalid_utf8_documents"] += document.repaired
            if document.ids or document.text.strip():
                self._current, self._offset = document, 0
            else:
                self.counts["empty_documents"] += 1
        document, start = self._current, self._offset
        end = _end_of_piece(document.text, start, self._piece_characters)
        if end < len(document.text):
            self._offset = end
        else:
            self._current = None
        return document._replace(text=document.text[start:end], first=start == 0)

    def state_dict(self) -> State:
        whole = self._current is None
        return {
            "reader": self._reader.state() if whole else self._before_current,
            "offset": 0 if whole else self._offset,
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reader.load(state["reader"])
        self._current, self._offset, self.counts = None, state["offset"], dict(state["counts"])
        if self._offset:
            self._before_current = self._reader.state()
            self._current = _encodable(self._reader.read())


def _encodable(document: Document) -> Document:
    """The document without lone surrogates, which JSON can express, UTF-8 cannot, and tokenizers refuse."""
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError:
        return document._replace(text=document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), repaired=True)
    return document


def _end_of_piece(text: str, start: int, limit: int) -> int:
    """Where the piece ends that begins at `start`: after a line, else before a space, else where `limit` falls."""
    end = start + limit
    if end >= len(text):
        return len(text)
    line = text.rfind("\n", start, end)
    if line > start:
        return line + 1
    space = text.rfind(" ", start, end)
    return space if space > start else end
