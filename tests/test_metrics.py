"""Metrics against trec_eval, by hand, and against theory."""

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run, break_ties
from tandemqa.errors import TandemError
from tandemqa.evaluation.metrics import bootstrap_interval, counted_queries, evaluate_run

IDS = [f"p{number}" for number in range(12)]
ROW = {name: row for row, name in enumerate(IDS)}
QUERIES = ["q1", "q2", "q3", "q4"]
METRICS = [f"{kind}@{cut}" for kind in ("mrr", "recall", "r", "ndcg") for cut in (1, 3, 5, 100)] + ["map"]
TREC_NAME = {"recall": "recall", "r": "recall", "ndcg": "ndcg_cut"}

Scored = dict[str, dict[str, float]]


def make(scored: Scored) -> Run:
    """A run in trec_eval's order from query id -> passage id -> score."""
    shape = len(scored), max(map(len, scored.values()), default=0)
    rows, scores = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
    for number, ranking in enumerate(scored.values()):
        rows[number, : len(ranking)] = [ROW[passage] for passage in ranking]
        scores[number, : len(ranking)] = list(ranking.values())
    return break_ties(Run(list(scored), rows, scores), IDS)


def trec_eval(scored: Scored, qrels: Qrels, metric: str) -> NDArray[np.float64]:
    """pytrec_eval's value of `metric` for each query that has a positive, 0 where it gives none."""
    kind, _, cut = metric.partition("@")
    if kind == "mrr":  # trec_eval cuts no reciprocal rank: a positive further down than the cut counts as none
        whole = trec_eval(scored, qrels, "recip_rank@")
        return np.where(whole >= 1 / int(cut) - 1e-12, whole, 0.0)
    name = kind if not cut else f"{TREC_NAME[kind]}.{cut}"
    values = pytrec_eval.RelevanceEvaluator(qrels, {name}).evaluate(scored)
    key = name.replace(".", "_")
    return np.array([values.get(query, {}).get(key, 0.0) for query in counted_queries(qrels)])


passages = st.sampled_from(IDS)
queries = st.sampled_from(QUERIES)
# Few scores, so that ties are the rule; passages judged and ranked overlap; queries miss on either side.
# pytrec_eval writes outside its memory, and may crash, when a grade is below -1.
runs = st.dictionaries(queries, st.dictionaries(passages, st.sampled_from([0.0, 0.5, 1.0, 1.0 + 1e-9, 2.0])))
judgements = st.dictionaries(queries, st.dictionaries(passages, st.integers(-1, 4), min_size=1), min_size=1)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=80)
@given(scored=runs, qrels=judgements)
def test_every_metric_equals_trec_eval(metric: str, scored: Scored, qrels: Qrels) -> None:
    if not counted_queries(qrels):
        qrels["q1"] = {"p0": 1}
    ours = evaluate_run(make(scored), qrels, ROW, [metric])[metric]
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, trec_eval(scored, qrels, metric), rtol=0, atol=1e-9)


def test_a_large_run_equals_trec_eval() -> None:
    random = np.random.default_rng(7)
    ids = [f"d{number}" for number in random.permutation(5000)]
    row = {name: at for at, name in enumerate(ids)}
    rows = np.stack([random.permutation(5000)[:100] for _ in range(300)]).astype(np.int32)
    run = break_ties(
        Run([f"q{n}" for n in range(300)], rows, random.integers(0, 40, rows.shape).astype(np.float32)), ids
    )
    qrels = {  # half of the judged are ranked, half are anywhere; the queries come in another order
        f"q{n}": {ids[at]: int(random.integers(-1, 4)) for at in [*rows[n, :5], *random.integers(0, 5000, 5)]}
        for n in random.permutation(300).tolist()
    }
    scored = {
        query: {ids[at]: float(score) for at, score in zip(rows, scores, strict=True)}
        for query, rows, scores in zip(run.query_ids, run.rows, run.scores, strict=True)
    }
    values = evaluate_run(run, qrels, row, METRICS)
    assert list(values) == METRICS
    for metric in METRICS:
        np.testing.assert_allclose(values[metric], trec_eval(scored, qrels, metric), rtol=0, atol=1e-9)
        assert 0 < values[metric].mean() < 1


def test_values_by_hand() -> None:
    run = make({"q1": {"p0": 4.0, "p1": 3.0, "p2": 2.0, "p3": 1.0}})
    values = evaluate_run(
        run,
        {"q1": {"p1": 1, "p3": 3, "p9": 2, "p0": 0, "p2": -2}},
        ROW,
        ["mrr@1", "mrr@10", "recall@3", "r@4", "ndcg@4", "map"],
    )
    ideal = 3 + 2 / np.log2(3) + 1 / np.log2(4)
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {
            "mrr@1": 0.0,
            "mrr@10": 1 / 2,
            "recall@3": 1 / 3,
            "r@4": 2 / 3,
            "ndcg@4": (1 / np.log2(3) + 3 / np.log2(5)) / ideal,
            "map": (1 / 2 + 2 / 4) / 3,
        }
    )


def test_only_queries_with_a_positive_count_and_in_the_order_of_the_qrels() -> None:
    qrels = {"q3": {"p3": 1}, "q2": {"p2": 0, "p3": -1}, "q1": {"p1": 2}, "q4": {"p4": 1}}
    run = make({"q1": {"p1": 1.0}, "q2": {"p2": 1.0}, "unjudged": {"p1": 1.0}, "q3": {"p5": 1.0, "p3": 0.5}})
    assert counted_queries(qrels) == ["q3", "q1", "q4"]
    assert evaluate_run(run, qrels, ROW, ["mrr@10"])["mrr@10"].tolist() == [0.5, 1.0, 0.0]


def test_a_positive_outside_the_corpus_counts_as_missed() -> None:
    run = make({"q1": {"p0": 1.0}, "q2": {"p1": 1.0, "p2": 0.5}})
    qrels = {"q1": {"elsewhere": 1, "p0": 1, "nowhere": 1}, "q2": {"elsewhere": 1}}
    values = evaluate_run(run, qrels, ROW, ["recall@5", "ndcg@5"])
    assert values["recall@5"].tolist() == [1 / 3, 0.0]
    assert values["ndcg@5"].tolist() == [1 / (1 + 1 / np.log2(3) + 1 / 2), 0.0]


@pytest.mark.parametrize(
    "run", [make({}), make({"other": {"p0": 1.0}}), make({"q1": {}})], ids=["no", "another", "bare"]
)
def test_a_run_without_the_judged_query_scores_nothing(run: Run) -> None:
    assert all(value.tolist() == [0.0] for value in evaluate_run(run, {"q1": {"p0": 1}}, ROW, METRICS).values())


@pytest.mark.parametrize("name", ["mrr", "mrr@0", "mrr@-1", "ndcg@ten", "map@10", "P@5", "recall@5 ", "", "MRR@10"])
def test_an_unknown_metric_is_refused_with_the_valid_forms(name: str) -> None:
    with pytest.raises(TandemError, match=r"mrr@k, recall@k, r@k or ndcg@k .* or map\.") as raised:
        evaluate_run(make({"q1": {"p0": 1.0}}), {"q1": {"p0": 1}}, ROW, ["map", name])
    assert repr(name) in str(raised.value)


def test_judgements_without_a_positive_are_refused() -> None:
    with pytest.raises(TandemError, match="no positive"):
        evaluate_run(make({"q1": {"p0": 1.0}}), {"q1": {"p0": 0}, "q2": {}}, ROW, ["map"])


def test_the_bootstrap_interval_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(3).random(2000)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half / 20)
    assert high == pytest.approx(values.mean() + half, abs=half / 20)


def test_the_bootstrap_interval_depends_on_the_seed_alone() -> None:
    values = np.random.default_rng(3).random(50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    assert bootstrap_interval(np.full(7, 0.25), seed=1) == (0.25, 0.25)
