"""MS MARCO's layout: a folder with `collection.tsv`, `queries*.tsv`, `qrels*.tsv` and `qidpidtriples*.tsv`."""

from collections.abc import Iterator
from pathlib import Path

from tandemqa.data.formats.source import lines
from tandemqa.data.formats.splits import split_in
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import Line, fault, fields
from tandemqa.data.qrels import judgements
from tandemqa.errors import TandemError
from tandemqa.wording import counted


def fits(source: Path) -> bool:
    return (source / "collection.tsv").is_file()


def read(source: Path, split: str, out: Target) -> None:
    """Passages, queries, and the judgements of every split that a file name tells (train, dev, test), else `split`.

    collection.tsv: passage id, text; queries*.tsv: query id, text; qrels*.tsv: query id, 0, passage id, grade, with
    tabs or spaces; qidpidtriples*.tsv, if there: query id, positive, hard negative, which becomes a grade of 0.
    Files of one split are merged, so that qrels.dev.small.tsv adds nothing to qrels.dev.tsv.
    """
    for line, name, text in _texts(source / "collection.tsv"):
        out.passage(line, "", text, name)
    for path in _all(source, "queries*.tsv"):
        for line, name, text in _texts(path):
            out.query(line, text, name)
    triples = sorted(source.glob("qidpidtriples*.tsv"))
    for path in sorted(source.glob("qrels*.tsv")) if triples else _all(source, "qrels*.tsv"):
        for line, query, passage, grade in judgements(lines(path)):
            out.judge(line, split_in(path.name, split), query, passage, grade)
    for path in triples:
        for line, text in lines(path):
            columns = fields(text)
            if len(columns) != 3:
                raise fault(*line, f"{counted(len(columns), 'column')}; write query id, positive and hard negative.")
            query, positive, negative = columns
            out.judge(line, split_in(path.name, split), query, positive, 1)
            out.judge(line, split_in(path.name, split), query, negative, 0)


def _texts(path: Path) -> Iterator[tuple[Line, str, str]]:
    for line, row in lines(path):
        name, tab, text = row.partition("\t")
        if not tab:
            raise fault(*line, "no tab; write an id and a text with a tab between.")
        yield line, name, text


def _all(source: Path, pattern: str) -> list[Path]:
    paths = sorted(source.glob(pattern))
    if not paths:
        raise TandemError(f"{source} has no {pattern} beside collection.tsv; put at least one there.")
    return paths
