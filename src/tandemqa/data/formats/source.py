"""A file that is converted, as a stream of lines, objects, table rows or list items, with a bar over its bytes.

Whatever is wrong in a file is a `TandemError` that names it and the line.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from tandemqa.data.lines import Line, fault, opened, raw_lines, read_lines, read_objects, read_records
from tandemqa.errors import TandemError
from tandemqa.progress import bar
from tandemqa.wording import counted

T = TypeVar("T")

_CHUNK = 1 << 20
_HEAD = 1 << 16
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
# The name of a field in JSON: no quoted word inside a string stands before a colon with its quotes bare.
_FIELD = re.compile(r'(?<!\\)"([^"\\]+)"\s*:')
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
# A JSON token that the end of a chunk cuts in two is reported at most so far from the end, unless it is a string.
_LONGEST_TOKEN = 12


def first_line(path: Path) -> str:
    """The first line of a file that is not blank, at most 64 KiB of it; "" where there is none or no file."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""
    return next((line.rstrip("\r") for line in head.split("\n") if line.strip()), "")


def lines(path: Path) -> Iterator[tuple[Line, str]]:
    """The lines of a text file that are not blank, without their ends."""
    return _with_bar(path, read_lines(path))


def objects(path: Path) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The objects of a JSONL file."""
    return _with_bar(path, read_objects(path))


def records(path: Path) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The objects of a JSONL file where each must have an `_id`."""
    return _with_bar(path, read_records(path))


def rows(path: Path, delimiter: str) -> Iterator[tuple[Line, list[str]]]:
    """The rows of a table with CSV quoting, so that a field may hold line ends; empty rows are passed over."""
    reader = csv.reader((text for _, text in _with_bar(path, raw_lines(path))), delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            what = f"not a row of a table ({error}); quote a field that holds quotes, and double these."
            raise fault(path, number, what) from error
        if row is None:
            return
        if any(row):
            yield (path, number), row


def column_names(path: Path) -> list[str]:
    """The names of the columns of a table, or of the fields in the first line of a JSONL file, by that line alone."""
    first = first_line(path)
    if first.startswith("{"):
        return _FIELD.findall(first)
    return [name.strip() for name in next(csv.reader([first], delimiter=_delimiter(first)), [])]


def named_rows(path: Path) -> Iterator[tuple[Line, dict[str, Any]]]:
    """The objects of a JSONL file, or the rows of a CSV or TSV file under the names in its first line."""
    first = first_line(path)
    if first.startswith("{"):
        yield from objects(path)
        return
    names: list[str] = []
    for line, row in rows(path, _delimiter(first)):
        if not names:
            names = [name.strip() for name in row]
            if twice := next((name for name in names if name and names.count(name) > 1), None):
                raise fault(*line, f"column {twice!r} stands twice; rename one.")
        elif len(row) != len(names):
            raise fault(
                *line, f"{counted(len(row), 'column')}, but the first line names {len(names)}; write one for each."
            )
        else:
            yield line, dict(zip(names, row, strict=True))


def items(path: Path) -> Iterator[tuple[Line, Any]]:
    """The items of a JSON list, one after the other: in memory are one item and one chunk of the file."""
    with opened(path) as file, _bytes_bar(path) as progress:
        text = _JsonText(path, file, progress)
        if text.next_mark() != "[":
            raise text.fault('not a JSON list; it must look like [{"question": ...}, ...].')
        if text.peek() == "]":
            return
        mark, count = ",", 0
        while mark == ",":
            text.peek()
            count += 1
            # Often the whole list is one line.
            yield (f"{path}, item {count}", text.line), text.next_value()
            mark = text.next_mark()
        if mark != "]":
            found = f"{mark!r} follows an item" if mark else "the list is cut short"
            raise text.fault(f"not valid JSON ({found}); write the file again.")


def integer(line: Line, field: str, value: object) -> int:
    """`value`, an integer or one written out; anything else is a `TandemError` that names `field`."""
    if not _INTEGER.fullmatch(str(value).strip()):
        found = str(value)[:20]
        raise fault(*line, f"field {field} is {found!r}, not an integer; write 1 for a positive, 0 otherwise.")
    return int(str(value))


def _delimiter(first: str) -> str:
    return "\t" if "\t" in first else ","


class _JsonText:
    """The text of a JSON file as far as it is read: what comes next is at `_at`, on line `line`."""

    def __init__(self, path: Path, file: BinaryIO, progress: "tqdm[Any]") -> None:
        self.path = path
        self.line = 1
        self._file = file
        self._progress = progress
        self._text, self._at = "", 0
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()

    def fault(self, what: str, further: int = 0) -> TandemError:
        """The error for the line `further` characters on."""
        return fault(self.path, self.line + self._text.count("\n", self._at, self._at + further), what)

    def peek(self) -> str:
        """The next character that is not blank, "" at the end of the file."""
        while True:
            found = _NOT_BLANK.search(self._text, self._at)
            self._move(found.start() if found else len(self._text))
            if found or not self._read_on():
                return self._text[self._at : self._at + 1]

    def next_mark(self) -> str:
        mark = self.peek()
        self._move(self._at + len(mark))
        return mark

    def next_value(self) -> Any:
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise self.fault("not valid JSON (nested too deeply); write the file again.") from error
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN > len(self._text)
                further = error.pos - self._at
                if not (cut and self._read_on()):
                    raise self.fault(f"not valid JSON ({error.msg}); write the file again.", further) from error
            else:
                self._move(end)
                return value

    def _move(self, at: int) -> None:
        self.line += self._text.count("\n", self._at, at)
        self._at = at

    def _read_on(self) -> bool:
        """Read another chunk, at least as long as what is left: an item of any length is parsed a few times only."""
        left = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK, len(left)))
        self._progress.update(len(chunk))
        try:
            self._text, self._at = left + self._utf8.decode(chunk, final=not chunk), 0
        except UnicodeDecodeError as error:
            number = self.line + left.count("\n") + error.object.count(b"\n", 0, error.start)
            raise fault(self.path, number, "a byte is not UTF-8; save the file as UTF-8.") from error
        return bool(chunk)


def _with_bar(path: Path, found: Iterable[tuple[int, int, T]]) -> Iterator[tuple[Line, T]]:
    """What `data.lines` finds (number, byte offset, content), with a bar that moves along the offsets."""
    with _bytes_bar(path) as progress:
        for number, offset, content in found:
            progress.update(offset - progress.n)
            yield (path, number), content


@contextmanager
def _bytes_bar(path: Path) -> Iterator["tqdm[Any]"]:
    size = path.stat().st_size if path.is_file() else 0
    with bar(f"read {path.name}", size, "B") as progress:
        progress.unit_scale = True
        yield progress
        progress.update(size - progress.n)
