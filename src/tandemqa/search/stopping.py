"""Re-ranking that stops early: candidates are read from the top, a few at a time, until the rest hardly matters."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tandemqa.search.learnt import Stopping

# Final scores of the candidates marked in a bool (Q, D), float (Q, D); elsewhere it may hold anything.
Read = Callable[[NDArray[np.bool_]], NDArray[np.floating]]


def read_until_settled(
    present: NDArray[np.bool_], promise: NDArray[np.floating], read: Read, rule: Stopping, stopping: float
) -> NDArray[np.bool_]:
    """Which candidates were read, bool (Q, D): of each question those from the top, all at `stopping` 0.

    present: where there is a candidate, in the first stage's order; promise: the retriever's similarity of each; both
    (Q, D). Questions that go on are read together, as many candidates each as the rule was learnt with. A question
    stops where the chance that the rest matters falls below `stopping`: a logistic function, learnt on dev (see
    `evaluation.stopping`), of how the reading stands (see `standing`). The rest matters if the
    first hit is in it: the hits behind the first are not looked at, and lose more.
    """
    scores = np.full(present.shape, -np.inf)
    done = np.zeros(present.shape, dtype=bool)
    goes_on = np.ones(len(present), dtype=bool)
    for start in range(0, present.shape[1], rule.step):
        left = present & ~done
        goes_on = goes_on & left.any(axis=1)
        if start > 0 and stopping > 0:
            goes_on = goes_on & (chance(standing(scores, done, left, promise), rule) >= stopping)
        if not goes_on.any():
            break
        batch = left & goes_on[:, None]
        batch[:, start + rule.step :] = False
        scores[batch] = read(batch)[batch]
        done |= batch
    return done


def standing(
    scores: NDArray[np.floating],
    done: NDArray[np.bool_],
    left: NDArray[np.bool_],
    promise: NDArray[np.floating],
) -> NDArray[np.float64]:
    """How the reading of each question stands, float64 (Q, 5).

    The best final score read, that candidate's promise, its lead over the second, the largest promise of what is
    left, and the logarithm of how many are read.
    """
    read = np.where(done, scores, -np.inf)
    best = -np.sort(-read, axis=1)[:, :2]
    own = np.take_along_axis(promise, read.argmax(axis=1)[:, None], axis=1)[:, 0]
    second = best[:, -1]
    lead = np.where(np.isfinite(second), best[:, 0] - second, 0.0)
    ahead = np.where(left, promise, -np.inf).max(axis=1, initial=-np.inf)
    values = np.stack([best[:, 0], own, lead, ahead, np.log(np.maximum(1, done.sum(axis=1)))], axis=1)
    return np.where(np.isfinite(values), values, 0.0)


def chance(values: NDArray[np.float64], rule: Stopping) -> NDArray[np.float64]:
    """The chance that reading on matters, float64 (Q,), from the standing (Q, 5)."""
    logits = values @ np.array([rule.best, rule.own, rule.lead, rule.ahead, rule.read]) + rule.offset
    result: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
    return result
