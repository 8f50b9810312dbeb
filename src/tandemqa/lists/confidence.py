"""Confidence: a re-ranker's score as the probability that a passage answers its question."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandemqa.lists.logistic import logistic_fit


class Calibration(NamedTuple):
    """confidence = 1 / (1 + exp(-(slope · score + offset)))"""

    slope: float
    offset: float

    def confidence(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probabilities, float64 of the shape of `scores`; 0 where a score is -inf."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = 1 / (1 + np.exp(-(self.slope * scores.astype(np.float64) + self.offset)))
        return np.where(np.isneginf(scores), 0.0, values)


def calibrate(positives: NDArray[np.floating], others: NDArray[np.floating], balanced: bool = True) -> Calibration:
    """Platt's logistic fit of labelled positives against other candidates, from their scores.

    If balanced, both classes weigh the same: a confidence of 0.5 means that a score is as usual for a positive as for
    another candidate, whatever their number, which is what thresholds such as 0.1 and 0.9 are about. If not, every
    score weighs the same, and confidences are frequencies where both classes are as frequent as here. Targets are
    Platt's smoothed ones, so that classes a score separates wholly still give a finite slope. A slope is never
    negative: if positives do not score higher, every confidence is 0.5 (not balanced: the share of positives).

    Raises ValueError if a class is empty. Source: Platt (1999), "Probabilistic outputs for support vector machines".
    """
    if not len(positives) or not len(others):
        raise ValueError("calibration needs scores of labelled positives and of other candidates")
    scores = np.concatenate([positives, others]).astype(np.float64)
    positive = np.arange(len(scores)) < len(positives)
    targets = np.where(positive, 1 - 1 / (len(positives) + 2), 1 / (len(others) + 2))
    weights = np.full(len(scores), 1 / len(scores))
    if balanced:
        weights = np.where(positive, 0.5 / len(positives), 0.5 / len(others))
    slopes, offset = logistic_fit(scores[:, None], targets, weights, ridge=0.0)
    if slopes[0] > 0:
        return Calibration(float(slopes[0]), offset)
    return Calibration(0.0, 0.0 if balanced else float(np.log(len(positives) / len(others))))
