"""Judgements: which passages answer which query, and the two file formats that carry them, BEIR's and TREC's."""

import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from tandemqa.data.lines import Line, check_trec_names, fault, fields, read_lines
from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.wording import counted

Qrels = dict[str, dict[str, int]]
"""Judgements: query id -> passage id -> grade; a grade above 0 is a positive."""

_HEADER = ["query-id", "corpus-id", "score"]
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")


def read_qrels(path: Path, queries: Container[str] | None = None, passages: Container[str] | None = None) -> Qrels:
    """Read judgements, over known query and passage ids where these are given; a fault is a `TandemError`.

    Either BEIR's three columns, tab-separated, with or without the header `query-id corpus-id score`, or the
    four of a TREC qrels file (query, iteration, passage, grade), separated by spaces or tabs.
    """
    qrels: Qrels = {}
    for (_, number), query, passage, grade in judgements(
        ((path, number), text) for number, _, text in read_lines(path)
    ):
        if queries is not None and query not in queries:
            raise fault(path, number, f"query-id {query!r} is not in queries.jsonl; add it or remove the line.")
        if passages is not None and passage not in passages:
            raise fault(path, number, f"corpus-id {passage!r} is not in corpus.jsonl; add it or remove the line.")
        grades = qrels.setdefault(query, {})
        if grades.setdefault(passage, grade) != grade:
            what = f"{query!r} and {passage!r} stand on an earlier line with another score; keep one."
            raise fault(path, number, what)
    if not qrels:
        raise TandemError(f"{path} has no rows; add judgements or remove the file.")
    return qrels


def judgements(lines: Iterable[tuple[Line, str]]) -> Iterator[tuple[Line, str, str, int]]:
    """Yield (line, query id, passage id, grade) from the lines of a file in either format, row by row."""
    width = 0
    for line, text in lines:
        columns = text.split("\t") if "\t" in text else fields(text)
        if not width:
            width = len(columns)
            if [column.strip().lower() for column in columns] == _HEADER:
                continue
        if len(columns) != width or width not in (3, 4):
            what = f"{counted(len(columns), 'column')}; write query-id, corpus-id and score, with tabs between."
            raise fault(*line, what)
        grade = columns[-1].strip()
        if not _INTEGER.fullmatch(grade):
            raise fault(*line, f"score {grade[:20]!r} is not an integer; write 1 for a positive, 0 otherwise.")
        yield line, columns[0], columns[-2], int(grade)


def write_qrels(qrels: Qrels, path: Path) -> None:
    """Write a TREC qrels file: a line `query 0 passage grade` a judgement, in the order of `qrels`.

    An id that is empty or holds whitespace, which the format cannot carry, is a `TandemError`.
    """
    names = (name for query, grades in qrels.items() for name in (query, *grades))
    check_trec_names(names, f"{path} was not written")
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for query, grades in qrels.items():
            for passage, grade in grades.items():
                file.write(f"{query} 0 {passage} {grade}\n")
