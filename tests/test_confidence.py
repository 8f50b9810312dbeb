"""How sure the first hit is: a fit that others find too, and a threshold that tells answers from none."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import f1_score

from tandemqa.data.runs import Run
from tandemqa.evaluation.confidence import learn_confidence
from tandemqa.lists.confidence import calibrate


def dev(count: int = 400, seed: int = 0) -> tuple[Run, dict[str, dict[str, int]], dict[str, int]]:
    """Rankings of four passages, of which the second is often the relevant one; relevant ones score higher."""
    random = np.random.default_rng(seed)
    rows = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
    right = np.where(random.random(count) < 0.6, 0, random.integers(1, 5, size=count))
    scores = -np.sort(-random.normal(size=(count, 4)), axis=1) + 1.5 * (right == 0)[:, None] * [1, 0, 0, 0]
    names = [f"q{number}" for number in range(count)]
    qrels = {
        name: {f"p{rows[number, right[number]]}" if right[number] < 4 else "elsewhere": 1}
        for number, name in enumerate(names)
    }
    return Run(names, rows, scores.astype(np.float32)), qrels, {f"p{row}": row for row in range(count * 4)}


def first_hits(run: Run, qrels: dict[str, dict[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    relevant = [f"p{row}" in qrels[query] for query, row in zip(run.query_ids, run.rows[:, 0], strict=True)]
    return run.scores[:, 0].astype(np.float64), np.array(relevant)


def test_the_confidence_is_platts_fit_found_by_another_optimiser() -> None:
    run, qrels, row = dev()
    scores, relevant = first_hits(run, qrels)
    up, down = relevant.sum(), (~relevant).sum()
    target = np.where(relevant, (up + 1) / (up + 2), 1 / (down + 2))

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] * scores + parameters[1]
        return float(np.sum(np.logaddexp(0, logits) - target * logits))

    best = minimize(
        loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 5000}
    )
    learnt = learn_confidence(run, qrels, row)
    assert learnt is not None and (learnt.slope, learnt.offset) == pytest.approx(best.x, abs=1e-5)


def test_the_confidence_is_the_frequency_on_other_questions() -> None:
    run, qrels, row = dev(4000)
    learnt = learn_confidence(run, qrels, row)
    assert learnt is not None
    run, qrels, row = dev(4000, seed=1)
    scores, relevant = first_hits(run, qrels)
    confidence = 1 / (1 + np.exp(-(learnt.slope * scores + learnt.offset)))
    assert confidence.mean() == pytest.approx(relevant.mean(), abs=0.03)
    for low, high in ((0.2, 0.5), (0.5, 0.7), (0.7, 1.0)):
        inside = (confidence >= low) & (confidence < high)
        assert inside.sum() > 100
        assert confidence[inside].mean() == pytest.approx(relevant[inside].mean(), abs=0.07)


def test_the_threshold_has_the_best_f1_with_each_question_asked_without_its_answer_too() -> None:
    run, qrels, row = dev(60)
    learnt = learn_confidence(run, qrels, row)
    assert learnt is not None
    scores, relevant = first_hits(run, qrels)
    without = [
        max(score for score, place in zip(*ranking, strict=True) if f"p{place}" not in qrels[query])
        for query, *ranking in zip(run.query_ids, run.scores.tolist(), run.rows.tolist(), strict=True)
    ]
    # A question whose relevant passage is not first keeps its first hit: it is then one more question without answer.
    asked = np.concatenate([scores, without])
    truth = np.concatenate([relevant, np.zeros(len(without), dtype=bool)])
    confidence = 1 / (1 + np.exp(-(learnt.slope * asked + learnt.offset)))
    figures = [f1_score(truth, confidence >= threshold) for threshold in np.unique(confidence)]
    assert f1_score(truth, confidence >= learnt.threshold - 1e-12) == pytest.approx(max(figures))


def test_where_all_first_hits_are_alike_nothing_is_learnt() -> None:
    run, qrels, row = dev(20)
    assert learn_confidence(run, {query: {"elsewhere": 1} for query in qrels}, row) is None
    every = {query: {f"p{first}": 1} for query, first in zip(run.query_ids, run.rows[:, 0], strict=True)}
    assert learn_confidence(run, every, row) is None


def test_scores_that_tell_nothing_give_the_share_of_relevant_ones() -> None:
    fit = calibrate(np.array([0.0, 1.0]), np.array([2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), balanced=False)
    assert fit.slope == 0 and fit.confidence(np.array([5.0]))[0] == pytest.approx(0.25)
