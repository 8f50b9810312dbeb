"""Training lists: what may stand in them and what may never."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemqa.data.runs import Run
from tandemqa.errors import TandemError
from tandemqa.lists.build import NO_PASSAGE, DrawConfig, TrainingLists, build_lists, text_groups

NAMES = [f"p{row}" for row in range(30)]
ROW = {name: row for row, name in enumerate(NAMES)}


def run_of(*rankings):
    width = max(map(len, rankings))
    rows = np.array([[*r, *[-1] * (width - len(r))] for r in rankings], dtype=np.int32)
    scores = np.where(rows >= 0, -np.arange(width, dtype=np.float32), -np.inf).astype(np.float32)
    return Run([f"q{number}" for number in range(len(rankings))], rows, scores)


def all_different():
    return np.arange(30, dtype=np.int64)


@given(
    ranking=st.permutations(range(30)),
    positives=st.sets(st.integers(0, 29), min_size=1, max_size=4),
    twins=st.lists(st.integers(0, 9), min_size=30, max_size=30),
    size=st.integers(2, 12),
    depth=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_no_list_holds_a_positive_as_negative_a_text_twice_or_a_passage_below_the_depth(
    ranking, positives, twins, size, depth, seed
):
    texts = np.array(twins, dtype=np.int64)
    qrels = {"q0": {NAMES[row]: 1 for row in positives}}
    config = DrawConfig(size=size, depth=depth)
    if not set(texts[ranking[:depth]]) - set(texts[list(positives)]):
        with pytest.raises(TandemError, match="both a positive and a negative"):
            build_lists(run_of(ranking), qrels, ROW, texts, config, seed)
        return
    lists = build_lists(run_of(ranking), qrels, ROW, texts, config, seed).lists
    assert sorted(lists.passages[:, 0]) == sorted(positives)
    for first, *rest in lists.passages.tolist():
        negatives = [row for row in rest if row != NO_PASSAGE]
        assert rest == negatives + [NO_PASSAGE] * (len(rest) - len(negatives)), "padding comes last"
        assert not positives & set(negatives)
        assert not set(texts[list(positives)]) & set(texts[negatives])
        assert len(set(texts[negatives])) == len(negatives)
        assert set(negatives) <= set(ranking[:depth])
        allowed = {texts[row] for row in ranking[:depth]} - set(texts[list(positives)])
        assert len(negatives) == min(size - 1, len(allowed)), "as many as there are"
        assert first in positives


def test_a_passage_of_grade_zero_may_be_a_negative():
    qrels = {"q0": {"p0": 1, "p1": 0}}
    lists = build_lists(run_of([0, 1]), qrels, ROW, all_different(), DrawConfig(size=2), seed=1).lists
    assert lists.passages.tolist() == [[0, 1]]


def test_the_same_seed_gives_the_same_lists_and_another_seed_others():
    candidates, qrels = run_of(list(range(1, 30))), {"q0": {"p0": 1}}
    config = DrawConfig(size=5, per_query=4)
    drawn = [build_lists(candidates, qrels, ROW, all_different(), config, seed).lists.passages for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert len(drawn[0]) == 4 and len({tuple(row) for row in drawn[0].tolist()}) > 1


def test_no_question_with_a_positive_is_refused():
    with pytest.raises(TandemError, match="both a positive and a negative"):
        build_lists(run_of([1, 2]), {"q0": {"p0": 0}}, ROW, all_different(), DrawConfig(), seed=1)


def test_texts_are_grouped_by_the_tokens_that_a_model_reads():
    texts = [np.array(ids, dtype=np.int32) for ids in ([5, 6, 7], [5, 6, 8], [5], [], [6, 5])]
    groups = text_groups(texts, 2)
    assert groups[0] == groups[1]
    assert len(set(groups.tolist())) == 4


def test_lists_survive_a_round_trip_through_a_file(tmp_path):
    lists = TrainingLists(np.array([0, 2], np.int32), np.array([[1, 2], [3, NO_PASSAGE]], np.int32))
    lists.save(tmp_path / "lists.npz")
    back = TrainingLists.load(tmp_path / "lists.npz")
    assert np.array_equal(lists.passages, back.passages) and np.array_equal(lists.query_rows, back.query_rows)
