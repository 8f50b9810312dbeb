"""Ranking metrics of a whole run at once, equal to trec_eval's, and how sure their mean is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.errors import TandemError

_NAME = re.compile(r"(mrr|recall|r|ndcg)@([1-9][0-9]*)|(map)")
_RESAMPLES = 10_000


class _Judged(NamedTuple):
    """A run against the J positives of N queries.

    gains: float64 (N, k), grade of the passage at each rank, 0 for one that is no positive;
    positives: int64 (N,), how many a query has;
    query, grade, rank: int64 (J,), a positive's query (0 to N-1), grade, and rank from 1 in the best ranking.
    """

    gains: NDArray[np.float64]
    positives: NDArray[np.int64]
    query: NDArray[np.int64]
    grade: NDArray[np.int64]
    rank: NDArray[np.int64]


def counted_queries(qrels: Qrels) -> list[str]:
    """The queries that metrics count, in the order of `qrels`: those with at least one positive."""
    return [query for query, grades in qrels.items() if max(grades.values(), default=0) > 0]


def parse_metric(name: str) -> tuple[str, int]:
    """The kind of a metric and the depth it counts to, 0 for a whole ranking; an unknown name is a `TandemError`."""
    match = _NAME.fullmatch(name)
    if not match:
        valid = "write mrr@k, recall@k, r@k or ndcg@k with a depth k from 1, such as mrr@10, or map"
        raise TandemError(f"There is no metric {name!r}; {valid}.")
    kind, cut, whole = match.groups()
    return (whole, 0) if whole else (kind, int(cut))


def evaluate_run(
    run: Run, qrels: Qrels, passage_row: Mapping[str, int], metrics: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Each metric for each query: metric name -> float64 (N,), in the order of `counted_queries(qrels)`.

    Names are `mrr@k`, `recall@k` (or `r@k`, the same), `ndcg@k` (linear gain) and `map`. The order of the run
    is taken as it stands (see `break_ties`). A query that the run does not rank scores 0; one that is ranked
    but has no positive is passed over.

    Raises `TandemError` for an unknown name, and when no query has a positive.
    """
    cuts = {name: parse_metric(name) for name in metrics}
    queries = counted_queries(qrels)
    if not queries:
        raise TandemError("The judgements hold no positive, which is a score above 0; add one to measure a run.")
    judged = _judge(run, qrels, passage_row, queries)
    values = {}
    for name, (kind, cut) in cuts.items():
        if kind == "mrr":
            values[name] = _reciprocal_rank(judged, cut)
        elif kind == "ndcg":
            values[name] = _ndcg(judged, cut)
        elif kind == "map":
            values[name] = _average_precision(judged)
        else:
            values[name] = _recall(judged, cut)
    return values


def mean_mrr(run: Run, qrels: Qrels, passage_row: Mapping[str, int]) -> float:
    """MRR@10 of a run over `counted_queries(qrels)`: the one figure by which settings are chosen."""
    return float(evaluate_run(run, qrels, passage_row, ["mrr@10"])["mrr@10"].mean())


def bootstrap_interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N,), from 10 000 resamples of the queries."""
    random = np.random.default_rng(seed)
    means = np.empty(_RESAMPLES)
    step = max(1, 1_000_000 // len(values))
    for start in range(0, _RESAMPLES, step):
        chunk = means[start : start + step]
        chunk[:] = values[random.integers(len(values), size=(len(chunk), len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _judge(run: Run, qrels: Qrels, passage_row: Mapping[str, int], queries: list[str]) -> _Judged:
    number = {query: place for place, query in enumerate(queries)}
    query, row, grade = np.array(
        [
            (number[query], passage_row.get(passage, -1), grade)
            for query in queries
            for passage, grade in qrels[query].items()
            if grade > 0
        ],
        dtype=np.int64,
    ).T
    best_first = np.lexsort((-grade, query))
    query, row, grade = query[best_first], row[best_first], grade[best_first]
    positives = np.bincount(query)
    rank = np.arange(len(query)) - (np.cumsum(positives) - positives)[query] + 1

    # One sorted table of (query, row) keys lets a single binary search look up the whole run. Rows count
    # from 1 in it, so that a positive outside the corpus (row -1) keeps a key of its own query.
    base = int(max(row.max(), run.rows.max(initial=-1))) + 2
    keys = query * base + row + 1
    by_key = np.argsort(keys)
    keys = keys[by_key]
    ranked = [place for place, query_id in enumerate(run.query_ids) if query_id in number]
    to = np.array([number[run.query_ids[place]] for place in ranked], dtype=np.int64)
    rows = run.rows[ranked].astype(np.int64)
    wanted = to[:, None] * base + rows + 1
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    gains = np.zeros((len(queries), run.rows.shape[1]))
    gains[to] = np.where((keys[found] == wanted) & (rows >= 0), grade[by_key][found], 0)
    return _Judged(gains, positives, query, grade, rank)


def _reciprocal_rank(judged: _Judged, cut: int) -> NDArray[np.float64]:
    relevant = judged.gains[:, :cut] > 0
    values: NDArray[np.float64] = np.max(relevant / _ranks(relevant), axis=1, initial=0.0)
    return values


def _recall(judged: _Judged, cut: int) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.count_nonzero(judged.gains[:, :cut], axis=1) / judged.positives
    return values


def _ndcg(judged: _Judged, cut: int) -> NDArray[np.float64]:
    gains = judged.gains[:, :cut]
    reached = gains @ (1 / np.log2(_ranks(gains) + 1))
    best = np.where(judged.rank <= cut, judged.grade / np.log2(judged.rank + 1), 0.0)
    values: NDArray[np.float64] = reached / np.bincount(judged.query, weights=best)
    return values


def _average_precision(judged: _Judged) -> NDArray[np.float64]:
    relevant = judged.gains > 0
    precision = np.cumsum(relevant, axis=1) / _ranks(relevant)
    values: NDArray[np.float64] = np.sum(relevant * precision, axis=1) / judged.positives
    return values


def _ranks(ranking: NDArray[Any]) -> NDArray[np.int64]:
    return np.arange(1, ranking.shape[1] + 1)
