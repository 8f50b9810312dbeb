"""What bfloat16 and int8, where the processor has them, cost in ranking, against float32.

    python benchmarks/precision.py DATA --bundle BUNDLE [--split dev] [--questions 300] [--passages 20000]

On questions of a split drawn at random and the passages that are relevant to them, filled up with others drawn at
random. Three stages: the retriever over all of these passages; the re-ranker by its own score alone, on the 20 that
the retriever finds in float32; and both in one precision with the bundle's learnt weight, as search does. int8 is
calibrated on a copy of the bundle, on questions and passages that are not measured where there are any. Prints a
table: nDCG@10 and MRR@10, and their relative differences to float32 with 95 % intervals by a paired bootstrap over
questions.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from encoding import copy_of
from numpy.typing import NDArray

from tandemqa import Bundle, load_dataset
from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run, break_ties
from tandemqa.encoders.backbone import default_device, has_bfloat16
from tandemqa.encoders.quantised import has_int8
from tandemqa.evaluation.metrics import counted_queries, evaluate_run
from tandemqa.index.dense import DenseIndex
from tandemqa.search.learnt import Learnt
from tandemqa.search.rank import blended, reranker_scores, retrieve

EXACT = "float32"
# What else is measured, by the name of its precision in the package.
FAST = ({"bfloat16": "auto"} if has_bfloat16(default_device()) else {}) | ({"int8": "int8"} if has_int8() else {})
METRICS = ("ndcg@10", "mrr@10")
DEPTH = 20
RESAMPLES = 10_000
CALIBRATED_ON = 500

Values = dict[str, NDArray[np.float64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--bundle", required=True, help="a trained pair")
    parser.add_argument("--split", default="dev", help="whose questions")
    parser.add_argument("--questions", type=int, default=300, help="questions drawn at random")
    parser.add_argument(
        "--passages", type=int, default=20_000, help="passages to search in, the relevant ones included"
    )
    options = parser.parse_args()
    dataset, generator = load_dataset(options.data), np.random.default_rng(0)
    judged = dataset.judged(options.split)
    drawn = generator.permutation(counted_queries(judged))[: options.questions]
    qrels = {str(query): judged[str(query)] for query in drawn}
    questions = [dataset.queries[query] for query in qrels]
    rows, others = sample(dataset.passages.row, qrels, options.passages, generator)
    ids = [dataset.passages.ids[row] for row in rows]
    passages = [dataset.passages[row].full for row in rows]
    unasked = [text for query, text in dataset.queries.items() if query not in qrels]
    unread = [dataset.passages[row].full for row in others[:CALIBRATED_ON]] or passages[:CALIBRATED_ON]
    with tempfile.TemporaryDirectory() as folder:
        bundle, learnt = copy_of(options.bundle, Path(folder) / "bundle"), Learnt.of(Bundle.load(options.bundle))
        if "int8" in FAST:
            bundle.calibrate(unasked[:CALIBRATED_ON], unread)
        measured = stages(bundle, learnt.blend, questions, passages, qrels, ids)
    print(f"{len(qrels):,} {options.split} questions, {len(ids):,} passages, {DEPTH} re-ranked\n")
    print(table(measured))


def sample(
    row: dict[str, int], qrels: Qrels, count: int, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Rows of the relevant passages and of others drawn at random up to `count`, in order; and those left over."""
    relevant = {row[passage] for grades in qrels.values() for passage, grade in grades.items() if grade > 0}
    others = [number for number in generator.permutation(len(row)).tolist() if number not in relevant]
    room = max(0, count - len(relevant))
    return sorted(relevant | set(others[:room])), others[room:]


def stages(
    bundle: Bundle, blend: float, questions: list[str], passages: list[str], qrels: Qrels, ids: list[str]
) -> dict[str, dict[str, Values]]:
    """Of each stage and precision, each metric's value for each question."""
    queries = bundle.retriever.tokenize(questions), bundle.reranker.tokenize(questions)
    texts = bundle.retriever.tokenize(passages), bundle.reranker.tokenize(passages)
    row = {passage: number for number, passage in enumerate(ids)}
    measured: dict[str, dict[str, Values]] = {"retriever": {}, "re-ranker": {}, "both": {}}
    exact: Run | None = None
    for name, precision in {EXACT: "fp32", **FAST}.items():
        pair = bundle.at(precision)
        print(f"{name} ...", flush=True)
        vectors = pair.retriever.encode(texts[0], "passage", show="encode")
        found = retrieve(pair.retriever, DenseIndex.build(vectors), list(qrels), queries[0], DEPTH)
        found = break_ties(found, ids)
        exact = exact or found
        alone = reranker_scores(pair.reranker, exact, queries[1], texts[1], show="re-rank")
        scores = alone
        if found is not exact:
            scores = reranker_scores(pair.reranker, found, queries[1], texts[1], show="re-rank")
        runs = blended(exact, alone, 0.0), blended(found, scores, blend)
        for stage, run in zip(measured, (found, *runs), strict=True):
            measured[stage][name] = evaluate_run(run, qrels, row, METRICS)
    return measured


def table(measured: dict[str, dict[str, Values]]) -> str:
    heads = [f"{metric.replace('ndcg', 'nDCG').replace('mrr', 'MRR')} | to {EXACT}" for metric in METRICS]
    lines = [f"| stage | precision | {' | '.join(heads)} |", "|---" * (2 + 2 * len(METRICS)) + "|"]
    for stage, precisions in measured.items():
        for name, values in precisions.items():
            cells = []
            for metric in METRICS:
                cells.append(f"{values[metric].mean():.4f}")
                cells.append("" if name == EXACT else relative(precisions[EXACT][metric], values[metric]))
            lines.append(f"| {stage} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def relative(exact: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    """The relative difference of the means with its 95 % interval: questions resampled, each with both values."""
    drawn = np.random.default_rng(0).integers(len(exact), size=(RESAMPLES, len(exact)))
    low, high = np.percentile(other[drawn].mean(axis=1) / exact[drawn].mean(axis=1) - 1, [2.5, 97.5])
    return f"{other.mean() / exact.mean() - 1:+.2%} ({low:+.2%} to {high:+.2%})"


if __name__ == "__main__":
    main()
