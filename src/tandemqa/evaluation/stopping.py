"""The rule of early stopping, learnt on dev, and what each value of its dial does there."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.evaluation.metrics import evaluate_run
from tandemqa.search.learnt import Stopping, StoppingPoint
from tandemqa.search.rank import blended
from tandemqa.search.stopping import read_until_settled

DIAL = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
# MRR@10 looks no further.
PLACES = 10


def learn_stopping(
    candidates: Run, scores: NDArray[np.float32], blend: float, qrels: Qrels, passage_row: Mapping[str, int]
) -> Stopping | None:
    """Fit the forecast of final scores on judged questions, and measure the dial on the same.

    candidates: the retriever's, with its scores; scores: the re-ranker's of all of them, float32 of their shape. The
    slopes are least squares within questions, the level and its spread those of the questions' means (a random
    intercept by the method of moments). None for fewer than two questions or four candidates each.
    """
    present = candidates.rows >= 0
    if present.shape[0] < 2 or present.sum(axis=1).min() < 4:
        return None
    similarity = np.where(present, candidates.scores, 0.0).astype(np.float64)
    final = np.where(present, scores, 0.0) + blend * similarity
    place = np.broadcast_to(np.log(1.0 + np.arange(present.shape[1])), present.shape)
    within = [_centred(values, present)[present] for values in (similarity, place, final)]
    slopes, *_ = np.linalg.lstsq(np.stack(within[:2], axis=1), within[2], rcond=None)
    residual = final - slopes[0] * similarity - slopes[1] * place
    noise = _centred(residual, present)[present]
    count = present.sum(axis=1)
    variance = float((noise**2).sum() / max(1, len(noise) - len(count) - 2))
    levels = _mean(residual, present)[:, 0]
    between = max(0.0, float(levels.var(ddof=1) - variance * np.mean(1 / count)))
    rule = Stopping(
        similarity=float(slopes[0]),
        place=float(slopes[1]),
        level=float(levels.mean()),
        level_spread=between**0.5,
        spread=variance**0.5,
        curve=[],
    )
    return rule.model_copy(update={"curve": _curve(rule, candidates, scores, blend, qrels, passage_row)})


def _curve(
    rule: Stopping,
    candidates: Run,
    scores: NDArray[np.float32],
    blend: float,
    qrels: Qrels,
    passage_row: Mapping[str, int],
) -> list[StoppingPoint]:
    """What each value of the dial reads, and how good the ranking is then."""
    present = candidates.rows >= 0
    final = np.where(present, scores + np.float32(blend) * candidates.scores, -np.inf)
    points: list[StoppingPoint] = []
    for stopping in DIAL:
        done = read_until_settled(present, candidates.scores, lambda _: final, rule, stopping, PLACES)
        run = blended(candidates, np.where(done, scores, np.float32(-np.inf)), blend)
        mrr = float(evaluate_run(run, qrels, passage_row, ["mrr@10"])["mrr@10"].mean())
        whole = points[0].mrr if points else mrr
        change = (mrr - whole) / whole if whole > 0 else 0.0
        points.append(StoppingPoint(stopping=stopping, share=done.sum() / present.sum(), mrr=mrr, change=change))
    return points


def _mean(values: NDArray[np.float64], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean of each row over what is present, (Q, 1)."""
    sums = np.where(present, values, 0.0).sum(axis=1, keepdims=True)
    means: NDArray[np.float64] = sums / present.sum(axis=1, keepdims=True)
    return means


def _centred(values: NDArray[np.float64], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    return values - _mean(values, present)
