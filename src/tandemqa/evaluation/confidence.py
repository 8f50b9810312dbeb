"""When a question has no good answer: the confidence of the first hit, learnt on dev."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.lists.confidence import calibrate
from tandemqa.search.learnt import Confidence


def learn_confidence(ranking: Run, qrels: Qrels, passage_row: Mapping[str, int]) -> Confidence | None:
    """The probability that the first hit is relevant, from its final score: Platt's fit on judged questions.

    The threshold is the confidence that best tells, by F1, first hits that are relevant from those that are not, if
    every question is asked twice: of all its candidates, and of those without the relevant ones, which leaves it with
    no answer. None where a first hit is never, or always, relevant.
    """
    relevant = relevant_places(ranking, qrels, passage_row)
    asked = ranking.rows[:, 0] >= 0
    first, right = ranking.scores[asked, 0], relevant[asked, 0]
    if right.all() or not right.any():
        return None
    fit = calibrate(first[right], first[~right], balanced=False)
    unanswerable = np.where(relevant | (ranking.rows < 0), -np.inf, ranking.scores).max(axis=1)
    wrong = np.concatenate([first[~right], unanswerable[np.isfinite(unanswerable)]])
    threshold = _best_f1(fit.confidence(first[right]), fit.confidence(wrong))
    return Confidence(slope=fit.slope, offset=fit.offset, threshold=threshold)


def relevant_places(ranking: Run, qrels: Qrels, passage_row: Mapping[str, int]) -> NDArray[np.bool_]:
    """Where a ranking has a passage that is judged relevant, bool of its shape."""
    relevant = np.zeros(ranking.rows.shape, dtype=bool)
    for number, query_id in enumerate(ranking.query_ids):
        positives = [passage_row.get(passage, -2) for passage, grade in qrels[query_id].items() if grade > 0]
        relevant[number] = np.isin(ranking.rows[number], positives)
    return relevant


def _best_f1(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> float:
    """The threshold, one of the confidences, at which calling those from it up right has the highest F1."""
    thresholds = np.unique(np.concatenate([right, wrong]))
    found = len(right) - np.searchsorted(np.sort(right), thresholds)
    taken = found + len(wrong) - np.searchsorted(np.sort(wrong), thresholds)
    return float(thresholds[np.argmax(2 * found / (taken + len(right)))])
