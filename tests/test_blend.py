"""The weight that the retriever's score keeps in the final ranking."""

import numpy as np
import pytest

from tandemqa.data.runs import Run
from tandemqa.evaluation.blend import learn_blend
from tandemqa.evaluation.report import measure
from tandemqa.search.rank import blended

QUERIES, DEPTH = 200, 10
PASSAGES = {f"p{row}": row for row in range(QUERIES * DEPTH)}


def ranked_by(retriever_noise: float, seed: int = 0) -> tuple[Run, np.ndarray, dict[str, dict[str, int]]]:
    """Candidates of which one, anywhere, is relevant; the retriever knows it but for some noise."""
    generator = np.random.default_rng(seed)
    relevant = generator.integers(DEPTH, size=QUERIES)
    truth = np.eye(DEPTH)[relevant]
    scores = (truth + retriever_noise * generator.normal(size=truth.shape)).astype(np.float32)
    rows = np.arange(QUERIES * DEPTH, dtype=np.int32).reshape(QUERIES, DEPTH)
    names = [f"q{number}" for number in range(QUERIES)]
    qrels = {name: {f"p{rows[i, relevant[i]]}": 1} for i, name in enumerate(names)}
    order = np.argsort(-scores, axis=1)
    run = Run(names, np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))
    return run, np.take_along_axis(truth, order, 1), qrels


def mrr(run: Run, qrels: dict[str, dict[str, int]]) -> float:
    report = measure({"re-ranked": run, "retriever after": run}, qrels, PASSAGES, "dev", DEPTH, {})
    return report.stages["re-ranked"]["mrr@10"].mean


def test_blending_adds_the_weighted_scores_and_keeps_empty_places_last() -> None:
    candidates = Run(["q"], np.array([[4, 7, 9, -1]]), np.array([[0.9, 0.8, 0.1, -np.inf]], dtype=np.float32))
    scores = np.array([[1.0, 2.0, 2.5, -np.inf]], dtype=np.float32)
    assert blended(candidates, scores, 0.0).rows.tolist() == [[9, 7, 4, -1]]
    heavy = blended(candidates, scores, 10.0)
    assert heavy.rows.tolist() == [[4, 7, 9, -1]]  # 10.0, 10.0 (a tie keeps the candidates' order), 3.5
    np.testing.assert_allclose(heavy.scores[0, :3], [10.0, 10.0, 3.5])


def test_a_perfect_reranker_needs_no_retriever() -> None:
    candidates, truth, qrels = ranked_by(retriever_noise=3.0)
    assert learn_blend(candidates, truth.astype(np.float32), qrels, PASSAGES) == 0.0


def test_a_random_reranker_does_not_spoil_a_good_retriever() -> None:
    candidates, truth, qrels = ranked_by(retriever_noise=0.2)
    noise = np.random.default_rng(5).normal(size=truth.shape).astype(np.float32)
    weight = learn_blend(candidates, noise, qrels, PASSAGES)
    assert mrr(blended(candidates, noise, weight), qrels) >= mrr(candidates, qrels) - 0.01
    assert mrr(blended(candidates, noise, 0.0), qrels) < mrr(candidates, qrels) - 0.3


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["scores-of-one-size", "a-reranker-with-large-scores"])
def test_two_models_that_err_apart_are_better_together_on_other_questions(scale: float) -> None:
    def pair(seed: int) -> tuple[Run, np.ndarray, dict[str, dict[str, int]]]:
        candidates, truth, qrels = ranked_by(0.5, seed)
        noise = np.random.default_rng(seed + 100).normal(size=truth.shape)
        return candidates, (scale * (truth + 0.5 * noise)).astype(np.float32), qrels

    weight = learn_blend(*pair(1), PASSAGES)
    candidates, scores, qrels = pair(2)
    together = mrr(blended(candidates, scores, weight), qrels)
    assert together > mrr(candidates, qrels) + 0.05
    assert together > mrr(blended(candidates, scores, 0.0), qrels) + 0.05


def test_candidates_that_all_score_alike_have_no_say() -> None:
    candidates, truth, qrels = ranked_by(0.5)
    flat = Run(candidates.query_ids, candidates.rows, np.ones_like(candidates.scores))
    assert learn_blend(flat, truth.astype(np.float32), qrels, PASSAGES) == 0.0
