"""Re-ranking that stops early: candidates are read from the top, a few at a time, until the rest hardly matters."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from tandemqa.search.learnt import Stopping

# Candidates of a question that are read between two looks at what is left.
STEP = 4

# Final scores of the candidates marked in a bool (Q, D), float (Q, D); elsewhere it may hold anything.
Read = Callable[[NDArray[np.bool_]], NDArray[np.floating]]


def read_until_settled(
    present: NDArray[np.bool_], similarity: NDArray[np.float32], read: Read, rule: Stopping, stopping: float, k: int
) -> NDArray[np.bool_]:
    """Which candidates were read, bool (Q, D): of each question those from the top, all at `stopping` 0.

    present: where there is a candidate; similarity: the retriever's scores, both (Q, D), in the first stage's order.
    Questions that go on are read together, STEP candidates each, until for none of them `expected_gain` of what is
    left reaches `stopping`.
    """
    scores = np.full(present.shape, -np.inf)
    done = np.zeros(present.shape, dtype=bool)
    for start in range(0, present.shape[1], STEP):
        left = present & ~done
        goes_on = np.asarray(left.any(axis=1))
        if start > 0 and stopping > 0:
            goes_on = goes_on & (expected_gain(scores, done, left, similarity, rule, k) >= stopping)
        if not goes_on.any():
            break
        batch = left & goes_on[:, None]
        batch[:, start + STEP :] = False
        scores[batch] = read(batch)[batch]
        done |= batch
    return done


def expected_gain(
    scores: NDArray[np.floating],
    done: NDArray[np.bool_],
    left: NDArray[np.bool_],
    similarity: NDArray[np.float32],
    rule: Stopping,
    k: int,
) -> NDArray[np.float64]:
    """By how much the unread candidates of each question would rise, if read: float64 (Q,).

    A candidate's rise is its reciprocal rank among those read, were it read, less that of the place behind them which
    it has unread; places beyond `k` count 0. The sum over the unread of its expectation, where a final score is
    normal around the rule's forecast from the retriever's score and rank. The forecast has a level of its own for
    each question, learnt from the candidates read so far and shrunk towards the usual level (a random intercept).
    """
    forecast = _slope(similarity, rule)
    count = done.sum(axis=1)
    residual = np.where(done, scores - forecast, 0.0).sum(axis=1) - count * rule.level
    within, between = rule.spread**2, rule.level_spread**2
    certain = between * count + within
    level = rule.level + np.divide(between * residual, certain, out=np.zeros(len(count)), where=certain > 0)
    # What is not known of the level blurs the forecast too.
    spread = np.sqrt(within + np.divide(between * within, certain, out=np.zeros(len(count)), where=certain > 0))
    places = min(k, scores.shape[1])
    best = -np.sort(-np.where(done, scores, -np.inf), axis=1)[:, :places]
    rank_now = count[:, None] + np.cumsum(left, axis=1)
    now = np.where(rank_now <= k, 1 / np.maximum(rank_now, 1), 0.0)
    gain = np.zeros(scores.shape)
    reached = np.zeros(scores.shape)
    for place in range(places):
        # A place that nothing read stands at is no rise.
        held = np.isfinite(best[:, place])[:, None]
        margin = forecast + level[:, None] - np.where(held, best[:, place, None], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            deviations = np.where(margin == 0, 0.0, margin / spread[:, None])
        beats = np.where(held, torch.special.ndtr(torch.from_numpy(deviations)).numpy(), reached)
        gain += (beats - reached) * np.maximum(1 / (place + 1) - now, 0.0)
        reached = beats
    total: NDArray[np.float64] = np.where(left, gain, 0.0).sum(axis=1)
    return total


def _slope(similarity: NDArray[np.floating], rule: Stopping) -> NDArray[np.float64]:
    """The forecast without its level, float64 of the shape of `similarity`; 0 where there is no candidate."""
    values = np.where(np.isfinite(similarity), similarity, 0.0).astype(np.float64)
    places = np.log(1.0 + np.arange(similarity.shape[1], dtype=np.float64))
    forecast: NDArray[np.float64] = rule.similarity * values + rule.place * places
    return forecast
