"""DPR's training data: a JSON list of questions, each with its positive and negative passages ("contexts")."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandemqa.data.formats.source import first_line, items
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import Line, fault, string_field

_GRADES = {"positive_ctxs": 1, "hard_negative_ctxs": 0, "negative_ctxs": 0}


def fits(source: Path) -> bool:
    return first_line(source).lstrip().startswith("[")


def read(source: Path, split: str, out: Target) -> None:
    """The questions, their passages, and as judgements 1 for a positive, 0 for a hard or any other negative.

    A question is {question, positive_ctxs, hard_negative_ctxs, negative_ctxs}, the last two optional; a passage is
    {title, text}, and `passage_id` or `psg_id` names it if it is there. Answers are left out. The ids are those of
    psgs_w100.tsv, so that its corpus may take the place of the smaller one.
    """
    for line, record in items(source):
        if not isinstance(record, dict):
            raise fault(*line, 'not a JSON object; write one like {"question": "...", "positive_ctxs": [...]}.')
        query = out.query(line, string_field(*line, record, "question"))
        for field, grade in _GRADES.items():
            for title, text, name in _passages(line, record, field):
                out.judge(line, split, query, out.passage(line, title, text, name), grade)


def _passages(line: Line, record: dict[str, Any], field: str) -> Iterator[tuple[str, str, str | None]]:
    found = record.get(field, None if field == "positive_ctxs" else [])
    if not isinstance(found, list):
        raise fault(*line, f"field {field} is missing or not a list; add it as a list of passages.")
    for place, passage in enumerate(found):
        where = f"{field}[{place}]"
        if not isinstance(passage, dict):
            raise fault(*line, f'{where} is not a JSON object; write one like {{"title": "...", "text": "..."}}.')
        named = {f"{where}.{key}": value for key, value in passage.items()}
        title = "" if passage.get("title") is None else string_field(*line, named, f"{where}.title")
        name = passage.get("passage_id", passage.get("psg_id"))
        yield title, string_field(*line, named, f"{where}.text"), None if name in (None, "") else str(name)
