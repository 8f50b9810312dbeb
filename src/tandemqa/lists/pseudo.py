"""Pseudo-labels: a positive for a question that nobody labelled, where the re-ranker is sure of one."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run


def pseudo_labels(
    candidates: Run, confidence: NDArray[np.float64], high: float, query_ids: Collection[str], ids: Sequence[str]
) -> Qrels:
    """The candidate of highest confidence as the positive of each question in `query_ids`, if above `high`.

    confidence: float64 of the candidates' shape; ids: the passage id of every row. A question with no such candidate
    is left out (RocketQA, section 3.3).
    """
    wanted = set(query_ids)
    labels: Qrels = {}
    for number, query_id in enumerate(candidates.query_ids):
        if query_id not in wanted:
            continue
        sure = np.where(candidates.rows[number] >= 0, confidence[number], -np.inf)
        best = int(np.argmax(sure))
        if sure[best] > high:
            labels[query_id] = {ids[candidates.rows[number, best]]: 1}
    return labels
