"""The passages of an index: id, title and text by row, in one SQLite file."""

import errno
import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from tandemqa.data.dataset import Passage
from tandemqa.errors import TandemError


class PassageStore:
    """Passages read from disk by row. A store is written once, then only read, from any number of threads."""

    def __init__(self, path: Path) -> None:
        """Open a store; a file that is missing or no store is a `TandemError`."""
        self.path = path
        try:
            # "immutable" spares locks and works on a read-only disk; the file is never written again.
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
            )
            (self._size,) = self._connection.execute("SELECT coalesce(max(row) + 1, 0) FROM passages").fetchone()
        except sqlite3.Error as error:
            raise self._damaged(error) from error

    @classmethod
    def build(cls, path: Path, passages: Iterable[Passage]) -> "PassageStore":
        """Write `passages` to the new file `path`, row 0 first; never more than one is held in memory.

        The caller makes it whole or nothing: without a journal, a file cut short is of no use.
        """
        try:
            with closing(sqlite3.connect(path)) as connection, connection:
                connection.execute("PRAGMA journal_mode = OFF")
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute(
                    "CREATE TABLE passages (row INTEGER PRIMARY KEY, id TEXT NOT NULL, title TEXT NOT NULL, "
                    "text TEXT NOT NULL)"
                )
                connection.executemany(
                    "INSERT INTO passages VALUES (?, ?, ?, ?)",
                    ((row, *passage) for row, passage in enumerate(passages)),
                )
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        return cls(path)

    def __len__(self) -> int:
        return int(self._size)

    def rows(self, rows: Sequence[int]) -> list[Passage]:
        """The passages at `rows`, in that order; a row outside the store is an `IndexError`."""
        return [self._row(int(row)) for row in rows]

    def _row(self, row: int) -> Passage:
        try:
            values = self._connection.execute("SELECT id, title, text FROM passages WHERE row = ?", (row,)).fetchone()
        except sqlite3.Error as error:
            raise self._damaged(error) from error
        if values is None:
            raise IndexError(f"row {row} of {len(self)} passages")
        return Passage(*values)

    def _damaged(self, error: sqlite3.Error) -> TandemError:
        return TandemError(f"The passages {self.path} are missing or damaged ({error}); build the index again.")
