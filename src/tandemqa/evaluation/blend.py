"""Weights learnt on dev: of the retriever's score beside the re-ranker's, and beside BM25's."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.evaluation.metrics import mean_mrr
from tandemqa.progress import track
from tandemqa.search.rank import blended, fusions

# The retriever's share, in units in which both models' scores spread alike over a question's candidates.
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)

# The retriever's share in a hybrid's weighted sum.
FUSIONS = (None, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.4, 0.3, 0.2, 0.1)


def learn_fusion(dense: Run, words: Run, qrels: Qrels, passage_row: Mapping[str, int]) -> float | None:
    """The retriever's share in the sum of both scores that ranks a hybrid best, by MRR@10 on judged questions.

    None, which is fusion by rank, where no share does better. Both runs rank the same queries.
    """
    fused = track(fusions(dense, words, dense.rows.shape[1], FUSIONS), "learn to fuse", len(FUSIONS), "share")
    figures = [mean_mrr(run, qrels, passage_row) for run in fused]
    return FUSIONS[int(np.argmax(figures))]


def learn_blend(candidates: Run, scores: NDArray[np.float32], qrels: Qrels, passage_row: Mapping[str, int]) -> float:
    """The weight of the retriever's score that ranks the candidates best, by MRR@10 on judged questions.

    scores: the re-ranker's, float32 of the candidates' shape. Of weights that rank equally well the smallest is
    taken. One number chosen from a dozen hardly fits the questions it was chosen on, but choose it on dev.
    """
    spread = _spread(candidates, candidates.scores)
    if spread == 0:
        return 0.0
    weights = [share * _spread(candidates, scores) / spread for share in SHARES]
    figures = [mean_mrr(blended(candidates, scores, weight), qrels, passage_row) for weight in weights]
    return float(weights[int(np.argmax(figures))])


def _spread(candidates: Run, scores: NDArray[np.float32]) -> float:
    """The standard deviation of the scores around the mean of their question."""
    values = np.where(candidates.rows >= 0, scores, np.nan).astype(np.float64)
    return float(np.nanmean(np.nanstd(values, axis=1)))
