"""Confidence and its thresholds: what becomes a negative, a further positive, or neither."""

import numpy as np
import pytest
from scipy.optimize import minimize

from tandemqa.data.runs import Run
from tandemqa.errors import TandemError
from tandemqa.lists.build import NO_PASSAGE, Denoising, DrawConfig, ListsConfig, Verdict, build_lists
from tandemqa.lists.confidence import Calibration, calibrate
from tandemqa.lists.denoise import Scores, denoised_lists, fit_calibration
from tandemqa.lists.pseudo import pseudo_labels

NAMES = [f"p{row}" for row in range(60)]
ROW = {name: row for row, name in enumerate(NAMES)}
TEXTS = np.arange(60, dtype=np.int64)


def run_of(*rankings):
    width = max(map(len, rankings))
    rows = np.array([[*r, *[-1] * (width - len(r))] for r in rankings], dtype=np.int32)
    scores = np.where(rows >= 0, -np.arange(width, dtype=np.float32), -np.inf).astype(np.float32)
    return Run([f"q{number}" for number in range(len(rankings))], rows, scores)


@pytest.mark.parametrize("scale", [1.0, 50.0, 0.01])
@pytest.mark.parametrize("sizes", [(30, 30), (5, 900), (400, 20)], ids=str)
def test_calibration_minimises_platts_weighted_loss(scale, sizes):
    generator = np.random.default_rng(1)
    positives = scale * generator.normal(1.0, 1.0, sizes[0]) + 3
    others = scale * generator.normal(-0.5, 1.5, sizes[1]) + 3
    scores = np.concatenate([positives, others])
    targets = np.r_[np.full(sizes[0], (sizes[0] + 1) / (sizes[0] + 2)), np.full(sizes[1], 1 / (sizes[1] + 2))]
    weights = np.r_[np.full(sizes[0], 0.5 / sizes[0]), np.full(sizes[1], 0.5 / sizes[1])]

    def loss(solution):
        logits = solution[0] * (scores - 3) / scale + solution[1]
        return float(np.sum(weights * (np.logaddexp(0, logits) - targets * logits)))

    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000})
    fitted = calibrate(positives, others)
    grid = np.linspace(scores.min(), scores.max(), 7)
    expected = 1 / (1 + np.exp(-(best.x[0] * (grid - 3) / scale + best.x[1])))
    np.testing.assert_allclose(fitted.confidence(grid), expected, atol=1e-4)


def test_classes_that_a_score_separates_give_a_finite_slope():
    fitted = calibrate(np.array([5.0, 6.0]), np.array([-5.0, -6.0, -7.0]))
    assert np.isfinite(fitted.slope) and fitted.confidence(np.array([5.5]))[0] > 0.7
    assert fitted.confidence(np.array([-6.0]))[0] < 0.3


def test_a_score_that_misleads_makes_no_one_confident():
    fitted = calibrate(np.array([-1.0, -2.0, 0.0]), np.array([1.0, 2.0, 0.5]))
    assert fitted.confidence(np.array([-9.0, 0.0, 9.0])).tolist() == [0.5, 0.5, 0.5]


def test_confidence_of_no_candidate_is_zero():
    assert Calibration(1.0, 0.0).confidence(np.array([-np.inf, 0.0, -1e9])).tolist() == [0.0, 0.5, 0.0]


CANDIDATES = run_of([10, 11, 12, 13, 14, 15], [20, 21, 22, -1])
QRELS = {"q0": {"p11": 1, "p40": 1}, "q1": {"p20": 2}}
CONFIDENCE = np.array([[0.95, 0.99, 0.05, 0.5, 0.01, 0.09], [0.9, 0.02, 0.5, 0.0, 0.0, 0.0]])


def test_each_candidate_gets_the_verdict_of_its_confidence():
    denoising = Denoising(CONFIDENCE, 0.1, 0.9, share=1.0)
    drawn = build_lists(CANDIDATES, QRELS, ROW, TEXTS, DrawConfig(size=4, depth=6), 1, denoising)
    names = [[Verdict(v).name for v in row] for row in drawn.verdicts.tolist()]
    assert names == [
        ["POSITIVE", "LABELLED", "NEGATIVE", "DROPPED", "NEGATIVE", "NEGATIVE"],
        ["LABELLED", "NEGATIVE", "DROPPED", "NONE", "NONE", "NONE"],
    ]
    lists = {(int(q), *p) for q, p in zip(drawn.lists.query_rows, drawn.lists.passages.tolist(), strict=True)}
    heads = sorted((q, head) for q, head, *_ in lists)
    assert heads == [(0, 10), (0, 11), (0, 40), (1, 20)], "both labelled positives and the further one"
    for q, _, *negatives in lists:
        if q == 0:
            assert set(negatives) == {12, 14, 15}
        else:
            assert negatives[0] == 21 and len(set(negatives)) == 3, "filled up with passages that are no candidates"
            assert not set(negatives[1:]) & {20, 21, 22}
    assert drawn.counts["denoised lists"] == 4 and drawn.counts["undenoised lists"] == 0
    assert drawn.counts["further positives"] == 1 and drawn.counts["dropped candidates"] == 2
    assert drawn.counts["negatives from outside the candidates"] == 2


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_share_of_denoised_lists_is_the_one_asked_for(share):
    count = 2000
    candidates = Run(
        [f"q{i}" for i in range(count)],
        np.tile(np.arange(10, 20, dtype=np.int32), (count, 1)),
        np.tile(-np.arange(10, dtype=np.float32), (count, 1)),
    )
    qrels = {f"q{i}": {"p10": 1} for i in range(count)}
    confidence = np.tile(np.r_[0.5, np.zeros(5), np.full(4, 0.5)], (count, 1))
    drawn = build_lists(
        candidates, qrels, ROW, TEXTS, DrawConfig(size=3, depth=10), 1, Denoising(confidence, 0.1, 0.9, share)
    )
    assert len(drawn.lists) == count
    assert drawn.counts["denoised lists"] / count == pytest.approx(share, abs=0.04)
    undenoised = np.isin(drawn.lists.passages[:, 1:], np.arange(16, 20)).any(axis=1)
    assert undenoised.mean() == pytest.approx((1 - share) * (1 - (5 * 4) / (9 * 8)), abs=0.04)


def test_a_passage_judged_not_relevant_is_a_negative_whatever_the_retriever_thinks():
    qrels = {"q0": {"p11": 1, "p50": 0}}
    drawn = build_lists(run_of([10, 11, 12]), qrels, ROW, TEXTS, DrawConfig(size=9), 1)
    assert set(drawn.lists.passages[0, 1:].tolist()) == {10, 12, 50, NO_PASSAGE}


def test_an_unlabelled_question_takes_its_best_candidate_if_sure_enough():
    candidates = run_of([1, 2, 3], [4, 5, 6], [7, 8, -1])
    confidence = np.array([[0.2, 0.95, 0.94], [0.8, 0.7, 0.1], [0.99, 0.1, 1.0]])
    labels = pseudo_labels(candidates, confidence, 0.9, ["q0", "q1", "q2"], NAMES)
    assert labels == {"q0": {"p2": 1}, "q2": {"p7": 1}}
    assert pseudo_labels(candidates, confidence, 0.9, ["q1"], NAMES) == {}


def test_pseudo_labelled_questions_have_denoised_lists_only():
    candidates = run_of(*([list(range(10, 20))] * 40))
    qrels = {f"q{i}": {"p10": 1} for i in range(20)}
    scores = np.tile(np.r_[4.0, 3.9, -np.arange(1, 9)].astype(np.float32), (40, 1))
    config = ListsConfig(size=4, depth=10, denoised_share=0.0, low=0.3, high=0.6)
    drawn, about = denoised_lists(
        candidates,
        Scores(scores, scores[:20, 0]),
        qrels,
        [f"q{i}" for i in range(20, 40)],
        NAMES,
        ROW,
        TEXTS,
        config,
        seed=1,
    )
    assert about["unlabelled"] == about["pseudo_labelled"] == 20
    assert about["low"] == 0.3 and about["high"] == 0.6
    assert drawn.counts["denoised lists"] > 0 and drawn.counts["undenoised lists"] == 20
    confidence = Calibration(about["slope"], about["offset"]).confidence(scores)
    for number, passages in zip(drawn.lists.query_rows.tolist(), drawn.lists.passages.tolist(), strict=True):
        if number >= 20:
            low = {10 + place for place in range(10) if confidence[number, place] < 0.3}
            inside = set(passages[1:]) & set(range(10, 20))
            assert inside <= low


def test_quantile_thresholds_cut_the_confidences_of_all_candidates():
    generator = np.random.default_rng(2)
    candidates = run_of(*[generator.permutation(60)[:20].tolist() for _ in range(30)])
    qrels = {f"q{i}": {NAMES[candidates.rows[i, 0]]: 1} for i in range(30)}
    scores = (generator.normal(size=(30, 20)) * 0.01 + np.eye(1, 20) * 0.02).astype(np.float32)
    config = ListsConfig(size=4, depth=20, denoised_share=1.0, thresholds="quantile", low=0.5, high=0.98)
    both = Scores(scores, scores[:, 0])
    drawn, about = denoised_lists(candidates, both, qrels, [], NAMES, ROW, TEXTS, config, seed=1)
    confidence = fit_calibration(candidates, both, qrels, ROW).confidence(scores)
    assert (confidence < about["low"]).mean() == pytest.approx(0.5, abs=0.01)
    assert (confidence > about["high"]).mean() == pytest.approx(0.02, abs=0.01)
    assert (drawn.verdicts == Verdict.NEGATIVE).sum() == ((confidence < about["low"])[:, 1:]).sum()


def test_calibration_knows_of_positives_that_were_not_retrieved():
    scores = Scores(np.zeros((1, 2), np.float32), np.full(3, 2, np.float32))
    calibration = fit_calibration(run_of([1, 2]), scores, {"q0": {"p9": 1}}, ROW)
    assert calibration == calibrate(np.full(3, 2, np.float32), np.zeros(2, np.float32))
    assert calibration.confidence(np.array([0.0]))[0] < 0.5 < calibration.confidence(np.array([2.0]))[0]


def test_a_calibration_without_other_candidates_is_refused():
    with pytest.raises(TandemError, match="no question has a candidate that is not a labelled positive"):
        fit_calibration(
            run_of([9]), Scores(np.zeros((1, 1), np.float32), np.zeros(1, np.float32)), {"q0": {"p9": 1}}, ROW
        )


def test_a_passage_judged_not_relevant_is_a_negative_whatever_its_confidence():
    candidates = run_of([0, 1, 2, 3, 4])
    confidence = np.array([[0.99, 0.95, 0.05, 0.05, 0.05]])
    denoising = Denoising(confidence, 0.1, 0.9, 1.0, frozenset())
    drawn = build_lists(
        candidates, {"q0": {"p0": 1, "p1": 0}}, ROW, TEXTS, ListsConfig(size=4, depth=5), 1, denoising
    )
    assert drawn.verdicts.tolist() == [[Verdict.LABELLED, Verdict.JUDGED, *[Verdict.NEGATIVE] * 3]]
    assert drawn.lists.passages[:, 0].tolist() == [0]
    assert len(set(drawn.lists.passages[0].tolist())) == 4
