"""Text files read line by line; whatever is wrong in one is named by file, line and field."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tandemqa.errors import TandemError

# ASCII whitespace alone: an id may hold a no-break or an ideographic space.
_FIELD = re.compile(r"\S+", re.ASCII)


Line = tuple[Path | str, int]
"""Where something stands: a file and the number of a line, from 1; `fault(*line, what)` is the error for it."""


Metadata = dict[str, Any]
"""What a passage carries besides title and text."""


def fault(path: Path | str, number: int, what: str) -> TandemError:
    """The error for line `number` (from 1) of `path`, a file or what else has lines."""
    return TandemError(f"{path}, line {number}: {what}")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading; one that is missing or cannot be read is a `TandemError`."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise TandemError(f"{path} does not exist; check the path or put the file there.") from error
    except OSError as error:
        raise TandemError(f"{path} cannot be read ({error.strerror}); it must be a readable file.") from error


def read_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield (line number from 1, byte offset of its first character, text without its line end).

    Blank lines are passed over; a byte order mark and CRLF are accepted. A file that is missing, unreadable
    or not UTF-8 is a `TandemError`.
    """
    for number, offset, text in raw_lines(path):
        if text.strip():
            yield number, offset, text.rstrip("\r\n")


def raw_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """As `read_lines`, but every line, each with its line end."""
    with opened(path) as file:
        end = 0
        for number, line in enumerate(file, start=1):
            start, end = end, end + len(line)
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                start += len(codecs.BOM_UTF8)
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                what = f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8."
                raise fault(path, number, what) from error
            yield number, start, text


def fields(text: str) -> list[str]:
    """The fields of a line that ASCII whitespace separates, as TREC files have them."""
    return _FIELD.findall(text)


def check_trec_names(names: Iterable[str], place: str) -> None:
    """Raise `TandemError`, which begins with `place`, for a name that is empty or holds whitespace."""
    for name in names:
        if fields(name) != [name]:
            what = f"the name {name!r} is empty or holds whitespace, which TREC files cannot; rename it."
            raise TandemError(f"{place}: {what}")


def read_records(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (line number, byte offset, object) of a JSONL file whose objects all carry an `_id`, a string.

    A line that is not such an object, an empty `_id`, or a file without rows is a `TandemError`.
    """
    for number, offset, record in read_objects(path):
        if not string_field(path, number, record, "_id").strip():
            raise fault(path, number, "field _id is empty; give every line an _id of its own.")
        yield number, offset, record


def read_objects(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """As `read_records`, but objects of any fields."""
    number = 0
    for number, offset, text in read_lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            what = f"not valid JSON ({reason}); write one JSON object on each line."
            raise fault(path, number, what) from error
        if not isinstance(record, dict):
            raise fault(path, number, 'not a JSON object; write one like {"field": "value", ...} on each line.')
        yield number, offset, record
    if not number:
        raise TandemError(f"{path} has no rows; write one JSON object on each line.")


def string_field(path: Path | str, number: int, record: dict[str, Any], field: str) -> str:
    """`record[field]`, or a `TandemError` when it is missing, not a string, or not Unicode text."""
    if field not in record:
        raise fault(path, number, f"field {field} is missing; add it as a string.")
    value = record[field]
    if not isinstance(value, str):
        raise fault(path, number, f"field {field} is {json.dumps(value)[:40]}, not a string; put it in quotes.")
    if not is_text(value):
        raise fault(path, number, f"field {field} holds half of a surrogate pair (\\ud800 to \\udfff); remove it.")
    return value


def metadata_of(path: Path | str, number: int, record: dict[str, Any]) -> Metadata:
    """The further fields of a line of `corpus.jsonl`; one that is not JSON in UTF-8 is a `TandemError`."""
    nested = record.get("metadata") or {}
    if not isinstance(nested, dict):
        raise fault(path, number, 'field metadata is not an object; write one like {"year": 2001}.')
    found = {name: value for name, value in record.items() if name not in ("_id", "title", "text", "metadata")}
    found.update(nested)
    for name, value in found.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except UnicodeEncodeError as error:
            shown = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
            what = f"field {shown} holds half of a surrogate pair (\\ud800 to \\udfff); remove it."
            raise fault(path, number, what) from error
        except (ValueError, TypeError, RecursionError) as error:
            what = f"field {name} cannot be kept as JSON ({error}); change its value, or leave it out."
            raise fault(path, number, what) from error
    return found


def is_text(value: str) -> bool:
    """Whether UTF-8 can write it.

    JSON may spell half of a surrogate pair, which no tokenizer accepts; Python makes it of bytes that are not UTF-8.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
