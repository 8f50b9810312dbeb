"""Pairs of a question and a passage that answers it, in a CSV, TSV or JSONL file with named columns."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandemqa.data.formats.source import first_line, integer, objects, rows
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import Line, fault, string_field

_QUESTION = ("question", "query")
_PASSAGE = ("passage", "positive", "text")
_NEGATIVE = re.compile(r"negatives?(_\d+)?")


def fits(source: Path) -> bool:
    first = first_line(source)
    if first.startswith("{"):
        return any(f'"{name}"' in first for name in _QUESTION)
    names = _names(next(csv.reader([first], delimiter=_delimiter(first)), []))
    return any(name in names for name in _QUESTION) and any(name in names for name in _PASSAGE)


def read(source: Path, split: str, out: Target) -> None:
    """The questions and passages, identified by their text, and their judgements; see `take`."""
    first = first_line(source)
    for line, record in objects(source) if first.startswith("{") else _table(source, _delimiter(first)):
        take(line, record, split, out)


def take(line: Line, record: dict[str, Any], split: str, out: Target) -> None:
    """One pair.

    `question` or `query`; `passage`, `positive` or `text`; if there, `title`, `score` (the grade, else 1), and hard
    negatives, which get the grade 0: `negative`, `negatives`, `negative_1` and so on, each a text or a list of texts
    or of {title, text}. A second positive of a question is a pair of its own.
    """
    query = out.query(line, _either(line, record, _QUESTION))
    title = "" if record.get("title") is None else string_field(*line, record, "title")
    passage = out.passage(line, title, _either(line, record, _PASSAGE))
    grade = 1 if record.get("score") is None else integer(line, "score", record["score"])
    out.judge(line, split, query, passage, grade)
    for title, text in _negatives(line, record):
        out.judge(line, split, query, out.passage(line, title, text), 0)


def _either(line: Line, record: dict[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in record:
            return string_field(*line, record, name)
    raise fault(*line, f"field {names[0]} is missing; add it, or name it {' or '.join(names[1:])}.")


def _negatives(line: Line, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for field, value in record.items():
        # A table has empty cells where a question has fewer negatives than another.
        if value is None or value == "" or not _NEGATIVE.fullmatch(field):
            continue
        for negative in value if isinstance(value, list) else [value]:
            if isinstance(negative, dict):
                title = "" if negative.get("title") is None else string_field(*line, negative, "title")
                yield title, string_field(*line, negative, "text")
            else:
                yield "", string_field(*line, {field: negative}, field)


def _table(source: Path, delimiter: str) -> Iterator[tuple[Line, dict[str, Any]]]:
    names: list[str] = []
    for line, row in rows(source, delimiter):
        if not names:
            names = _names(row)
        elif len(row) != len(names):
            raise fault(*line, f"{len(row)} columns, but the first line names {len(names)}; write one for each.")
        else:
            yield line, dict(zip(names, row, strict=True))


def _names(row: list[str]) -> list[str]:
    return [name.strip().lower() for name in row]


def _delimiter(first: str) -> str:
    return "\t" if "\t" in first else ","
