"""Re-ranking that stops early: the rule, what is learnt for it, and that it reads what it must."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from tandemqa.data.runs import Run
from tandemqa.evaluation.stopping import STEP, learn_stopping
from tandemqa.lists.logistic import logistic_fit
from tandemqa.search.learnt import Stopping
from tandemqa.search.stopping import chance, read_until_settled, standing

RULE = Stopping(best=-1.5, own=0.2, lead=-0.5, ahead=1.0, read=-0.3, offset=0.5, step=3, curve=[])


def test_a_rule_that_does_not_say_its_step_was_learnt_with_four() -> None:
    assert Stopping.model_validate(RULE.model_dump(exclude={"step"})).step == 4


def world(count: int, depth: int = 24, seed: int = 0) -> tuple[Run, np.ndarray, dict[str, dict[str, int]]]:
    """Candidates of which one, more often near the top, is relevant, and scores far higher with the re-ranker."""
    random = np.random.default_rng(seed)
    relevant = np.minimum(random.geometric(0.25, size=count) - 1, depth - 1)
    similarity = -np.sort(-random.uniform(0.1, 0.9, size=(count, depth)), axis=1)
    scores = random.normal(-2.0, 1.0, size=(count, depth))
    scores[np.arange(count), relevant] += 6.0
    rows = np.arange(count * depth, dtype=np.int32).reshape(count, depth)
    qrels = {f"q{n}": {f"p{rows[n, relevant[n]]}": 1} for n in range(count)}
    return Run(list(qrels), rows, similarity.astype(np.float32)), scores.astype(np.float32), qrels


def passages(run: Run) -> dict[str, int]:
    return {f"p{row}": row for row in range(run.rows.size)}


def test_how_the_reading_stands_by_hand() -> None:
    scores = np.array([[2.0, 5.0, 1.5, 9.9], [3.0, 9.9, 9.9, 9.9]])
    done = np.array([[True, True, True, False], [True, False, False, False]])
    promise = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.2, 0.4, 0.3]])
    found = standing(scores, done, ~done, promise)
    np.testing.assert_allclose(found, [[5.0, 0.8, 3.0, 0.6, np.log(3)], [3.0, 0.9, 0.0, 0.4, 0.0]])
    expected = expit(found @ [-1.5, 0.2, -0.5, 1.0, -0.3] + 0.5)
    np.testing.assert_allclose(chance(found, RULE), expected)


def test_the_fit_is_the_logistic_regression_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    values = random.normal([3.0, 0.0, -1.0, 5.0], [2.0, 1.0, 0.1, 10.0], size=(300, 4))
    labels = expit(values @ [0.8, -1.0, 3.0, 0.05] - 1) > random.random(300)
    spread, weights = values.std(axis=0), random.uniform(0.1, 3.0, size=300)
    theirs = LogisticRegression(C=1 / 0.7, tol=1e-10, max_iter=1000).fit(
        (values - values.mean(axis=0)) / spread, labels, sample_weight=weights
    )
    slopes, offset = logistic_fit(values, labels, weights, 0.7)
    np.testing.assert_allclose(slopes, theirs.coef_[0] / spread, rtol=1e-4)
    assert offset == pytest.approx(theirs.intercept_[0] - slopes @ values.mean(axis=0), rel=1e-4)


@pytest.mark.parametrize("seed", [132, 653, 751])
def test_the_fit_is_found_where_whole_steps_of_newton_leave_for_infinity(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = np.exp(4 * random.normal(size=(60, 3)))
    labels = expit(10 * values[:, 0] - 5) > random.random(60)
    mean, spread = values.mean(axis=0), values.std(axis=0)

    def loss(solution: np.ndarray) -> float:
        logits = (values - mean) / spread @ solution[:-1] + solution[-1]
        return float(np.sum(np.logaddexp(0, logits) - labels * logits) + 0.5e-3 * solution[:-1] @ solution[:-1])

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
    with np.errstate(over="raise"):
        slopes, offset = logistic_fit(values, labels, np.ones(60), 1e-3)
    np.testing.assert_allclose(np.append(slopes * spread, offset + slopes @ mean), best.x, rtol=1e-3)


def test_at_zero_all_is_read_and_a_higher_dial_never_reads_more() -> None:
    run, scores, _ = world(60)
    present = run.rows >= 0
    present[3, 5:] = False
    counts = []
    for stopping in (0.0, 0.01, 0.1, 0.5, 1.0):
        done = read_until_settled(present, 0.5 * run.scores, lambda _: scores, RULE, stopping)
        assert not (done & ~present).any()
        assert (np.diff(done.astype(int), axis=1) <= 0).all(), "candidates are read from the top"
        counts.append(done.sum(axis=1))
    assert (counts[0] == present.sum(axis=1)).all() and (counts[-1] == RULE.step).all()
    assert all((more >= less).all() for more, less in pairwise(counts))
    assert counts[0].sum() > counts[1].sum() > counts[3].sum()


def test_many_questions_stop_where_each_would_alone() -> None:
    run, scores, _ = world(30, seed=2)
    present, promise, asked = run.rows >= 0, 0.5 * run.scores, []

    def read(wanted: np.ndarray) -> np.ndarray:
        asked.append(wanted)
        return np.where(wanted, scores, np.nan)  # what was not asked for must not be used

    together = read_until_settled(present, promise, read, RULE, 0.05)
    assert len(asked) <= 24 / RULE.step and (sum(wanted.astype(int) for wanted in asked) == together).all()
    assert len(set(together.sum(axis=1).tolist())) > 2
    for number in range(30):
        one = slice(number, number + 1)
        alone = read_until_settled(present[one], promise[one], lambda _: scores[one], RULE, 0.05)  # noqa: B023
        assert (alone == together[one]).all()


@pytest.mark.parametrize("blend", [0.0, 2.0])
def test_a_third_of_the_reading_is_enough_on_other_questions_where_scores_tell(blend: float) -> None:
    run, scores, qrels = world(800, depth=40)
    learnt = learn_stopping(run, scores, blend, qrels, passages(run))
    assert learnt is not None and learnt.step == STEP
    first, *others = learnt.curve
    assert (first.stopping, first.share, first.change) == (0.0, 1.0, 0.0)
    shares = [point.share for point in learnt.curve]
    assert shares == sorted(shares, reverse=True)
    cheap = next(point for point in others if point.change > -0.003 and point.share < 1 / 3)
    other, its_scores, its_qrels = world(800, depth=40, seed=1)
    final = its_scores + np.float32(blend) * other.scores
    done = read_until_settled(other.rows >= 0, other.scores, lambda _: final, learnt, cheap.stopping)
    assert done.mean() == pytest.approx(cheap.share, abs=0.03)
    relevant = np.array([int(next(iter(grades))[1:]) for grades in its_qrels.values()])
    assert done[np.arange(800), relevant % 40].mean() > 0.98


def test_the_similarity_tells_when_to_stop_where_it_has_no_weight_in_the_score() -> None:
    """Among candidates as similar as the first the relevant one may be any, and nothing else says where they end."""
    random = np.random.default_rng(4)
    similar = random.integers(1, 25, size=600)
    near = np.arange(24) < similar[:, None]
    similarity = np.where(near, 0.8, 0.2) - 0.001 * np.arange(24)
    scores = random.normal(size=(600, 24))
    scores[np.arange(600), random.integers(similar)] += 3.0
    rows = np.arange(600 * 24, dtype=np.int32).reshape(600, 24)
    run = Run([f"q{n}" for n in range(600)], rows, similarity.astype(np.float32))
    relevant = np.argmax(scores, axis=1)
    qrels = {f"q{n}": {f"p{rows[n, relevant[n]]}": 1} for n in range(600)}
    learnt = learn_stopping(run, scores.astype(np.float32), 0.0, qrels, passages(run))
    assert learnt is not None and learnt.ahead > 1
    state = np.array([[2.0, 0.8, 1.0, ahead, np.log(4)] for ahead in (0.2, 0.8)])
    low, high = chance(state, learnt)
    assert high > low + 0.3


def test_where_reading_on_never_matters_nothing_is_learnt() -> None:
    run, _, qrels = world(20)
    assert (
        learn_stopping(
            run, -np.arange(24, dtype=np.float32) * np.ones((20, 1), np.float32), 0.0, qrels, passages(run)
        )
        is None
    )
    short = Run(run.query_ids, run.rows[:, :3], run.scores[:, :3])
    assert learn_stopping(short, np.ones((20, 3), np.float32), 0.0, qrels, passages(run)) is None
