"""Passages alone, in a CSV, TSV or JSONL file with named columns: what an index needs, without questions."""

from pathlib import Path
from typing import Any

from tandemqa.data.formats import pairs, wikipedia
from tandemqa.data.formats.source import column_names, named_rows
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import Line, fault, metadata_of, string_field

_ID = ("_id", "id")
_TITLE = ("title",)
_TEXT = ("text", "passage")


def fits(source: Path) -> bool:
    names = {name.lower() for name in column_names(source)}
    # With an `_id` it is a file of BEIR's, passages or questions.
    return bool(names & set(_TEXT)) and not names & {*pairs.QUESTION, "_id"} and not wikipedia.fits(source)


def read(source: Path, split: str, out: Target) -> None:
    """The passages, of which `text` (or `passage`) alone must be there; `split` is not used.

    `id` (or `_id`) names a passage, `title` stands before its text; what else there is and not empty becomes its
    metadata, under its name.
    """
    for line, row in named_rows(source):
        _take(line, row, out)


def _take(line: Line, row: dict[str, Any], out: Target) -> None:
    name, title, text = (_column(row, names) for names in (_ID, _TITLE, _TEXT))
    if text is None:
        raise fault(*line, f"field {_TEXT[0]} is missing; add it, or name it {_TEXT[1]}.")
    further = {
        field: value
        for field, value in row.items()
        if field and field not in (name, title, text) and value not in (None, "")
    }
    out.passage(
        line,
        "" if title is None or row[title] is None else string_field(*line, row, title),
        string_field(*line, row, text),
        None if name is None or row[name] is None else _name(line, row, name),
        metadata_of(*line, further),
    )


def _column(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first field of a row with one of these names, in capitals or not."""
    return next((field for field in row if field.lower() in names), None)


def _name(line: Line, row: dict[str, Any], field: str) -> str:
    """An id, which may be an integer."""
    return str(row[field]) if type(row[field]) is int else string_field(*line, row, field)
