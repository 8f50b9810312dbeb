"""The dataset that a conversion writes."""

import json
from pathlib import Path
from typing import Any

from tandemqa.data.formats.judgements import Judgements
from tandemqa.data.formats.ledger import Ledger, digest
from tandemqa.data.lines import Line, Metadata, fault

_BREAKS_A_ROW = set("\t\r\n")
_as_json = json.JSONEncoder(ensure_ascii=False).encode


class Target:
    """A folder in BEIR layout as it is being written: passages, queries and judgements, each once.

    A passage or a query without an id is identified by its content, so the same text is always the same passage. In
    memory are ledgers alone: 16 to 32 bytes for a passage, a query or a judgement, whatever its length.
    What does not fit is a `TandemError` that names the line it came from.
    """

    def __init__(self, folder: Path) -> None:
        self._passages = Ledger()
        self._queries = Ledger()
        self._judgements: dict[str, Judgements] = {}
        self._folder = folder
        self._qrels = folder / "qrels"
        self._corpus_file = (folder / "corpus.jsonl").open("w", encoding="utf-8", newline="\n")
        self._queries_file = (folder / "queries.jsonl").open("w", encoding="utf-8", newline="\n")

    def passage(
        self, line: Line, title: str, text: str, name: str | None = None, metadata: Metadata | None = None
    ) -> str:
        """Write a passage unless it is there, and return its id: `name`, or a hash of its content."""
        if not title.strip() and not text.strip():
            raise fault(*line, "the passage is empty; fill it in or remove the line.")
        further = {"metadata": metadata} if metadata else {}
        content = digest("\0".join((title, text, *map(_as_json, further.values()))))
        name = _checked(line, "passage", name, content)
        if _is_new(line, "passage", self._passages, name, content):
            self._corpus_file.write(_as_json({"_id": name, "title": title, "text": text, **further}) + "\n")
        return name

    def query(self, line: Line, text: str, name: str | None = None) -> str:
        """Write a query unless it is there, and return its id: `name`, or a hash of the text."""
        if not text.strip():
            raise fault(*line, "the query is empty; fill it in or remove the line.")
        content = digest(text)
        name = _checked(line, "query", name, content)
        if _is_new(line, "query", self._queries, name, content):
            self._queries_file.write(_as_json({"_id": name, "text": text}) + "\n")
        return name

    def judge(self, line: Line, split: str, query: str, passage: str, grade: int) -> None:
        """Write a judgement of a query and a passage that were written before; of several, the highest grade."""
        for kind, ledger, name in (("query", self._queries, query), ("passage", self._passages, passage)):
            if ledger.get(name) is None:
                raise fault(*line, f"{kind} id {name!r} has no text; add the {kind} or remove the line.")
        if split not in self._judgements:
            self._qrels.mkdir(exist_ok=True)
            self._judgements[split] = Judgements(self._qrels / f"{split}.tsv")
        self._judgements[split].add(query, passage, grade)

    def knows(self, query: str, passage: str) -> bool:
        """Whether both were written, so that they can be judged."""
        return self._queries.get(query) is not None and self._passages.get(passage) is not None

    def summary(self) -> dict[str, Any]:
        """How many there are of everything, ready for JSON."""
        return {
            "passages": len(self._passages),
            "questions": len(self._queries),
            "splits": {
                split: {"positives": judgements.positives, "negatives": len(judgements) - judgements.positives}
                for split, judgements in self._judgements.items()
            },
        }

    def __enter__(self) -> "Target":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._corpus_file.close()
        self._queries_file.close()
        if not len(self._queries):  # a corpus alone
            (self._folder / "queries.jsonl").unlink()
        for judgements in self._judgements.values():
            judgements.close()
            if error is None:
                judgements.settle()


def _checked(line: Line, kind: str, name: str | None, content: int) -> str:
    """The id to write, which must fit into a tab-separated row."""
    if name is None:
        return f"{content:016x}"
    if not name.strip() or _BREAKS_A_ROW & set(name):
        raise fault(*line, f"{kind} id {name[:40]!r} is empty or holds a tab or a line end; give it another.")
    return name


def _is_new(line: Line, kind: str, ledger: Ledger, name: str, content: int) -> bool:
    part = content & 0x7FFFFFFF
    earlier = ledger.note(name, part)
    if earlier is not None and earlier != part:
        raise fault(*line, f"{kind} id {name!r} has another text on an earlier line; give each {kind} its own.")
    return earlier is None
