"""Re-ranking that stops early: the rule, what is learnt for it, and that it reads what it must."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm

from tandemqa.data.runs import Run
from tandemqa.evaluation.stopping import learn_stopping
from tandemqa.search.learnt import Stopping
from tandemqa.search.stopping import STEP, expected_gain, read_until_settled

RULE = {"similarity": 8.0, "place": -0.5, "level": -3.0, "level_spread": 1.2, "spread": 0.9}


def world(count: int, depth: int = 24, seed: int = 0, rule: dict[str, float] = RULE) -> tuple[Run, np.ndarray]:
    """Candidates with similarities, and re-ranker scores that come about as the rule assumes."""
    random = np.random.default_rng(seed)
    similarity = -np.sort(-random.uniform(0.1, 0.9, size=(count, depth)), axis=1)
    level = random.normal(rule["level"], rule["level_spread"], size=(count, 1))
    noise = random.normal(0, rule["spread"], size=(count, depth))
    scores = level + rule["similarity"] * similarity + rule["place"] * np.log(1 + np.arange(depth)) + noise
    rows = np.arange(count * depth, dtype=np.int32).reshape(count, depth)
    return Run([f"q{n}" for n in range(count)], rows, similarity.astype(np.float32)), scores.astype(np.float32)


def labels(run: Run, scores: np.ndarray) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """The candidate of the highest score is the relevant one."""
    best = run.rows[np.arange(len(scores)), scores.argmax(axis=1)]
    qrels = {query: {f"p{row}": 1} for query, row in zip(run.query_ids, best, strict=True)}
    return qrels, {f"p{row}": row for row in range(run.rows.size)}


def test_what_made_the_scores_is_learnt_from_them() -> None:
    run, scores = world(2000)
    learnt = learn_stopping(run, scores, 0.0, *labels(run, scores))
    assert learnt is not None
    assert learnt.similarity == pytest.approx(8.0, abs=0.2) and learnt.place == pytest.approx(-0.5, abs=0.05)
    assert learnt.level == pytest.approx(-3.0, abs=0.15)
    assert learnt.level_spread == pytest.approx(1.2, abs=0.06) and learnt.spread == pytest.approx(0.9, abs=0.02)


def test_the_blend_is_part_of_what_is_foretold() -> None:
    run, scores = world(500)
    plain, blended = (learn_stopping(run, scores, blend, *labels(run, scores)) for blend in (0.0, 2.5))
    assert plain is not None and blended is not None
    assert blended.similarity == pytest.approx(plain.similarity + 2.5, abs=1e-3)
    assert blended.spread == pytest.approx(plain.spread, abs=1e-4)


def test_the_expected_gain_is_what_reading_on_gains_on_average() -> None:
    """Against 40,000 draws of what is unread, from the distribution of a random intercept given what was read."""
    rule = {**RULE, "similarity": 2.0, "place": -0.2}
    run, scores = world(1, depth=9, seed=4, rule=rule)
    done = np.arange(9)[None] < 4
    k = 5
    gain = expected_gain(np.where(done, scores, 0), done, ~done, run.scores, Stopping(**rule, curve=[]), k)[0]

    random, draws = np.random.default_rng(7), 40_000
    forecast = 2.0 * run.scores[0].astype(np.float64) - 0.2 * np.log(1 + np.arange(9))
    shrunk = 4 * 1.2**2 / (4 * 1.2**2 + 0.9**2)
    mean = -3.0 + shrunk * ((scores[0, :4] - forecast[:4]).mean() + 3.0)
    level = random.normal(mean, np.sqrt(1.2**2 * (1 - shrunk)), size=(draws, 1))
    unread = level + forecast[4:] + random.normal(0, 0.9, size=(draws, 5))
    rank = 1 + (scores[0, :4][None, None] > unread[:, :, None]).sum(axis=2)
    now = np.where(np.arange(5) + 5 <= k, 1 / (np.arange(5) + 5), 0)
    rise = np.where(rank <= 4, np.maximum(1 / rank - now, 0), 0)
    assert gain == pytest.approx(rise.sum(axis=1).mean(), abs=0.01) and gain > 0.1


def test_one_read_and_one_unread_by_hand() -> None:
    rule = Stopping(**{**RULE, "level_spread": 0.0}, curve=[])
    similarity = np.array([[0.5, 0.4]], dtype=np.float32)
    done = np.array([[True, False]])
    gain = expected_gain(np.array([[2.0, 0.0]]), done, ~done, similarity, rule, 10)
    forecast = -3.0 + 8.0 * 0.4 - 0.5 * np.log(2)
    assert gain[0] == pytest.approx(norm.sf(2.0, forecast, 0.9) * (1 - 1 / 2), abs=1e-6)


def test_at_zero_all_is_read_and_a_higher_dial_never_reads_more() -> None:
    run, scores = world(60)
    present = run.rows >= 0
    present[3, 5:] = False
    rule = Stopping(**RULE, curve=[])
    counts = []
    for stopping in (0.0, 0.01, 0.1, 0.5, 1.0):
        done = read_until_settled(present, run.scores, lambda _: scores, rule, stopping, 10)
        assert not (done & ~present).any()
        assert (np.diff(done.astype(int), axis=1) <= 0).all(), "candidates are read from the top"
        counts.append(done.sum(axis=1))
    assert (counts[0] == present.sum(axis=1)).all()
    assert all((more >= less).all() for more, less in pairwise(counts))
    assert counts[0].sum() > counts[1].sum() > counts[3].sum() and counts[-1].min() >= STEP


def test_many_questions_stop_where_each_would_alone() -> None:
    run, scores = world(30, seed=2)
    rule, present, asked = Stopping(**RULE, curve=[]), run.rows >= 0, []

    def read(wanted: np.ndarray) -> np.ndarray:
        asked.append(wanted)
        return np.where(wanted, scores, np.nan)  # what was not asked for must not be used

    together = read_until_settled(present, run.scores, read, rule, 0.05, 10)
    assert len(asked) <= 24 / STEP and (sum(wanted.astype(int) for wanted in asked) == together).all()
    for number in range(30):
        one = slice(number, number + 1)
        alone = read_until_settled(present[one], run.scores[one], lambda _: scores[one], rule, 0.05, 10)  # noqa: B023
        assert (alone == together[one]).all()


def test_the_curve_tells_what_other_questions_lose() -> None:
    run, scores = world(800, depth=40)
    learnt = learn_stopping(run, scores, 0.0, *labels(run, scores))
    assert learnt is not None
    first, *others = learnt.curve
    assert (first.stopping, first.share, first.change, first.mrr) == (0.0, 1.0, 0.0, 1.0)
    shares = [point.share for point in learnt.curve]
    assert shares == sorted(shares, reverse=True)
    cheap = next(point for point in others if point.change > -0.003 and point.share < 1 / 3)
    other, its_scores = world(800, depth=40, seed=1)
    done = read_until_settled(other.rows >= 0, other.scores, lambda _: its_scores, learnt, cheap.stopping, 10)
    assert done.mean() == pytest.approx(cheap.share, abs=0.03)
    assert done[np.arange(800), its_scores.argmax(axis=1)].mean() > 0.98


def test_too_few_questions_or_candidates_teach_nothing() -> None:
    run, scores = world(1)
    assert learn_stopping(run, scores, 0.0, *labels(run, scores)) is None
    run, scores = world(5, depth=3)
    assert learn_stopping(run, scores, 0.0, *labels(run, scores)) is None
