"""Two rankings as one: by rank, by scores, and the share that dev questions choose."""

import numpy as np
import pytest

from tandemqa.data.runs import Run
from tandemqa.evaluation.blend import learn_fusion
from tandemqa.search import rank
from tandemqa.search.rank import fuse, fusions


def run(*rankings: dict[int, float], width: int = 4) -> Run:
    rows = np.full((len(rankings), width), -1, dtype=np.int32)
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    for number, ranking in enumerate(rankings):
        rows[number, : len(ranking)], scores[number, : len(ranking)] = list(ranking), list(ranking.values())
    return Run([f"q{number}" for number in range(len(rankings))], rows, scores)


def found(fused: Run, number: int = 0) -> dict[int, float]:
    pairs = zip(fused.rows[number].tolist(), fused.scores[number].tolist(), strict=True)
    return {row: score for row, score in pairs if row >= 0}


def test_fusion_by_rank_adds_reciprocal_ranks() -> None:
    fused = found(fuse(run({7: 0.9, 3: 0.2}), run({3: 11.0, 5: 4.0}), 4))
    assert list(fused) == [3, 7, 5]
    assert fused == pytest.approx({3: 1 / 62 + 1 / 61, 7: 1 / 61, 5: 1 / 62})


def test_fusion_by_scores_scales_each_ranking_to_one() -> None:
    dense, words = run({7: 0.9, 3: 0.5, 1: 0.1}), run({3: 12.0, 5: 8.0, 9: 2.0})
    fused = found(fuse(dense, words, 6, share=0.7))
    assert fused == pytest.approx({7: 0.7, 3: 0.7 * 0.5 + 0.3, 5: 0.3 * 0.6, 1: 0.0, 9: 0.0}, abs=1e-6)
    assert list(fused)[:3] == [7, 3, 5]


@pytest.mark.parametrize("share", [None, 0.3])
def test_a_ranking_that_is_empty_or_of_one_score_does_no_harm(share: float | None) -> None:
    fused = fuse(run({4: 2.0, 2: 2.0}, {}, {}), run({}, {6: 1.0}, {}), 3, share)
    assert [list(found(fused, number)) for number in range(3)] == [[4, 2], [6], []]
    assert not np.isnan(fused.scores).any()


def test_all_shares_give_the_ranking_of_the_one_run_that_they_are_of() -> None:
    dense, words = run({7: 0.9, 3: 0.5, 1: 0.1}), run({3: 12.0, 5: 8.0, 9: 2.0})
    assert list(found(fuse(dense, words, 2, share=1.0))) == [7, 3]
    assert list(found(fuse(dense, words, 2, share=0.0))) == [3, 5]


def test_many_shares_at_once_give_what_each_gives_alone_and_scale_the_scores_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, words = run({7: 0.9, 3: 0.5, 1: 0.1}, {2: 0.4}), run({3: 12.0, 5: 8.0, 9: 2.0}, {})
    shares = [0.3, None, 1.0, 0.0]
    alone = [fuse(dense, words, 3, share) for share in shares]
    scaled, calls = rank._scaled, []
    monkeypatch.setattr(rank, "_scaled", lambda run: calls.append(run) or scaled(run))
    for one, expected in zip(fusions(dense, words, 3, shares), alone, strict=True):
        np.testing.assert_array_equal(one.rows, expected.rows)
        np.testing.assert_array_equal(one.scores, expected.scores)
    assert calls == [dense, words]


def noisy(truth: np.ndarray, noise: float, seed: int) -> Run:
    """All passages of each question ranked by the truth and noise."""
    scores = (truth + noise * np.random.default_rng(seed).normal(size=truth.shape)).astype(np.float32)
    order = np.argsort(-scores, axis=1)
    rows = np.arange(truth.size, dtype=np.int32).reshape(truth.shape)
    names = [f"q{number}" for number in range(len(truth))]
    return Run(names, np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))


@pytest.mark.parametrize(("dense", "words"), [(0.2, 2.0), (2.0, 0.2)])
def test_the_share_follows_the_better_ranking(dense: float, words: float, capsys: pytest.CaptureFixture[str]) -> None:
    truth = np.eye(12)[np.random.default_rng(3).integers(12, size=300)]
    rows = np.arange(truth.size).reshape(truth.shape)
    qrels = {f"q{number}": {f"p{rows[number][truth[number] > 0][0]}": 1} for number in range(300)}
    share = learn_fusion(
        noisy(truth, dense, 1), noisy(truth, words, 2), qrels, {f"p{r}": r for r in range(truth.size)}
    )
    assert share is not None and (share > 0.6 if dense < words else share < 0.4)
    assert "learn to fuse: 100%" in capsys.readouterr().err
