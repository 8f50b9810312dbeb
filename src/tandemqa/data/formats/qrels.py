"""Judgement files, row by row: BEIR's three columns, with or without a header, or the four of TREC."""

from collections.abc import Iterator
from pathlib import Path

from tandemqa.data.formats.source import Line, integer, lines
from tandemqa.data.lines import fault, fields

_HEADER = ["query-id", "corpus-id", "score"]


def judgements(path: Path) -> Iterator[tuple[Line, str, str, int]]:
    """Yield (line, query id, passage id, grade); between columns are tabs or, in a line without a tab, spaces."""
    for line, text in lines(path):
        columns = text.split("\t") if "\t" in text else fields(text)
        if columns == _HEADER:
            continue
        if len(columns) not in (3, 4):
            what = f"{len(columns)} columns; write query id, 0, passage id and grade, with tabs between."
            raise fault(*line, what)
        yield line, columns[0], columns[-2], integer(line, "grade", columns[-1])
