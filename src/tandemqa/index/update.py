"""Changing an index: each change is a new segment or none, and a transaction that makes it count.

A process that is killed leaves the index before the transaction or after it. A segment that no transaction names is
removed by the next writer, and so is one that a transaction has replaced, once no reader has it open.
"""

import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tandemqa.data.lines import fault, is_text
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.files import explained, whole_folder
from tandemqa.index.index import PASSAGES, SEGMENTS, Index
from tandemqa.index.lock import only_writer
from tandemqa.index.passages import (
    PassageStore,
    Record,
    check_rows,
    drop_segments,
    fold,
    put,
    read_passages,
    record_of,
    register,
    remove,
    repeated,
    transaction,
)
from tandemqa.index.segment import Segment, sweep, write_segment
from tandemqa.index.source import Copied, Texts

# Passages that become visible together when more are added; as many are held in memory.
BATCH = 65_536
# Segments from which on `add` joins some: each takes file handles, and a search asks all of them.
MOST_SEGMENTS = 32


@dataclass(frozen=True)
class Added:
    """How many passages were added, and how many of them in the place of another."""

    passages: int
    replaced: int


def add_passages(
    folder: Path, passages: Path | Iterable[Mapping[str, Any]], bundle: Bundle | str | Path | None = None
) -> Added:
    """Add passages to the index in `folder`, each in the place of the one with its id if there is one.

    `passages` is a file in the layout of `corpus.jsonl`, or objects of that form, or one; all are checked before the
    first is added. They become visible `BATCH` at a time. `bundle` is needed only if it is no longer where it was.
    """
    Index.open(folder).close()
    if isinstance(passages, Path):
        if passages.exists() and not passages.is_file():
            raise TandemError(f"{passages} is not a file, and passages are read twice; write them into a file first.")
    else:
        passages = [passages] if isinstance(passages, Mapping) else list(passages)
        if not passages:
            raise TandemError("There are no passages to add; give at least one.")
    _check(passages)
    count = replaced = 0
    with _writing(folder):
        index = Index.open(folder)
        models = index.load_bundle(bundle)
        choices = (index.about["vectors"], index.about["storage"])
        index.close()
        records = (record for _, record in _records(passages))
        while batch := list(islice(records, BATCH)):
            _make_room(folder)
            name = secrets.token_hex(8)
            first = _state(folder).next_row
            check_rows(first, len(batch))
            rows = np.arange(first, first + len(batch), dtype=np.int32)
            texts = [record.passage.full for record in batch]
            with whole_folder(folder / SEGMENTS / name) as partial:
                write_segment(partial, rows, Texts(models, _slices(texts)), *choices)
            with transaction(folder / PASSAGES) as database:
                try:
                    replaced += put(database, batch)
                except sqlite3.IntegrityError as error:
                    raise TandemError(f"{_name(passages)} was changed while it was read; add it again.") from error
                register(database, name)
            count += len(batch)
    return Added(count, replaced)


def delete_passages(folder: Path, ids: str | Iterable[str]) -> int:
    """Delete the passages with these ids, or this id, from the index in `folder`: how many there were."""
    Index.open(folder).close()
    ids = [ids] if isinstance(ids, str) else list(ids)
    for one in ids:
        if not isinstance(one, str):
            raise TandemError(f"The id {one!r} is not a string, as all ids are; write it as one.")
        if not is_text(one):
            raise TandemError(f"The id {one!r} is not UTF-8, as all ids of an index are; check how it is spelt.")
    with _writing(folder), transaction(folder / PASSAGES) as database:
        return remove(database, list(dict.fromkeys(ids)))


def compact(folder: Path) -> bool:
    """Make one segment of all segments of the index in `folder`, without what was deleted: whether that was needed.

    Vectors are copied as they are stored; int8 rounds them a second time, by half a step at most.
    """
    Index.open(folder).close()
    with _writing(folder):
        with closing(Index.open(folder)) as index:
            if len(index.segments) <= 1 and not index.passages.deleted:
                return False
            _join(index, index.segments)
        with suppress(TandemError, OSError):  # it is done; what cannot be removed now, the next writer removes
            _sweep(folder)
    return True


def _make_room(folder: Path) -> None:
    """Join the last segments, if there are many: from the first that is no larger than all after it together.

    So a large segment is left alone until as much has been added, and a passage is copied no more often than its
    segment doubles. There is such a segment: 32 sizes, each above all after it together, are those of 2³² rows.
    """
    if len(_state(folder).segments) < MOST_SEGMENTS:
        return
    with closing(Index.open(folder)) as index:
        sizes = [len(segment) for segment in index.segments]
        first = next(number for number, size in enumerate(sizes) if size <= sum(sizes[number + 1 :]))
        _join(index, index.segments[first:])
    with suppress(TandemError, OSError):  # as in `compact`
        _sweep(folder)


def _join(index: Index, segments: Sequence[Segment]) -> None:
    """Make one segment of the last `segments` of an index, without what was deleted of them."""
    name = secrets.token_hex(8)
    source = Copied(segments, index.passages, index.passages.live())
    if len(source.rows):
        with whole_folder(index.folder / SEGMENTS / name) as partial:
            write_segment(partial, source.rows, source, index.about["vectors"], index.about["storage"])
    with transaction(index.folder / PASSAGES) as database:
        drop_segments(database, [segment.folder.name for segment in segments], int(segments[0].rows[0]))
        if len(source.rows):
            register(database, name)


def _check(passages: Path | list[Mapping[str, Any]]) -> None:
    """Raise `TandemError` if a passage cannot be read, or comes twice."""
    seen: set[str] = set()
    for number, record in _records(passages):
        if record.passage.id in seen:
            raise repeated(_name(passages), number, record)
        seen.add(record.passage.id)


def _records(passages: Path | list[Mapping[str, Any]]) -> Iterator[tuple[int, Record]]:
    if isinstance(passages, Path):
        yield from read_passages(passages)
    else:
        for number, record in enumerate(passages, start=1):
            if not isinstance(record, Mapping):
                what = f'{record!r} is no object; give one like {{"_id": "p1", "text": "..."}}.'
                raise fault(_name(passages), number, what)
            yield number, record_of(_name(passages), number, dict(record))


def _name(passages: Path | list[Mapping[str, Any]]) -> Path | str:
    return passages if isinstance(passages, Path) else "The passages to add"


def _slices(texts: list[str]) -> Callable[[int, int], list[str]]:
    return lambda start, stop: texts[start:stop]


def _state(folder: Path) -> PassageStore:
    """The book of the index, closed again: its segments and next row."""
    store = PassageStore(folder / PASSAGES)
    store.close()
    return store


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Be the only writer of the index, and begin with clearing up behind those that were killed."""
    with explained(folder), only_writer(folder, folder):
        _sweep(folder)
        yield
        fold(folder / PASSAGES)


def _sweep(folder: Path) -> None:
    """Remove segments that are no part of the index, except those that a reader still has open."""
    sweep(folder / SEGMENTS, _state(folder).segments)
