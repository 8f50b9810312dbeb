"""Verdicts of the claims benchmark: against SciPy and NumPy on made-up figures, and on what the grid is made of."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from claims.cells import CELLS, Job, bundles, needed, queue
from claims.place import Place
from claims.statements import CLAIMS
from claims.verdicts import Claim, Comparison, Outcome, advice, compared, how, judge, outcomes_of, together

SEEDS, QUESTIONS = 3, 200


def result(values: NDArray[np.float64], seconds: float = 60.0) -> dict[str, Any]:
    """A cell's file in which every stage has the same values."""
    stages = dict.fromkeys(("retriever", "reranker", "pair"), values)
    return {"about": {"seconds": seconds, "machine": "one"}, "values": stages}


def grid(gains: dict[str, float], seconds: dict[str, float] | None = None) -> dict[tuple[str, int], dict[str, Any]]:
    """Results of cells that differ by a gain from questions that are equally hard for all of them."""
    random = np.random.default_rng(4)
    hard = random.random(QUESTIONS)
    results = {}
    for name, gain in gains.items():
        for seed in range(SEEDS if CELLS[name].seeded else 1):
            values = hard + gain + 0.1 * random.standard_normal(QUESTIONS)
            results[name, seed] = result(values, (seconds or {}).get(name, 60.0))
    return results


def only(comparison: Comparison, results: Any) -> Any:
    (outcome,) = outcomes_of((comparison,), results)
    return outcome


def test_difference_interval_and_p_are_those_of_scipy_on_the_seeds_means() -> None:
    results = grid({"dynamic": 0.02, "none": 0.0})
    outcome = compared(Comparison("dynamic", "none", "retriever"), results)
    assert outcome is not None
    by_seed = np.array(
        [
            np.subtract(*(results[name, seed]["values"]["retriever"] for name in ("dynamic", "none")))
            for seed in range(SEEDS)
        ]
    )
    differences = by_seed.mean(axis=0)
    assert outcome.difference == pytest.approx(differences.mean())
    assert list(outcome.by_seed.values()) == pytest.approx(by_seed.mean(axis=1).tolist())
    expected = stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    assert (outcome.low, outcome.high) == pytest.approx(expected.confidence_interval, abs=5e-4)
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1)
    assert outcome.p == pytest.approx(test.pvalue, abs=0.01)
    assert outcome.questions == QUESTIONS


def test_holms_correction_counts_the_comparisons_of_the_claim() -> None:
    results = grid({"share-0.5": 0.012, "dynamic": 0.0, "share-1": 0.002})
    comparisons = tuple(Comparison("share-0.5", other, "retriever") for other in ("dynamic", "share-1"))
    outcomes = outcomes_of(comparisons, results)
    low, high = sorted(outcomes, key=lambda outcome: outcome.p)
    assert low.p_holm == pytest.approx(min(1, 2 * low.p))
    assert high.p_holm == pytest.approx(max(high.p, low.p_holm))


def test_seeds_that_one_cell_lacks_are_left_out_and_a_cell_without_seeds_goes_with_all() -> None:
    results = grid({"dynamic": 0.1, "none": 0.0, "bm25": -0.1})
    del results["none", 1]
    assert list(only(Comparison("dynamic", "none", "pair"), results).by_seed) == [0, 2]
    assert list(only(Comparison("dynamic", "bm25", "pair"), results).by_seed) == [0, 1, 2]
    assert outcomes_of((Comparison("dynamic", "cold", "pair"),), results) == []


@pytest.mark.parametrize(
    ("difference", "high", "p", "verdict"),
    [
        (0.03, 0.05, 0.001, "holds"),
        (0.004, 0.006, 0.001, "holds"),
        (-0.03, -0.01, 0.001, "does not hold here"),
        (0.001, 0.008, 0.7, "does not hold here"),
        (0.008, 0.02, 0.2, "undecided"),
        (-0.002, 0.015, 0.8, "undecided"),
    ],
)
def test_a_verdict_follows_from_sign_interval_and_p(difference: float, high: float, p: float, verdict: str) -> None:
    assert judge(difference, high, p) == verdict


def test_a_claim_holds_only_if_all_its_comparisons_have_been_run_and_hold() -> None:
    comparisons = tuple(Comparison("share-0.5", other, "retriever") for other in ("dynamic", "share-1"))
    claim = Claim("hybrid", comparisons)

    def verdict(**gains: float) -> str:
        names = {"hybrid": "share-0.5", "undenoised": "dynamic", "denoised": "share-1"}
        outcomes = outcomes_of(claim.comparisons, grid({names[name]: gain for name, gain in gains.items()}))
        return together(outcomes, len(claim.comparisons))

    assert verdict(hybrid=0.1, undenoised=0.0, denoised=0.0) == "holds"
    assert verdict(hybrid=0.1, undenoised=0.0) == "undecided"
    assert verdict(hybrid=0.1, undenoised=0.2, denoised=0.0) == "does not hold here"
    assert verdict(hybrid=0.1, undenoised=0.2) == "does not hold here"


def test_advice_names_the_settings_of_the_better_cell_or_of_the_quicker_one_that_loses_nothing() -> None:
    comparison = Comparison("dynamic", "no-kl-gradient", "pair")
    yes, no = "`loss.kl_reranker_gradient=true`", "`loss.kl_reranker_gradient=false`"

    def said(
        difference: float, low: float, high: float, p: float, seconds: float = 90.0, elsewhere: bool = False
    ) -> str:
        results = grid({"dynamic": 0.0, "no-kl-gradient": 0.0}, {"dynamic": seconds})
        for seed in range(SEEDS if elsewhere else 0):
            results["dynamic", seed]["about"]["machine"] = "another"
        seeds = dict.fromkeys(range(SEEDS), difference)
        return advice(Outcome(comparison, difference, low, high, p, p, seeds, QUESTIONS), results)

    assert said(0.031, 0.01, 0.05, 0.001) == f"Use {yes}: 3.1 points better."
    assert said(-0.031, -0.05, -0.01, 0.001) == f"Use {no}: {yes} is 3.1 points worse."
    assert said(0.0, -0.005, 0.005, 0.9) == f"Use {no}: {yes} does not gain a point."
    assert said(0.0, -0.005, 0.005, 0.9, seconds=30) == f"Use {yes}: it takes less time, and no point is lost."
    told = said(0.0, -0.005, 0.005, 0.9, seconds=30, elsewhere=True)  # times of two machines do not compare
    assert told == f"Use {no}: {yes} does not gain a point."
    assert said(-0.01, -0.03, 0.005, 0.3, seconds=30) == f"Use {no}: {yes} does not gain a point."
    assert said(0.01, -0.01, 0.03, 0.3) == "200 questions and 3 seeds do not settle it: keep what the recipe has."


def test_how_a_cell_differs_is_read_from_the_recipes() -> None:
    assert how(CELLS["share-0.5"], CELLS["share-1"]) == "`lists.denoised_share=0.5`"
    assert how(CELLS["dynamic"], CELLS["none"]) == "`loss.kl_weight=1.0`, `loss.retriever_weight=0.0`"
    assert how(CELLS["lists-8"], CELLS["lists-64"]) == "`lists.size=8`"
    assert how(CELLS["time-4"], CELLS["time-8"]) == "`lists.size=4`, 128 joint steps"
    assert how(CELLS["warm"], CELLS["dynamic"]) == "no joint training"


def test_every_recipe_of_the_grid_is_valid_and_every_claim_is_of_cells_that_exist_and_differ() -> None:
    for claim in CLAIMS:
        for comparison in (*claim.comparisons, *claim.beside):
            cell, against = CELLS[comparison.cell], CELLS[comparison.against]
            assert comparison.against_stage or how(cell, against) != how(against, cell)


def test_the_queue_puts_what_a_cell_needs_before_it_and_main_cells_first() -> None:
    jobs = queue(list(CELLS), [0, 1])
    assert len(set(jobs)) == len(jobs)
    for number, job in enumerate(jobs):
        done = {(other.cell.name, other.seed) for other in jobs[:number]}
        assert {(name, job.seed) for name in needed(job.cell)} <= done
    first = [job.cell for job in jobs if job.seed == 0]
    assert [cell.main for cell in first] == sorted((cell.main for cell in first), reverse=True)
    assert [job.name for job in queue(["strong-static"], [5])] == ["warm-5", "strong-5", "strong-static-5"]
    assert bundles() == {"none", "warm", "strong"}


def test_a_cells_file_keeps_the_means_of_all_metrics_and_each_questions_mrr(tmp_path: Path) -> None:
    place, job = Place(tmp_path / "work", tmp_path / "results", tmp_path, "medquad", "three"), Job(CELLS["none"], 1)
    reciprocal = np.array([1.0, 0.0, 1 / 3, 0.1, 1 / 7])
    recall = np.array([1.0, 0.0, 0.5, 1.0, 1.0])
    assert not place.done(job)
    place.save(job, {"pair": {"mrr@10": reciprocal, "recall@20": recall}}, {"seconds": 3.0})
    assert place.done(job) and place.missing_for(Job(CELLS["static-trained"], 1)) == [job], "its bundle is not here"
    loaded = place.load(job)
    assert (loaded["values"]["pair"] == reciprocal).all() and loaded["about"]["seconds"] == 3.0
    assert loaded["means"]["pair"] == pytest.approx({"mrr@10": reciprocal.mean(), "recall@20": 0.7}, abs=1e-6)
    (place.run(job) / "bundle").mkdir(parents=True)
    assert place.missing_for(Job(CELLS["static-trained"], 1)) == []
