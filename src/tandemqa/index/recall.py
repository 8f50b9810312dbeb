"""How much of what exact search finds an index finds, measured on sampled queries; and the breadth that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from tandemqa.index.dense import DenseIndex

# As many as search re-ranks if it is not told otherwise.
DEPTH = 50
QUERIES = 200
# An approximate index looks further until it finds this share of the best, or until looking twice as far finds hardly
# more: what is then missing is the rounding of the vectors, and would be missing from exact search too.
TARGET, HARDLY = 0.95, 0.005
NARROWEST = {"ivf": 4, "hnsw": 64}

Vectors = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Recall:
    """Recall@k against exact search over the vectors that the index was built from.

    queries: how many were asked; of: "questions" of the dataset, or "passages", whose own vector is asked for the
    k nearest others.
    """

    value: float
    k: int
    queries: int
    of: str

    def as_json(self) -> dict[str, Any]:
        return {f"recall@{self.k}": round(self.value, 4), "queries": self.queries, "sampled from": self.of}


def tune(
    index: DenseIndex, blocks: Sequence[Vectors], questions: npt.NDArray[np.float32] | None, k: int = DEPTH
) -> Recall:
    """Measure the recall of `index`; an approximate one is set to the breadth that reaches the target.

    blocks: the vectors the index was built from, in arrays of shape (n, d). questions: those to ask, float32 (Q, d);
    None draws passages. k is cut at the number of passages.
    """
    sample = _Sample.draw(blocks, questions, k)
    if index.kind != "exact":
        index.breadth = min(NARROWEST[index.kind], index.widest)
    value = sample.recall(index)
    while value < TARGET and index.breadth < index.widest:
        narrower, index.breadth = index.breadth, min(2 * index.breadth, index.widest)
        wider = sample.recall(index)
        if wider < value + HARDLY:
            index.breadth = narrower
            break
        value = wider
    return Recall(value, sample.k, len(sample.queries), "passages" if questions is None else "questions")


class _Sample:
    """Queries, float32 (Q, d), the rows of those that are passages (else -1), and the score of the k-th best."""

    def __init__(
        self, blocks: Sequence[Vectors], queries: npt.NDArray[np.float32], own: npt.NDArray[np.int64], k: int
    ) -> None:
        self.blocks, self.queries, self.own = blocks, queries, own
        self.starts = np.cumsum([0, *map(len, blocks)])
        self.k = min(k, int(self.starts[-1]) - int((own >= 0).any()))
        self.least = self._least()

    @classmethod
    def draw(cls, blocks: Sequence[Vectors], questions: npt.NDArray[np.float32] | None, k: int) -> "_Sample":
        if questions is not None:
            return cls(blocks, np.ascontiguousarray(questions), np.full(len(questions), -1, dtype=np.int64), k)
        total = sum(map(len, blocks))
        rows = np.sort(np.random.default_rng(0).choice(total, size=min(QUERIES, total), replace=False))
        starts = np.cumsum([0, *map(len, blocks)])
        return cls(blocks, _gather(blocks, starts, rows), rows, k)

    def recall(self, index: DenseIndex) -> float:
        """The mean share of the k best that `index` finds; one as good as the k-th best counts as one of them."""
        if not self.k:
            return 1.0
        rows, _ = index.search(self.queries, self.k + 1)
        shares = []
        for query, own, least, found in zip(self.queries, self.own, self.least, rows.astype(np.int64), strict=True):
            others = found[(found >= 0) & (found != own)][: self.k]
            scores = _gather(self.blocks, self.starts, others) @ query
            shares.append((scores >= least - 1e-5 * max(1.0, abs(least))).sum() / self.k)
        return float(np.mean(shares))

    def _least(self) -> npt.NDArray[np.float32]:
        best = np.full((len(self.queries), self.k + 1), -np.inf, dtype=np.float32)
        rows = np.full(best.shape, -1, dtype=np.int64)
        for block, start in zip(self.blocks, self.starts, strict=False):
            k = min(self.k + 1, len(block))
            vectors = np.ascontiguousarray(block, dtype=np.float32)
            scores, places = faiss.knn(self.queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
            scores, places = np.hstack([best, scores]), np.hstack([rows, places + start])
            order = np.argsort(-scores, axis=1, kind="stable")[:, : self.k + 1]
            best, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(places, order, axis=1)
        best[rows == self.own[:, None]] = -np.inf
        ordered: npt.NDArray[np.float32] = -np.sort(-best, axis=1)
        return ordered[:, max(self.k - 1, 0)]


def _gather(
    blocks: Sequence[Vectors], starts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """The vectors at `rows`, float32 (n, d)."""
    found = np.empty((len(rows), blocks[0].shape[1]), dtype=np.float32)
    numbers = np.searchsorted(starts, rows, side="right") - 1
    for number in np.unique(numbers).tolist():
        here = numbers == number
        found[here] = blocks[number][rows[here] - starts[number]]
    return found
