"""The tests of a difference: against enumeration, SciPy, the definition of Holm's procedure, and null data."""

import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from tandemqa.evaluation.significance import holm, paired_interval, randomisation_test

Values = NDArray[np.float64]


def exact_p(differences: list[Fraction]) -> Fraction:
    """The share of all sign patterns whose sum is at least as far from zero, in exact arithmetic."""
    observed = abs(sum(differences))
    sums = [
        sum(sign * each for sign, each in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return Fraction(sum(abs(each) >= observed for each in sums), len(sums))


def runs(differences: list[Fraction]) -> tuple[Values, Values]:
    """Two runs whose values differ so, by query."""
    return np.zeros(len(differences)), np.array([float(each) for each in differences])


def two_runs(seed: int, count: int, better: float) -> tuple[Values, Values]:
    """Correlated runs of `count` queries, the second better by `better` on average."""
    random = np.random.default_rng(seed)
    shared = random.random(count)
    return shared + 0.2 * random.standard_normal(count), shared + 0.2 * random.standard_normal(count) + better


# The randomisation test


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        pytest.param([], Fraction(1), id="no query"),
        pytest.param([0, 0, 0], Fraction(1), id="no difference"),
        pytest.param([1], Fraction(1), id="one difference proves nothing"),
        pytest.param([1, 1, 1, 1, 1], Fraction(2, 32), id="five wins"),
        pytest.param([-1, -1, -1, -1, -1, -1], Fraction(2, 64), id="six losses"),
        pytest.param([1, -1], Fraction(1), id="a win and a loss"),
        pytest.param([3, 2, -1], Fraction(4, 8), id="sums of 6 and 4, either sign, reach the 4 that is seen"),
        pytest.param([1, 1, 1, 1, 1, 0, 0, 0], Fraction(2, 32), id="ties change nothing"),
    ],
)
def test_p_by_hand(differences: list[int], p: Fraction) -> None:
    exact = [Fraction(each) for each in differences]
    assert exact_p(exact) == p
    assert randomisation_test(*runs(exact), seed=0) == p


# Thirds and tenths have no exact float, so that sums which are equal come out unequal.
fractions = st.builds(Fraction, st.integers(-10, 10), st.sampled_from([1, 3, 10]))


@given(st.lists(fractions, max_size=9))
def test_few_differences_have_the_exact_p(differences: list[Fraction]) -> None:
    assert randomisation_test(*runs(differences), seed=0) == exact_p(differences)


@pytest.mark.parametrize("better", [0.0, 0.1, 0.3])
def test_p_agrees_with_scipy_exactly_when_there_are_few_queries(better: float) -> None:
    first, second = two_runs(4, 13, better)
    expected = stats.permutation_test(
        (second, first), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert randomisation_test(first, second, seed=0) == pytest.approx(expected.pvalue, abs=1e-12)


@pytest.mark.parametrize("better", [0.0, 0.03, 0.06, 0.1])
@pytest.mark.parametrize("count", [17, 60, 500])
def test_p_agrees_with_scipy_within_chance_when_there_are_many(count: int, better: float) -> None:
    first, second = two_runs(4, count, better)
    expected = stats.permutation_test(
        (second, first),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=9_999,
        batch=500,
        rng=np.random.default_rng(1),
    ).pvalue
    # Both are sampled: 5 standard errors of their difference.
    chance = 5 * np.sqrt(2 * expected * (1 - expected) / 10_000) + 2 / 10_000
    assert randomisation_test(first, second, seed=0) == pytest.approx(expected, abs=chance)


def test_seventeen_differences_are_sampled_and_sixteen_are_not() -> None:
    assert randomisation_test(np.zeros(16), np.ones(16), seed=0) == 2 / 2**16
    assert randomisation_test(np.zeros(17), np.ones(17), seed=0) >= 1 / 10_001


def test_the_smallest_sampled_p_counts_the_observed_pattern() -> None:
    assert randomisation_test(np.zeros(100), np.ones(100), seed=0) == 1 / 10_001


def test_p_does_not_depend_on_which_run_comes_first() -> None:
    first, second = two_runs(1, 300, 0.02)
    assert randomisation_test(first, second, seed=0) == randomisation_test(second, first, seed=0)


def test_p_depends_on_the_seed_alone() -> None:
    first, second = two_runs(1, 300, 0.01)
    assert randomisation_test(first, second, seed=0) == randomisation_test(first, second, seed=0)
    assert randomisation_test(first, second, seed=0) != randomisation_test(first, second, seed=1)


def test_differences_of_rounding_are_ties() -> None:
    first = np.array([0.1 + 0.2] * 20)
    assert (first != 0.3).all()
    assert randomisation_test(first, np.full(20, 0.3), seed=0) == 1.0


@pytest.mark.parametrize("count", [12, 40], ids=["all patterns", "sampled patterns"])
def test_runs_that_differ_by_chance_are_called_different_as_often_as_the_level_says(count: int) -> None:
    p_values = [randomisation_test(*two_runs(seed, count, 0.0), seed=seed) for seed in range(400)]
    # Called different by chance: at most 5 % of 400; 99.9 % of such trials lie between 7 and 36.
    assert 7 <= sum(p <= 0.05 for p in p_values) <= 36
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_runs_that_do_differ_are_told_apart() -> None:
    # 0.28 is the deviation of one difference: with 100 queries the mean lies 3.6 standard errors from zero.
    p_values = [randomisation_test(*two_runs(seed, 100, 0.1), seed=seed) for seed in range(50)]
    assert sum(p <= 0.05 for p in p_values) >= 40


def test_many_queries_are_tested_in_little_memory() -> None:
    first, second = two_runs(2, 20_000, 0.0)
    tracemalloc.start()
    randomisation_test(first, second, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6  # all patterns at once would take 200 MB as bytes, 1.6 GB as floats


# The paired interval


@pytest.mark.parametrize("count", [30, 400])
def test_the_paired_interval_agrees_with_scipy(count: int) -> None:
    first, second = two_runs(3, count, 0.05)
    expected = stats.bootstrap(
        (second, first),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        batch=1000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = expected.high - expected.low
    assert paired_interval(first, second, seed=0) == pytest.approx(tuple(expected), abs=width / 25)


def test_what_both_runs_share_does_not_widen_the_interval() -> None:
    first = np.random.default_rng(0).random(50)
    assert paired_interval(first, first + 0.125, seed=0) == pytest.approx((0.125, 0.125))


def test_the_interval_is_of_the_second_minus_the_first() -> None:
    low, high = paired_interval(*two_runs(0, 200, 0.5), seed=0)
    assert 0.4 < low < high < 0.6


# Holm's correction


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        pytest.param([], [], id="none"),
        pytest.param([0.03], [0.03], id="one stays as it is"),
        pytest.param([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02], id="four in any order"),
        pytest.param([0.02, 0.02], [0.04, 0.04], id="equal ones"),
        pytest.param([0.6, 0.9, 0.01], [1.0, 1.0, 0.03], id="never above one"),
    ],
)
def test_holm_by_hand(p_values: list[float], corrected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(corrected)


@given(st.lists(st.integers(0, 64), max_size=6), st.integers(1, 63))
def test_holm_calls_significant_what_his_procedure_rejects(sixty_fourths: list[int], level: int) -> None:
    """Step down from the smallest p-value; reject while it is at most level / (hypotheses that remain)."""
    alpha = Fraction(level, 64)
    rejected = set()
    for step, number in enumerate(sorted(range(len(sixty_fourths)), key=lambda each: sixty_fourths[each])):
        if Fraction(sixty_fourths[number], 64) > alpha / (len(sixty_fourths) - step):
            break
        rejected.add(number)
    corrected = holm([each / 64 for each in sixty_fourths])
    assert {number for number, p in enumerate(corrected) if p <= level / 64} == rejected
