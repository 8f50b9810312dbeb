"""The two stages on many queries at once: retrieve, fuse, re-rank. Each gives a run."""

from collections.abc import Iterable, Iterator, Sequence

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
# A hybrid is made of so many of each ranking, where it is learnt, measured and searched alike: how far a ranking goes
# decides how its scores are scaled. Deep enough to find what only one of the two ranks high.
FUSED = 100


def retrieve(retriever: DualEncoder, index: DenseIndex, query_ids: list[str], queries: TokenIds, k: int) -> Run:
    """The retriever's k best passages for each query."""
    rows, scores = index.search(retriever.encode(queries, "query"), k)
    return Run(query_ids, rows, scores)


def lexical(index: LexicalIndex, query_ids: list[str], queries: Sequence[str], k: int) -> Run:
    """BM25's k best passages for each query."""
    return Run(query_ids, *index.search(queries, k))


def fuse(first: Run, second: Run, k: int, share: float | None = None) -> Run:
    """Two runs over the same queries as one, k best kept; equal sums keep the order of `first`.

    Without a `share`, by reciprocal rank: the sum of 1 / (60 + rank). With one, by scores: `share` times that of
    `first` plus the rest times that of `second`, each scaled to 0 to 1 over its ranking; a passage that a run does
    not rank has 0 there (Bruch, Gai and Ingber, TOIS 2023).
    """
    return next(fusions(first, second, k, [share]))


def fusions(first: Run, second: Run, k: int, shares: Iterable[float | None]) -> Iterator[Run]:
    """What `fuse` gives with each share, the scores scaled once for all."""
    ranks, scores = ([values(run) for run in (first, second)] for values in (_reciprocal_ranks, _scaled))
    for share in shares:
        weights = (1.0, 1.0) if share is None else (share, 1.0 - share)
        yield _summed(first, second, ranks if share is None else scores, weights, k)


def _summed(
    first: Run, second: Run, values: Sequence[NDArray[np.float64]], weights: tuple[float, float], k: int
) -> Run:
    """The k passages of each query with the largest weighted sum of their values, which have each run's shape."""
    rows = np.full((len(first.query_ids), k), -1, dtype=np.int32)
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for number in range(len(first.query_ids)):
        sums: dict[int, float] = {}
        for run, its_values, weight in zip((first, second), values, weights, strict=True):
            for row, value in zip(run.rows[number].tolist(), its_values[number].tolist(), strict=True):
                if row >= 0:
                    sums[row] = sums.get(row, 0.0) + weight * value
        best = sorted(sums, key=sums.__getitem__, reverse=True)[:k]
        rows[number, : len(best)] = best
        scores[number, : len(best)] = [sums[row] for row in best]
    return Run(first.query_ids, rows, scores)


def _reciprocal_ranks(run: Run) -> NDArray[np.float64]:
    return np.broadcast_to(1.0 / (RRF_CONSTANT + 1.0 + np.arange(run.rows.shape[1])), run.rows.shape)


def _scaled(run: Run) -> NDArray[np.float64]:
    """The scores of each ranking moved and stretched to 0 to 1; all 1 where they are equal."""
    present = run.rows >= 0
    scores = run.scores.astype(np.float64)
    low = np.where(present, scores, np.inf).min(axis=1, initial=np.inf, keepdims=True)
    high = np.where(present, scores, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = (scores - low) / (high - low)
    return np.where(high > low, scaled, 1.0)


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
    reranker: CrossEncoder,
    candidates: Run,
    queries: TokenIds,
    passages: TokenIds,
    show: str | None = None,
    wanted: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """The re-ranker's score of every candidate (or of those `wanted`), float32 of the candidates' shape, -inf where
    there is none."""
    present = candidates.rows >= 0
    if wanted is not None:
        present &= wanted
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


def final_scores(candidates: Run, scores: NDArray[np.float32], blend: float) -> NDArray[np.float32]:
    """`scores` plus `blend` times the candidates' own, float32 of their shape; -inf where there is none."""
    present = candidates.rows >= 0
    sums = np.where(present, scores, np.float32(-np.inf))
    sums[present] += np.float32(blend) * candidates.scores[present]
    return sums


def blended(candidates: Run, scores: NDArray[np.float32], blend: float) -> Run:
    """The candidates in the order of `scores` (their shape) plus `blend` times their own; ties keep their order.

    A candidate whose score is -inf was not read: it stands behind those that were, where the scores go on falling by
    1 from place to place.
    """
    sums = final_scores(candidates, scores, blend)
    order = np.argsort(-sums, axis=1, kind="stable")
    rows, sums = np.take_along_axis(candidates.rows, order, axis=1), np.take_along_axis(sums, order, axis=1)
    unread = (rows >= 0) & np.isneginf(sums)
    last = np.where(np.isfinite(sums), sums, np.inf).min(axis=1, initial=np.inf, keepdims=True)
    return Run(
        candidates.query_ids, rows, np.where(unread, last - np.cumsum(unread, axis=1), sums).astype(np.float32)
    )
