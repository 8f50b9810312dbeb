"""The rule of early stopping, learnt on dev, and what each value of its dial does there."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.evaluation.metrics import mean_mrr
from tandemqa.lists.logistic import logistic_fit
from tandemqa.progress import track
from tandemqa.search.learnt import Stopping, StoppingPoint
from tandemqa.search.rank import blended, final_scores
from tandemqa.search.stopping import read_until_settled, standing

# Candidates of a question that are read between two looks at what is left.
STEP = 2
DIAL = (0.0, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
# Weight of the penalty on the squared slopes, of values of unit spread: keeps them finite where states separate.
RIDGE = 1.0


def learn_stopping(
    candidates: Run, scores: NDArray[np.float32], blend: float, qrels: Qrels, passage_row: Mapping[str, int]
) -> Stopping | None:
    """Fit the chance that reading on matters on judged questions, and measure the dial on the same.

    candidates: the retriever's, with its scores; scores: the re-ranker's of all of them, float32 of their shape. Each
    question is looked at after every STEP candidates: reading on matters if the best final score is still unread. A
    logistic regression on how the reading stands then gives its chance. None where it always or never matters.
    """
    present = candidates.rows >= 0
    final = final_scores(candidates, scores, blend)
    states, matters = [], []
    for count in range(STEP, present.shape[1], STEP):
        done = present & (np.arange(present.shape[1]) < count)
        left = present & ~done
        open_ones = left.any(axis=1)
        states.append(standing(final, done, left, candidates.scores)[open_ones])
        matters.append((final[:, count:].max(axis=1) > final[:, :count].max(axis=1))[open_ones])
    labels = np.concatenate(matters) if matters else np.empty(0, dtype=bool)
    if labels.all() or not labels.any():
        return None
    slopes, offset = logistic_fit(np.concatenate(states), labels, np.ones(len(labels)), RIDGE)
    best, own, lead, ahead, read = slopes.tolist()
    rule = Stopping(best=best, own=own, lead=lead, ahead=ahead, read=read, offset=offset, step=STEP, curve=[])
    points: list[StoppingPoint] = []
    for stopping in track(DIAL, "learn when to stop", len(DIAL), "value"):
        done = read_until_settled(present, candidates.scores, lambda _: final, rule, stopping)
        run = blended(candidates, np.where(done, scores, np.float32(-np.inf)), blend)
        mrr = mean_mrr(run, qrels, passage_row)
        whole = points[0].mrr if points else mrr
        change = (mrr - whole) / whole if whole > 0 else 0.0
        points.append(StoppingPoint(stopping=stopping, share=done.sum() / present.sum(), mrr=mrr, change=change))
    return rule.model_copy(update={"curve": points})
