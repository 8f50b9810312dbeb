"""Pairs of a question and a passage that answers it, in a CSV, TSV or JSONL file with named columns."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandemqa.data.formats.source import column_names, first_line, integer, named_rows
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import Line, fault, string_field

QUESTION = ("question", "query")
_PASSAGE = ("passage", "positive", "text")
_NEGATIVE = re.compile(r"negatives?(_\d+)?")


def fits(source: Path) -> bool:
    names = {name.lower() for name in column_names(source)}
    return bool(names & set(QUESTION)) and (bool(names & set(_PASSAGE)) or first_line(source).startswith("{"))


def read(source: Path, split: str, out: Target) -> None:
    """The questions and passages, identified by their text, and their judgements; see `take`."""
    for line, row in named_rows(source):
        take(line, {name.lower(): value for name, value in row.items()}, split, out)


def take(line: Line, record: dict[str, Any], split: str, out: Target) -> None:
    """One pair.

    `question` or `query`; `passage`, `positive` or `text`; if there, `title`, `score` (the grade, else 1), and hard
    negatives, which get the grade 0: `negative`, `negatives`, `negative_1` and so on, each a text or a list of texts
    or of {title, text}. A second positive of a question is a pair of its own.
    """
    query = out.query(line, _either(line, record, QUESTION))
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
