"""The demo's dataset in BEIR layout: this Python's own documentation, and questions a programmer would type."""

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from tandemqa.data.dataset import Passage
from tandemqa.demo.corpus import clean_passages, weak_pairs
from tandemqa.files import whole_folder

TEST_QUESTIONS = 240
DEV_QUESTIONS = 120


class Question(NamedTuple):
    """A question, the subject area it belongs to, and the ids of all passages that answer it."""

    topic: str
    text: str
    passages: list[str]


def load_questions(known: set[str]) -> list[Question]:
    """The questions that ship with the package, without those that have no passage in `known`: a Python of another
    version may lack one."""
    questions = []
    folder = resources.files("tandemqa.demo") / "questions"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            passages = [name for name in record["passages"] if name in known]
            if passages:
                questions.append(Question(record["topic"], record["question"], passages))
    return questions


def split_by_topic(questions: list[Question]) -> dict[str, list[Question]]:
    """Whole topics, in an order that depends on their names alone: test first, then dev, the rest is for training.

    No topic, and so no passage, serves two splits.
    """
    topics: dict[str, list[Question]] = {}
    for question in questions:
        topics.setdefault(question.topic, []).append(question)
    splits: dict[str, list[Question]] = {"test": [], "dev": [], "train": []}
    for topic in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if len(splits["test"]) < TEST_QUESTIONS:
            split = "test"
        else:
            split = "dev" if len(splits["dev"]) < DEV_QUESTIONS else "train"
        splits[split] += topics[topic]
    return splits


def write_datasets(folder: Path) -> tuple[Path, Path]:
    """Write `ask-python` (passages and questions) and `docstrings` (the weak pairs, for training only: a
    docstring's summary as the question, its body as the passage)."""
    passages = clean_passages()
    questions = load_questions({passage.id for passage in passages})
    splits = split_by_topic(questions)
    _write_beir(folder / "ask-python", passages, splits)
    pairs = weak_pairs(passages)
    bodies = [Passage(name, "", body) for _, name, body in pairs]
    summaries = [Question("docstrings", summary, [name]) for summary, name, _ in pairs]
    _write_beir(folder / "docstrings", bodies, {"train": summaries})
    return folder / "ask-python", folder / "docstrings"


def _write_beir(folder: Path, passages: list[Passage], splits: dict[str, list[Question]]) -> None:
    with whole_folder(folder) as partial:
        _write_lines(partial / "corpus.jsonl", [{"_id": p.id, "title": p.title, "text": p.text} for p in passages])
        queries, rows = [], {}
        for split, questions in splits.items():
            rows[split] = ["query-id\tcorpus-id\tscore"]
            for number, question in enumerate(questions):
                query_id = f"{split}-{number}"
                queries.append({"_id": query_id, "text": question.text})
                rows[split] += [f"{query_id}\t{passage}\t1" for passage in question.passages]
        _write_lines(partial / "queries.jsonl", queries)
        (partial / "qrels").mkdir()
        for split, lines in rows.items():
            (partial / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
