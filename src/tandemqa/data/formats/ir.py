"""Datasets of the package ir_datasets, by its ids: `ir:ID`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tandemqa.data.formats.splits import split_in
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import Line
from tandemqa.errors import TandemError
from tandemqa.extras import needed
from tandemqa.progress import track

_PREFIX = "ir:"


def fits(source: Path) -> bool:
    return str(source).startswith(_PREFIX)


def read(source: Path, split: str, out: Target) -> None:
    """Passages, queries, judgements, and pairs of a better and a worse passage, which get the grades 1 and 0.

    The split is the one that the id tells (train, dev, test), else `split`. What has no text is left out, with its
    judgements: these collections cannot be put right by who reads them.
    """
    name = str(source).removeprefix(_PREFIX)
    dataset = _load(name)
    split = split_in(name, split)
    for line, passage in _counted(source, "passage", dataset.docs_iter(), dataset.docs_count() or 0):
        title, text = _title_and_text(passage)
        if title.strip() or text.strip():
            out.passage(line, title, text, passage.doc_id)
    if dataset.has_queries():
        for line, query in _counted(source, "query", dataset.queries_iter()):
            if query.default_text().strip():
                out.query(line, query.default_text(), query.query_id)
    if dataset.has_qrels():
        for line, row in _counted(source, "judgement", dataset.qrels_iter()):
            if out.knows(row.query_id, row.doc_id):
                out.judge(line, split, row.query_id, row.doc_id, row.relevance)
    if dataset.has_docpairs():
        for line, pair in _counted(source, "pair", dataset.docpairs_iter()):
            for passage_id, grade in ((pair.doc_id_a, 1), (pair.doc_id_b, 0)):
                if out.knows(pair.query_id, passage_id):
                    out.judge(line, split, pair.query_id, passage_id, grade)


def _load(name: str) -> Any:
    ir_datasets = needed("ir_datasets", "data", "This format")
    try:
        dataset = ir_datasets.load(name)
    except KeyError as error:
        raise TandemError(f"The package ir_datasets knows no id {name!r}; see https://ir-datasets.com.") from error
    if not dataset.has_docs():
        raise TandemError(f"The ir_datasets id {name!r} has no passages; choose one that has.")
    return dataset


def _title_and_text(passage: Any) -> tuple[str, str]:
    if hasattr(passage, "title") and hasattr(passage, "text"):
        return passage.title or "", passage.text or ""
    return "", passage.default_text()


def _counted(source: Path, unit: str, found: Iterable[Any], total: int = 0) -> Iterator[tuple[Line, Any]]:
    for number, one in enumerate(track(found, f"read {source.name}", total, unit), start=1):
        yield (source, number), one
