"""The first stage over an index: by the retriever, by BM25, or by both.

The only place of search that asks an index for passages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.runs import Run
from tandemqa.errors import TandemError
from tandemqa.index.index import Index
from tandemqa.search.rank import FUSED, fuse

Mode = Literal["dense", "bm25", "hybrid"]


@dataclass(frozen=True)
class Candidates:
    """What the first stage found for Q questions, k at most for each.

    run: rows and the scores that they were ranked by, best first.
    similarity: the retriever's score of each, float32 of the run's shape, -inf where there is none.
    words: BM25's, -inf where BM25 did not find it; None in the mode "dense".
    """

    run: Run
    similarity: NDArray[np.float32]
    words: NDArray[np.float32] | None


def find(
    index: Index,
    questions: Sequence[str],
    vectors: NDArray[np.float32],
    k: int,
    mode: Mode,
    share: float | None = None,
    where: Sequence[str] = (),
) -> Candidates:
    """The `k` best candidates for each question; vectors: the retriever's of the questions, float32 (Q, d).

    share: the retriever's part in a hybrid's weighted sum; None fuses by rank. A hybrid is made of FUSED candidates
    of each of the two, or of `k` if that is more. Whatever ranked a candidate, it comes with its similarity, so that
    a final score means the same in every mode. Only passages that fulfil all conditions in `where`, such as
    "year>=2001", are found.
    """
    if mode not in get_args(Mode):
        raise TandemError(f"There is no mode {mode!r}; choose one of {', '.join(get_args(Mode))}.")
    k = min(k, len(index))
    names = list(questions)
    if mode == "dense":
        run = Run(names, *index.search_vectors(vectors, k, where))
        return Candidates(run, run.scores, None)
    deep = k if mode == "bm25" else min(max(k, FUSED), len(index))
    words = Run(names, *index.search_words(questions, deep, where))
    run = words
    if mode == "hybrid":
        run = fuse(Run(names, *index.search_vectors(vectors, deep, where)), words, k, share)
    return Candidates(run, _similarity(index, vectors, run.rows), _looked_up(words, run.rows))


def _similarity(index: Index, vectors: NDArray[np.float32], rows: NDArray[np.int32]) -> NDArray[np.float32]:
    """The inner product of each query's vector (Q, d) with those of its passages, float32 of the shape of `rows`."""
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for number, vector in enumerate(vectors):
        present = rows[number] >= 0
        scores[number, present] = index.vectors_of(rows[number, present]) @ vector
    return scores


def _looked_up(run: Run, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    """The scores that `run` gives to `rows`, -inf to those that it does not rank."""
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for number, wanted in enumerate(rows.tolist()):
        known = dict(zip(run.rows[number].tolist(), run.scores[number].tolist(), strict=True))
        scores[number] = [known.get(row, -np.inf) for row in wanted]
    return scores
