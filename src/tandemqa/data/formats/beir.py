"""BEIR layout: a folder with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, copied and checked on the way."""

from pathlib import Path

from tandemqa.data.formats.source import lines, records
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import string_field
from tandemqa.data.qrels import judgements


def fits(source: Path) -> bool:
    return (source / "corpus.jsonl").is_file()


def read(source: Path, split: str, out: Target) -> None:
    """Passages, queries and every split; fields other than id, title and text are left out. `split` is not used."""
    for line, record in records(source / "corpus.jsonl"):
        title = "" if record.get("title") is None else string_field(*line, record, "title")
        out.passage(line, title, string_field(*line, record, "text"), record["_id"])
    for line, record in records(source / "queries.jsonl"):
        out.query(line, string_field(*line, record, "text"), record["_id"])
    for path in sorted((source / "qrels").glob("[!.]*.tsv")):
        for line, query, passage, grade in judgements(lines(path)):
            out.judge(line, path.stem, query, passage, grade)
