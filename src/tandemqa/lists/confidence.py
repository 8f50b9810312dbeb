"""Confidence: a re-ranker's score as the probability that a passage answers its question."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_STEPS = 100


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

    Raises ValueError if a class is empty. Sources: Platt (1999), "Probabilistic outputs for support vector machines";
    Lin, Lin and Weng (2007) for its Newton iteration.
    """
    if not len(positives) or not len(others):
        raise ValueError("calibration needs scores of labelled positives and of other candidates")
    scores = np.concatenate([positives, others]).astype(np.float64)
    centre, spread = scores.mean(), scores.std() or 1.0
    x = (scores - centre) / spread
    target = np.where(np.arange(len(x)) < len(positives), 1 - 1 / (len(positives) + 2), 1 / (len(others) + 2))
    weight = np.full(len(x), 1 / len(x))
    if balanced:
        weight = np.where(np.arange(len(x)) < len(positives), 0.5 / len(positives), 0.5 / len(others))
    features = np.stack([x, np.ones_like(x)], axis=1)
    solution = np.zeros(2)
    loss = _loss(features @ solution, target, weight)
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-(features @ solution)))
        gradient = features.T @ (weight * (p - target))
        hessian = (features * (weight * p * (1 - p))[:, None]).T @ features + 1e-12 * np.eye(2)
        direction = np.linalg.solve(hessian, gradient)
        share = 1.0
        while (new := _loss(features @ (solution - share * direction), target, weight)) > loss and share > 1e-10:
            share /= 2
        solution = solution - share * direction
        if loss - new < 1e-14:
            break
        loss = new
    slope = float(solution[0] / spread)
    if slope > 0:
        return Calibration(slope, float(solution[1] - slope * centre))
    return Calibration(0.0, 0.0 if balanced else float(np.log(len(positives) / len(others))))


def _loss(logits: NDArray[np.float64], target: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """Weighted cross-entropy of targets with logits."""
    return float(np.sum(weight * (np.logaddexp(0, logits) - target * logits)))
