"""How every cell is measured: the retriever over all passages, the re-ranker on fixed candidates, and both."""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from claims.cells import DEPTH
from claims.place import Place
from tandemqa.data.runs import Run, break_ties
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.evaluation.blend import learn_blend
from tandemqa.evaluation.metrics import evaluate_run
from tandemqa.index.dense import DenseIndex
from tandemqa.index.lexical import LexicalIndex
from tandemqa.search.rank import blended, followed_by, fuse, lexical, reranker_scores, retrieve

METRICS = {"mrr@10": "MRR@10", "ndcg@10": "nDCG@10", "recall@1": "R@1", "recall@20": "R@20", "recall@100": "R@100"}
STAGES = {
    "retriever": "retriever alone, all passages",
    "reranker": "re-ranker alone, fixed candidates",
    "pair": "end to end",
    "pair, unblended": "end to end, by the re-ranker's score alone",
}
RANKED = 100

Values = dict[str, dict[str, npt.NDArray[np.float64]]]
"""Stage -> metric -> its value for each dev question, float64 (N,)."""


def measure_pair(place: Place, retriever: DualEncoder, reranker: CrossEncoder) -> tuple[Values, dict[str, float]]:
    """The figures of a trained pair, and how fast its models read: passages and pairs a second.

    End to end the re-ranker orders the retriever's top, either by its score alone or with the retriever's share, as
    search does; the share is learnt on one half of the questions and used on the other.
    """
    tokens = passage_tokens(place.dataset, retriever.tokenizer)
    started = time.monotonic()
    index = DenseIndex.build(retriever.encode(tokens, "passage", show="encode passages"))
    rates = {"passages a second": len(tokens) / (time.monotonic() - started)}
    found = retrieve(retriever, index, place.query_ids, retriever.tokenize(place.questions), RANKED)
    found = break_ties(found, place.dataset.passages.ids)
    top, fixed = found.cut(DEPTH), place.candidates

    started = time.monotonic()
    (top_scores, fixed_scores), read = _scores(place, reranker, [top, fixed])
    rates["pairs a second"] = read / (time.monotonic() - started)
    pair, unblended = _cross_fitted(place, top, top_scores), blended(top, top_scores, 0.0)
    runs = {
        "retriever": found,
        "reranker": blended(fixed, fixed_scores, 0.0),
        "pair": followed_by(pair, found),
        "pair, unblended": followed_by(unblended, found),
    }
    return {stage: _figures(place, run) for stage, run in runs.items()}, rates


def measure_first_stage(place: Place, retriever: DualEncoder, name: str) -> Values:
    """The figures of a ranking without a re-ranker, which is all there is end to end: `base`, `bm25` or `hybrid`."""
    words = LexicalIndex.build(passage.full for passage in place.dataset.passages)
    run = lexical(words, place.query_ids, place.questions, RANKED)
    if name != "bm25":
        index = DenseIndex.build(
            retriever.encode(passage_tokens(place.dataset, retriever.tokenizer), "passage", show="encode passages")
        )
        dense = retrieve(retriever, index, place.query_ids, retriever.tokenize(place.questions), RANKED)
        run = dense if name == "base" else fuse(dense, run, RANKED)
    figures = _figures(place, break_ties(run, place.dataset.passages.ids))
    return {stage: figures for stage in STAGES if stage != "reranker"}


def _figures(place: Place, run: Run) -> dict[str, npt.NDArray[np.float64]]:
    return evaluate_run(run, place.qrels, place.dataset.passages.row, list(METRICS))


def _scores(place: Place, reranker: CrossEncoder, runs: Sequence[Run]) -> tuple[list[npt.NDArray[np.float32]], int]:
    """The re-ranker's scores of each run, of its shape, and how many pairs it read: each but once."""
    whole = np.concatenate([run.rows for run in runs], axis=1)
    rows = np.full(whole.shape, -1, dtype=np.int32)
    for number, ranked in enumerate(whole):
        distinct = np.unique(ranked[ranked >= 0])
        rows[number, : len(distinct)] = distinct
    joined = Run(place.query_ids, rows, np.zeros(rows.shape, dtype=np.float32))
    queries, tokens = reranker.tokenize(place.questions), passage_tokens(place.dataset, reranker.tokenizer)
    scores = reranker_scores(reranker, joined, queries, tokens, show="re-rank")
    known = [dict(zip(*each, strict=True)) for each in zip(rows.tolist(), scores.tolist(), strict=True)]
    of_runs = [
        np.array([[found[row] for row in ranked] for found, ranked in zip(known, run.rows.tolist(), strict=True)])
        for run in runs
    ]
    return [each.astype(np.float32) for each in of_runs], int(np.count_nonzero(rows >= 0))


def _cross_fitted(place: Place, candidates: Run, scores: npt.NDArray[np.float32]) -> Run:
    """The candidates by the re-ranker's score and the retriever's share that ranks the other half best."""
    parts = []
    for half in (0, 1):
        others = {query_id: place.qrels[query_id] for query_id in place.query_ids[1 - half :: 2]}
        weight = learn_blend(candidates, scores, others, place.dataset.passages.row)
        parts.append(blended(candidates, scores, weight))
    rows, sums = parts[0].rows.copy(), parts[0].scores.copy()
    rows[1::2], sums[1::2] = parts[1].rows[1::2], parts[1].scores[1::2]
    return Run(candidates.query_ids, rows, sums)
