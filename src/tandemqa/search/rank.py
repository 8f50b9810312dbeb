"""The two stages on many queries at once: retrieve, fuse, re-rank. Each gives a run."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.runs import Run
from tandemqa.data.tokens import TokenIds
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.index.dense import DenseIndex
from tandemqa.index.lexical import LexicalIndex

# Cormack, Clarke and Büttcher (SIGIR 2009) found 60 and little sensitivity to it.
RRF_CONSTANT = 60


def retrieve(retriever: DualEncoder, index: DenseIndex, query_ids: list[str], queries: TokenIds, k: int) -> Run:
    """The retriever's k best passages for each query."""
    rows, scores = index.search(retriever.encode(queries, "query"), k)
    return Run(query_ids, rows, scores)


def lexical(index: LexicalIndex, query_ids: list[str], queries: Sequence[str], k: int) -> Run:
    """BM25's k best passages for each query."""
    return Run(query_ids, *index.search(queries, k))


def fuse(first: Run, second: Run, k: int) -> Run:
    """Reciprocal rank fusion of two runs over the same queries: the sum of 1 / (60 + rank), k best kept.

    Equal sums keep the order of `first`.
    """
    rows = np.full((len(first.query_ids), k), -1, dtype=np.int32)
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for number, rankings in enumerate(zip(first.rows, second.rows, strict=True)):
        sums: dict[int, float] = {}
        for ranking in rankings:
            for place, row in enumerate(ranking[ranking >= 0].tolist()):
                sums[row] = sums.get(row, 0.0) + 1.0 / (RRF_CONSTANT + place + 1)
        best = sorted(sums, key=sums.__getitem__, reverse=True)[:k]
        rows[number, : len(best)] = best
        scores[number, : len(best)] = [sums[row] for row in best]
    return Run(first.query_ids, rows, scores)


def rerank(
    reranker: CrossEncoder,
    candidates: Run,
    queries: TokenIds,
    passages: TokenIds,
    blend: float = 0.0,
    show: str | None = None,
) -> Run:
    """The candidates in the order of the re-ranker's score plus `blend` times their own; ties keep their order."""
    return blended(candidates, reranker_scores(reranker, candidates, queries, passages, show), blend)


def reranker_scores(
    reranker: CrossEncoder, candidates: Run, queries: TokenIds, passages: TokenIds, show: str | None = None
) -> NDArray[np.float32]:
    """The re-ranker's score of every candidate, float32 of the candidates' shape, -inf where there is none."""
    present = candidates.rows >= 0
    query_rows, places = np.nonzero(present)
    pairs = np.stack([query_rows, candidates.rows[present]], axis=1).astype(np.int64)
    scores = np.full(candidates.rows.shape, -np.inf, dtype=np.float32)
    scores[query_rows, places] = reranker.score(queries, passages, pairs, show=show)
    return scores


def followed_by(first: Run, whole: Run) -> Run:
    """The rankings of `first`, and behind them what `whole`, of which it re-orders the top, has further down.

    The scores go on falling from the last one of `first`, by 1 from place to place.
    """
    count = first.rows.shape[1]
    rest = whole.rows[:, count:]
    last = np.where(first.rows >= 0, first.scores, np.inf).min(axis=1, initial=np.inf, keepdims=True)
    below = (last - 1 - np.arange(rest.shape[1])).astype(np.float32)
    scores = np.where(rest >= 0, below, np.float32(-np.inf))
    return Run(
        first.query_ids, np.concatenate([first.rows, rest], axis=1), np.concatenate([first.scores, scores], axis=1)
    )


def blended(candidates: Run, scores: NDArray[np.float32], blend: float) -> Run:
    """The candidates in the order of `scores` (their shape) plus `blend` times their own; ties keep their order."""
    present = candidates.rows >= 0
    sums = scores.copy()
    sums[present] += np.float32(blend) * candidates.scores[present]
    order = np.argsort(-sums, axis=1, kind="stable")
    return Run(
        candidates.query_ids,
        np.take_along_axis(candidates.rows, order, axis=1),
        np.take_along_axis(sums, order, axis=1),
    )
