"""Lists with the help of the re-ranker's scores: denoised ones, and those of questions that nobody labelled."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.errors import TandemError
from tandemqa.lists.build import Denoising, Drawn, ListsConfig, build_lists
from tandemqa.lists.confidence import Calibration, calibrate
from tandemqa.lists.pseudo import pseudo_labels


class Scores(NamedTuple):
    """The re-ranker's scores: of the candidates, float32 of their shape; of all labelled positives, float32 (P,)."""

    candidates: npt.NDArray[np.float32]
    positives: npt.NDArray[np.float32]


def denoised_lists(
    candidates: Run,
    scores: Scores,
    qrels: Qrels,
    unlabelled: Sequence[str],
    passage_ids: Sequence[str],
    passage_row: dict[str, int],
    same_text: npt.NDArray[np.int64],
    config: ListsConfig,
    seed: int,
) -> tuple[Drawn, dict[str, Any]]:
    """Undenoised and denoised lists in the share that `config` asks for, all denoised for pseudo-labelled questions.

    Also returns how scores became confidences (`slope`,
    `offset`), the thresholds as confidences (`low`, `high`), and how many unlabelled questions got a label.
    """
    calibration = fit_calibration(candidates, scores, qrels, passage_row)
    confidence = calibration.confidence(scores.candidates)
    low, high = config.low, config.high
    if config.thresholds == "quantile":
        low, high = np.quantile(confidence[candidates.rows >= 0], [low, high]).tolist()
    labels = pseudo_labels(candidates, confidence, high, unlabelled, passage_ids)
    denoising = Denoising(confidence, low, high, config.denoised_share, frozenset(labels))
    drawn = build_lists(candidates, qrels | labels, passage_row, same_text, config, seed, denoising)
    about = {"slope": calibration.slope, "offset": calibration.offset, "low": low, "high": high}
    return drawn, about | {"unlabelled": len(unlabelled), "pseudo_labelled": len(labels)}


def fit_calibration(candidates: Run, scores: Scores, qrels: Qrels, passage_row: dict[str, int]) -> Calibration:
    """Fitted on labelled questions: their labelled positives, retrieved or not, against their other candidates."""
    others = []
    for number, query_id in enumerate(candidates.query_ids):
        if query_id not in qrels:
            continue
        rows = candidates.rows[number]
        labelled = np.isin(rows, [passage_row[p] for p, grade in qrels[query_id].items() if grade > 0])
        others.append(scores.candidates[number, (rows >= 0) & ~labelled])
    try:
        return calibrate(scores.positives, np.concatenate(others))
    except ValueError as error:
        raise TandemError(
            "The re-ranker's confidence cannot be calibrated: no question has a candidate that is not a labelled "
            "positive; raise lists.depth, or set lists.denoised_share and data.unlabelled to 0."
        ) from error
