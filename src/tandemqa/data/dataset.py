"""Passages, queries and judgements in BEIR layout: what every command reads.

A dataset is a folder with `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and one
`qrels/<split>.tsv` a split (`query-id`, `corpus-id`, `score`).
"""

import array
import hashlib
import json
import mmap
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from tandemqa.data.formats.recognise import recognise
from tandemqa.data.lines import fault, read_records, string_field
from tandemqa.data.qrels import Qrels, read_qrels
from tandemqa.errors import TandemError
from tandemqa.files import fingerprint


class Passage(NamedTuple):
    """One passage; `title` is empty when the corpus gives none."""

    id: str
    title: str
    text: str

    @property
    def full(self) -> str:
        """Title and text as one string, BEIR's convention: what the models read."""
        return f"{self.title} {self.text}".strip()


class Passages:
    """The passages of a `corpus.jsonl`, in file order; the text stays on disk and is read when asked for.

    In memory are the ids and one byte offset (int64) a passage. Every line is checked when the file is
    opened; what is wrong is a `TandemError`. The file must not be cut or rewritten in place while in use.

    ids: list of the n passage ids; row: passage id -> row (0 to n-1); fingerprint: 16 hexadecimal digits of the file.
    """

    ids: list[str]
    row: dict[str, int]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.row = {}
        offsets = array.array("q")
        for number, offset, record in read_records(path):
            if record["_id"] in self.row:
                raise _duplicate(path, number, record)
            passage_of(path, number, record)
            self.row[record["_id"]] = len(self.row)
            offsets.append(offset)
        self.ids = list(self.row)
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.fingerprint = fingerprint(path)
        offsets.append(len(self._bytes))
        self._offsets = np.array(offsets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: SupportsIndex) -> Passage:
        """The passage at `row`; a negative row, which in a run means "none", is an `IndexError`."""
        row = operator.index(row)
        if not 0 <= row < len(self.ids):
            raise IndexError(f"row {row} of {len(self.ids)} passages")
        try:
            record = json.loads(self._bytes[self._offsets[row] : self._offsets[row + 1]].decode("utf-8"))
            if record["_id"] != self.ids[row]:
                raise ValueError("another passage stands here")
            return Passage(record["_id"], record.get("title") or "", record["text"])
        except (ValueError, KeyError, TypeError) as error:
            what = f"passage {self.ids[row]!r} is no longer where it stood; load the dataset again."
            raise TandemError(f"{self.path} was changed while it was in use: {what}") from error

    def __iter__(self) -> Iterator[Passage]:
        for row in range(len(self)):
            yield self[row]


@dataclass(frozen=True)
class Dataset:
    """One folder in BEIR layout.

    queries: query id -> text, in file order; qrels: split -> judgements; fingerprint: 16 hexadecimal digits
    that change with the name or the content of any of the files.
    """

    folder: Path
    passages: Passages
    queries: dict[str, str]
    qrels: dict[str, Qrels]
    fingerprint: str

    def judged(self, split: str) -> Qrels:
        """The judgements of `split`; a missing split, or one without a positive, is a `TandemError`."""
        if split not in self.qrels:
            raise TandemError(
                f"{self.folder / 'qrels'} has no split {split!r}; choose one of {', '.join(self.qrels)} "
                f"or add {split}.tsv."
            )
        if not any(grade > 0 for grades in self.qrels[split].values() for grade in grades.values()):
            path = self.folder / "qrels" / f"{split}.tsv"
            raise TandemError(f"{path} has no positive: at least one score must be above 0; add judgements.")
        return self.qrels[split]


def load_dataset(folder: Path | str) -> Dataset:
    """Read and check a folder in BEIR layout; a fault is a `TandemError` naming file, line and field.

    A source in another format that is known gets the advice to convert it.
    """
    folder = Path(folder)
    check_layout(folder)
    passages = Passages(folder / "corpus.jsonl")
    if not (folder / "queries.jsonl").exists():
        raise TandemError(
            f"{folder} has passages and no queries.jsonl: it can be indexed (Index.build takes the folder itself), "
            "but not trained or measured on."
        )
    queries = read_queries(folder / "queries.jsonl")
    splits = sorted((folder / "qrels").glob("[!.]*.tsv"))
    if not splits:
        raise TandemError(f"{folder / 'qrels'} has no .tsv file; add one for each split, such as train.tsv.")
    qrels = {path.stem: read_qrels(path, queries, passages.row) for path in splits}
    # The names count too: test.tsv renamed train.tsv is another dataset.
    digests = passages.fingerprint + "".join(
        f"{path.name} {fingerprint(path)}\n" for path in (folder / "queries.jsonl", *splits)
    )
    return Dataset(folder, passages, queries, qrels, hashlib.sha256(digests.encode()).hexdigest()[:16])


def check_layout(folder: Path) -> None:
    """Raise `TandemError` for what is no folder, or in another format that is known."""
    formats = recognise(folder)
    if formats and "beir" not in formats:
        what = f"{folder} is not in BEIR layout but in the format {' or '.join(formats)}; convert it first"
        raise TandemError(f"{what}: tandemqa convert {folder} --out DATA")
    if not folder.is_dir():
        raise TandemError(f"{folder} is not a folder; give one with corpus.jsonl, queries.jsonl and qrels/*.tsv.")


def passage_of(path: Path | str, number: int, record: dict[str, Any]) -> Passage:
    """The passage of a line of `corpus.jsonl`; one without any text is a `TandemError`."""
    title = "" if record.get("title") is None else string_field(path, number, record, "title")
    if not title.strip() and not string_field(path, number, record, "text").strip():
        raise fault(path, number, "field text is empty and so is title; fill it in or remove the line.")
    return Passage(record["_id"], title, string_field(path, number, record, "text"))


def read_queries(path: Path) -> dict[str, str]:
    """Read a `queries.jsonl`: query id -> text, in file order; what is wrong is a `TandemError`."""
    queries: dict[str, str] = {}
    for number, _, record in read_records(path):
        if record["_id"] in queries:
            raise _duplicate(path, number, record)
        text = string_field(path, number, record, "text")
        if not text.strip():
            raise fault(path, number, "field text is empty; fill it in or remove the line.")
        queries[record["_id"]] = text
    return queries


def _duplicate(path: Path, number: int, record: dict[str, Any]) -> TandemError:
    return fault(path, number, f"field _id repeats {record['_id']!r} of an earlier line; give each line its own.")
