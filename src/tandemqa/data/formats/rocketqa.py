"""RocketQA's training files: lines of four or six columns with tabs between."""

from pathlib import Path

from tandemqa.data.formats.source import first_line, integer, lines
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import fault
from tandemqa.wording import counted


def fits(source: Path) -> bool:
    columns = first_line(source).split("\t")
    # With such a second column it is a row of a qrels file.
    return len(columns) in (4, 6) and columns[-1].isdecimal() and columns[1] not in ("0", "Q0")


def read(source: Path, split: str, out: Target) -> None:
    """The queries and passages, identified by their text, and their judgements.

    Four columns, for a re-ranker or for both models: query, title, passage, label, which is the grade. Six, for a
    retriever: query, title and passage of the positive, title and passage of the hard negative, a 0 without meaning.
    """
    for line, text in lines(source):
        match text.split("\t"):
            case query_text, title, passage, label:
                query = out.query(line, query_text)
                grade = integer(line, "label", label)
                out.judge(line, split, query, out.passage(line, title, passage), grade)
            case query_text, title, positive, negative_title, negative, _:
                query = out.query(line, query_text)
                out.judge(line, split, query, out.passage(line, title, positive), 1)
                out.judge(line, split, query, out.passage(line, negative_title, negative), 0)
            case columns:
                what = "write 4 (query, title, passage, label) or 6, with tabs between"
                raise fault(*line, f"{counted(len(columns), 'column')}; {what}.")
