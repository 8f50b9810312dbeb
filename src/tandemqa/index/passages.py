"""The passages of an index in one SQLite database, which is also the book of what the index consists of."""

import errno
import json
import os
import secrets
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tandemqa.data.dataset import Passage, passage_of
from tandemqa.data.lines import Metadata, fault, metadata_of, read_records, string_field
from tandemqa.errors import TandemError
from tandemqa.files import stamp
from tandemqa.index.metadata import field_names, mask_of, searchable

# A passage keeps its row for as long as it is in the index; rows are never given twice. `tombstones` are the rows
# that segments still hold and `passages` no longer does. What `fields` has of them goes when the index is compacted.
# The `user_version` is a number drawn for each commit: generations of two histories may be equal, this is not.
_TABLES = """
CREATE TABLE passages (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT
);
CREATE TABLE fields (field TEXT NOT NULL, value NOT NULL, row INTEGER NOT NULL, PRIMARY KEY (field, value, row))
    WITHOUT ROWID;
CREATE TABLE tombstones (row INTEGER PRIMARY KEY);
CREATE TABLE segments (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE state (generation INTEGER NOT NULL, next_row INTEGER NOT NULL);
INSERT INTO state VALUES (0, 0);
"""
# Ids that one statement asks for; SQLite takes 32,766 at most.
_IDS = 10_000
# Rows of an answer that are read at once.
_ROWS = 1000
# Rows are int32 wherever they are kept.
_ROWS_IN_ALL = 2**31


class Record(NamedTuple):
    """One line of a `corpus.jsonl`."""

    passage: Passage
    metadata: Metadata


def read_passages(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield (line number, record) of a file in the layout of `corpus.jsonl`; what is wrong is a `TandemError`."""
    for number, _, record in read_records(path):
        yield number, record_of(path, number, record)


def record_of(path: Path | str, number: int, record: dict[str, Any]) -> Record:
    """The passage of line `number` of `path`, or of what else has numbered lines."""
    if not string_field(path, number, record, "_id").strip():
        raise fault(path, number, "field _id is empty; give every line an _id of its own.")
    return Record(passage_of(path, number, record), metadata_of(path, number, record))


class PassageStore:
    """One generation of the passages, read by row, from any number of threads.

    A read transaction is held open for as long as the store is: what a writer does meanwhile is not seen. Where the
    reader may not write there can be none, and a file that was changed meanwhile is a `TandemError` of the next read.
    """

    def __init__(self, path: Path, earlier: "PassageStore | None" = None) -> None:
        """Open a store; a file that is missing, cut short or no store is a `TandemError`.

        What an `earlier` store of the same generation has counted is not counted again.
        """
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        try:
            self._database, self._stamp = _snapshot(path)
            self._closing = weakref.finalize(self, self._database.close)
            _check_size(self._database, path)
            (self.generation, self.next_row) = self._database.execute("SELECT * FROM state").fetchone()
            (self.commit,) = self._database.execute("PRAGMA user_version").fetchone()
            segments = self._database.execute("SELECT name FROM segments ORDER BY number").fetchall()
            self.segments = [str(name) for (name,) in segments]
            if earlier is not None and earlier.state == self.state:
                self._dead = earlier.deleted
            else:
                (self._dead,) = self._database.execute("SELECT count(*) FROM tombstones").fetchone()
        except (sqlite3.Error, TypeError) as error:
            raise self._failed(error) from error
        self._check_unchanged()

    @property
    def state(self) -> tuple[int, int, list[str]]:
        """What tells generations apart, also those of an index that was built again, or whose backup was put back."""
        return self.generation, self.commit, self.segments

    @property
    def deleted(self) -> int:
        """Rows that segments hold and that are no longer passages."""
        return int(self._dead)

    def rows(self, rows: Sequence[int]) -> list[Passage]:
        """The passages at `rows`, in that order; a row that is none is an `IndexError`."""
        return [Passage(*self._row(int(row))[:3]) for row in rows]

    def metadata(self, rows: Sequence[int]) -> list[Metadata]:
        """What the passages at `rows` carry besides title and text."""
        return [json.loads(self._row(int(row))[3] or "{}") for row in rows]

    def texts(self, rows: Sequence[int]) -> list[str]:
        """What the models read of the passages at `rows`."""
        return [passage.full for passage in self.rows(rows)]

    def row(self, passage_id: str) -> int | None:
        """The row of a passage, None if it is not there."""
        found = next(self._execute("SELECT row FROM passages WHERE id = ?", passage_id), None)
        return None if found is None else int(found[0])

    def ids(self) -> Iterator[str]:
        """The ids of all passages, in the order of their rows."""
        return (str(name) for (name,) in self._execute("SELECT id FROM passages ORDER BY row"))

    def live(self) -> npt.NDArray[np.bool_]:
        """Which rows have no tombstone, bool of shape (next_row,)."""
        live = np.ones(self.next_row, dtype=np.bool_)
        for (row,) in self._execute("SELECT row FROM tombstones"):
            live[row] = False
        return live

    def fulfilling(self, conditions: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which rows fulfil all conditions such as "year>=2001", bool of shape (next_row,)."""
        return mask_of(conditions, self._execute, self.next_row)

    @property
    def fields(self) -> list[str]:
        """The fields that conditions may name."""
        return field_names(self._execute)

    def close(self) -> None:
        self._closing()

    def _row(self, row: int) -> tuple[str, str, str, str | None]:
        query = "SELECT id, title, text, metadata FROM passages WHERE row = ?"
        values: tuple[str, str, str, str | None] | None = next(self._execute(query, row), None)
        if values is None:
            raise IndexError(f"row {row} is no passage of {self.path}")
        return values

    def _execute(self, query: str, *values: str | int | float) -> Iterator[Any]:
        """The rows that a query finds, as they are read."""
        try:
            cursor = self._database.execute(query, values)
            while rows := cursor.fetchmany(_ROWS):
                self._check_unchanged()
                yield from rows
        except sqlite3.Error as error:
            raise self._failed(error) from error
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Of a file that nothing guards, what was read counts only if it is still the one that was opened."""
        if self._stamp is not None and self._stamp != stamp(self.path):
            raise TandemError(
                f"The passages {self.path} were changed while they were read without the right to write there; "
                "open the index again."
            )

    def _failed(self, error: Exception) -> TandemError:
        self._check_unchanged()
        if _code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return TandemError(
                f"The passages {self.path} could not be read ({error}); see that the disk is sound and has room, and "
                "give the command again."
            )
        if _code(error) == sqlite3.SQLITE_BUSY:
            return _busy(self.path)
        if _code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY) and _log_size(self.path):
            return TandemError(
                f"The passages {self.path} could not be read ({error}): a change is still in the log beside them; "
                "open the index once with the right to write there."
            )
        return TandemError(f"The passages {self.path} are missing or damaged ({error}); build the index again.")


def _snapshot(path: Path) -> tuple[sqlite3.Connection, tuple[int, ...] | None]:
    """A connection inside a read transaction; or, where there can be none, one without and the stamp of the file."""
    uri = path.absolute().as_uri()
    options: dict[str, Any] = {"uri": True, "check_same_thread": False, "isolation_level": None}
    opened = None
    try:
        database: sqlite3.Connection = sqlite3.connect(f"{uri}?mode=ro", **options)
        database.execute("BEGIN")
        database.execute("SELECT * FROM state")
    except sqlite3.OperationalError as error:
        # SQLite keeps books of its readers beside the file. Where it may not, a writer learns of none.
        if not path.exists() or _log_size(path) or _code(error) == sqlite3.SQLITE_BUSY:
            raise
        opened = stamp(path)
        database = sqlite3.connect(f"{uri}?mode=ro&immutable=1", **options)
    return database, opened


def _check_size(database: sqlite3.Connection, path: Path) -> None:
    """Raise if a file was cut short, which SQLite may notice only where it ends; with a log it may be short yet."""
    if not _log_size(path):
        (pages,), (page_size,) = (
            database.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
        )
        if path.stat().st_size < pages * page_size:
            raise sqlite3.DatabaseError(f"it has {path.stat().st_size} bytes instead of {pages * page_size}")


def _log_size(path: Path) -> int:
    """Bytes of what SQLite has not yet put into the file itself."""
    with suppress(FileNotFoundError):
        return path.with_name(f"{path.name}-wal").stat().st_size
    return 0


# Writing


def store_passages(
    path: Path, records: Iterable[tuple[int, Record]], source: Path | str, segments: Sequence[str] = ()
) -> None:
    """Write records, each with its line number in `source`, and names of segments to the new database `path`.

    The first record gets row 0. Never more than one is held in memory. An id that comes twice is a `TandemError`. The
    caller makes the file whole or nothing: without a journal, one cut short is of no use.
    """
    row = -1
    with _explained(path), closing(sqlite3.connect(path, isolation_level=None)) as database:
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -65536"):
            database.execute(f"PRAGMA {setting}")
        database.executescript(_TABLES)
        database.execute("BEGIN")
        for row, (number, record) in enumerate(records):
            try:
                _insert(database, row, record)
            except sqlite3.IntegrityError as error:
                raise repeated(source, number, record) from error
        for segment in segments:
            register(database, segment)
        database.execute("UPDATE state SET next_row = ?", (row + 1,))
        database.execute("COMMIT")
        database.execute("PRAGMA journal_mode = WAL")


def repeated(source: Path | str, number: int, record: Record) -> TandemError:
    what = f"field _id repeats {record.passage.id!r} of an earlier line; give each line its own."
    return fault(source, number, what)


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """The database in a transaction of one writer, committed when the block ends well: as the next generation, unless
    nothing was changed."""
    with _explained(path), closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = FULL")
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            if database.total_changes:
                database.execute("UPDATE state SET generation = generation + 1")
                database.execute(f"PRAGMA user_version = {secrets.randbits(31)}")
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise


def fold(path: Path) -> None:
    """Put what SQLite keeps in its log into the database itself, as far as no reader needs it where it is.

    What is in the log is committed already. If a reader is just coming or going, or the disk has no room, it stays
    there for a later writer.
    """
    with _explained(path), closing(sqlite3.connect(path, timeout=0)) as database:
        try:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise


def check_rows(first: int, count: int) -> None:
    """Raise if there are no rows for `count` more passages from `first` on."""
    if first + count > _ROWS_IN_ALL:
        raise TandemError("The index has given all of its 2³¹ rows, those of replaced passages too; build it again.")


def put(database: sqlite3.Connection, records: Sequence[Record]) -> int:
    """Insert records under new rows, each in the place of the passage with its id: how many of these there were."""
    replaced = remove(database, [record.passage.id for record in records])
    (first,) = database.execute("SELECT next_row FROM state").fetchone()
    check_rows(first, len(records))
    for row, record in enumerate(records, start=first):
        _insert(database, row, record)
    database.execute("UPDATE state SET next_row = next_row + ?", (len(records),))
    return replaced


def remove(database: sqlite3.Connection, ids: Sequence[str]) -> int:
    """Delete the passages with these ids: how many there were."""
    count = 0
    for start in range(0, len(ids), _IDS):
        some = ids[start : start + _IDS]
        among = f"id IN ({', '.join('?' * len(some))})"
        database.execute(f"INSERT INTO tombstones SELECT row FROM passages WHERE {among}", some)
        count += database.execute(f"DELETE FROM passages WHERE {among}", some).rowcount
    return count


def drop_segments(database: sqlite3.Connection, names: Iterable[str], first: int) -> None:
    """Drop the last segments, whose rows begin with `first`, and what is still known of deleted rows from there on.

    The caller registers what takes their place.
    """
    database.executemany("DELETE FROM segments WHERE name = ?", ((name,) for name in names))
    database.execute("DELETE FROM fields WHERE row IN (SELECT row FROM tombstones WHERE row >= ?)", (first,))
    database.execute("DELETE FROM tombstones WHERE row >= ?", (first,))


def register(database: sqlite3.Connection, segment: str) -> None:
    """Make a segment part of the index."""
    database.execute("INSERT INTO segments (name) VALUES (?)", (segment,))


def _insert(database: sqlite3.Connection, row: int, record: Record) -> None:
    metadata = json.dumps(record.metadata) if record.metadata else None
    database.execute("INSERT INTO passages VALUES (?, ?, ?, ?, ?)", (row, *record.passage, metadata))
    if metadata is not None:
        pairs = ((field, value, row) for field, value in searchable(record.metadata))
        database.executemany("INSERT OR IGNORE INTO fields VALUES (?, ?, ?)", pairs)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Failures of the system, which SQLite tells in its own way, as the `OSError` or `TandemError` they are."""
    try:
        yield
    except sqlite3.OperationalError as error:
        number = {
            sqlite3.SQLITE_FULL: errno.ENOSPC,
            sqlite3.SQLITE_READONLY: errno.EROFS,
            sqlite3.SQLITE_CANTOPEN: errno.EACCES,
            sqlite3.SQLITE_IOERR: errno.EIO,
        }.get(_code(error))
        if _code(error) == sqlite3.SQLITE_BUSY:
            raise _busy(path) from error
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError):
            raise
        raise TandemError(f"The passages {path} are damaged ({error}); build the index again.") from error


def _busy(path: Path) -> TandemError:
    return TandemError(f"Another program keeps the passages {path} locked; give the command again when it has ended.")


def _code(error: Exception) -> int:
    """SQLite's primary code of an error, 0 for any other."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
