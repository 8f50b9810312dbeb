"""The demo "Ask Python": train both models on this Python's own documentation, measure, and answer."""

import json
import shlex
import sys
import textwrap
import time
from pathlib import Path

from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.demo.dataset import write_datasets
from tandemqa.evaluation.report import Report
from tandemqa.evaluation.stages import evaluate
from tandemqa.index.index import Index
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.train import train
from tandemqa.search.searcher import Answer, Searcher

DEPTH = 20
# Asked of topics that no training question comes from.
QUESTIONS = 3
SHOWN = 3  # passages of each


def run_demo(out: Path, as_json: bool) -> None:
    """Build the datasets, train on docstrings and then on questions, measure on the test questions, index, and answer
    three of them.

    Everything is left under `out`; called again after an interruption, it goes on where it stopped.
    """
    started = time.monotonic()
    _say("Ask Python: the language reference and the docstrings of this Python, as passages to search.")
    questions, docstrings = (load_dataset(folder) for folder in write_datasets(out))
    _say(f"{len(questions.passages):,} passages; questions: {_counts(questions)}.")
    _say("\n1. Weak supervision: the summary of a docstring as the question, its body as the passage.")
    weak = train(docstrings, out / "weak", "demo-docstrings")
    _say("\n2. The questions: both models, together.")
    start = [f"retriever.model={weak.folder / 'retriever'}", f"reranker.model={weak.folder / 'reranker'}"]
    bundle = train(questions, out, load_recipe("demo", start))
    _say("\n3. Measuring on the test questions; no training question is about their topics.")
    report = evaluate(bundle, questions, "test", DEPTH)
    index = Index.build(bundle, questions, out / "index")
    answers = Searcher(index, bundle).search_many(_examples(questions), k=SHOWN, depth=DEPTH)
    minutes = (time.monotonic() - started) / 60
    if as_json:
        print(json.dumps(_as_json(report, answers, minutes), indent=2, ensure_ascii=False))
    else:
        print(_as_text(report, answers, minutes, out))


def _counts(dataset: Dataset) -> str:
    return ", ".join(f"{len(dataset.qrels[split])} {split}" for split in ("train", "dev", "test"))


def _examples(dataset: Dataset) -> list[str]:
    """Test questions spread over the file, and so over topics."""
    ids = list(dataset.judged("test"))
    return [dataset.queries[ids[len(ids) * (2 * i + 1) // (2 * QUESTIONS)]] for i in range(QUESTIONS)]


def _as_json(report: Report, answers: list[Answer], minutes: float) -> dict[str, object]:
    found = [
        {
            "question": a.question,
            "confidence": a.confidence,
            "passages": [{"id": h.id, "score": h.score, "text": h.text} for h in a],
        }
        for a in answers
    ]
    return {**report.as_json(), "answers": found, "minutes": round(minutes, 2)}


def _as_text(report: Report, answers: list[Answer], minutes: float, out: Path) -> str:
    tandemqa, place = shlex.quote(sys.argv[0]), shlex.quote(str(out))
    parts = ["", report.table(), ""]
    for answer in answers:
        parts += [f"? {answer.question}   (confidence {answer.confidence:.2f})"]
        for hit in answer:
            parts += [f"  {hit.rank}. {hit.title}", f"     {textwrap.shorten(hit.text, 90, placeholder=' ...')}"]
        parts += [""]
    parts += [
        f"{minutes:.1f} minutes. Go on with",
        f'  {tandemqa} search {place}/index "how do I read a file line by line"',
        f"  {tandemqa} evaluate {place} {place}/ask-python --split dev -k {DEPTH}",
        f"  {tandemqa} train YOUR_DATA --out runs/mine     (a folder in BEIR layout; see the README)",
    ]
    return "\n".join(parts)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
