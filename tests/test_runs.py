"""Runs, and the TREC files that carry them."""

from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemqa.data.runs import Run, any_passage, break_ties, read_trec, write_trec
from tandemqa.errors import TandemError

IDS = ["b", "a", "é", "日本", "Z", "𝒳", "ab", "\uffee"]
ROW = {name: row for row, name in enumerate(IDS)}


def make(rankings: dict[str, list[tuple[str, float]]]) -> Run:
    """A run from query id -> (passage id, score), in the order given."""
    shape = len(rankings), max(map(len, rankings.values()))
    rows, scores = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
    for number, ranking in enumerate(rankings.values()):
        for place, (passage, score) in enumerate(ranking):
            rows[number, place], scores[number, place] = ROW[passage], score
    return Run(list(rankings), rows, scores)


def names(run: Run) -> dict[str, list[str]]:
    return {
        query: [IDS[row] for row in rows if row >= 0] for query, rows in zip(run.query_ids, run.rows, strict=True)
    }


def trec_eval_order(scores: dict[str, float]) -> list[str]:
    """The ranking that trec_eval sees: where the reciprocal rank of each passage alone puts it."""
    rank = {}
    for passage in scores:
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {passage: 1}}, {"recip_rank"})
        rank[passage] = 1 / evaluator.evaluate({"q": scores})["q"]["recip_rank"]
    return sorted(rank, key=lambda passage: rank[passage])


# Few values, so that ties are frequent: equal, equal as float32 alone, either zero, the smallest below zero.
scores = st.sampled_from([0.0, -0.0, -1e-45, 1.0, 1.0 + 1e-10, 1.0 + 2e-7, -3.5, 1e30])
ranking = st.dictionaries(st.sampled_from(IDS), scores, min_size=1).map(lambda scored: list(scored.items()))
rankings = st.dictionaries(st.sampled_from(["q1", "q2", "вопрос"]), ranking, min_size=1)


@given(ranking)
def test_break_ties_orders_as_trec_eval_does(ranking: list[tuple[str, float]]) -> None:
    assert names(break_ties(make({"q": ranking}), IDS))["q"] == trec_eval_order(dict(ranking))


@given(rankings)
def test_break_ties_keeps_each_score_with_its_passage(rankings: dict[str, list[tuple[str, float]]]) -> None:
    run = break_ties(make(rankings), IDS)
    for query, rows, values in zip(run.query_ids, run.rows, run.scores, strict=True):
        depth = len(rankings[query])
        scored = {IDS[row]: score for row, score in zip(rows[:depth], values[:depth], strict=True)}
        assert scored == {passage: np.float32(score) for passage, score in rankings[query]}
        assert (rows[depth:] == -1).all()
        assert (values[depth:] == -np.inf).all()
    assert run.rows.dtype == np.int32
    assert run.scores.dtype == np.float32


def test_break_ties_leaves_the_end_of_a_ranking_last_whatever_score_fills_it() -> None:
    run = Run(["q"], np.array([[0, 1, -1]], np.int32), np.array([[-1.0, -1.0, 0.0]], np.float32))
    assert break_ties(run, IDS).rows.tolist() == [[0, 1, -1]]


def test_break_ties_takes_an_empty_run() -> None:
    run = break_ties(Run(["q"], np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)), IDS)
    assert run.rows.shape == (1, 0)


@settings(max_examples=60)
@given(rankings)
def test_a_written_run_is_read_back_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, rankings: dict[str, list[tuple[str, float]]]
) -> None:
    """Whatever the order of the run was: ties in any order, and scores that rise."""
    path = tmp_path_factory.mktemp("run") / "run.trec"
    run = make(rankings)
    write_trec(run, path, IDS, "tandem")
    again = read_trec(path, ROW)
    assert again.query_ids == run.query_ids
    assert np.array_equal(again.rows, run.rows)
    assert again.rows.dtype == np.int32
    assert again.scores.dtype == np.float32


@settings(max_examples=60)
@given(ranking)
def test_trec_eval_sees_a_written_run_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, ranking: list[tuple[str, float]]
) -> None:
    path = tmp_path_factory.mktemp("run") / "run.trec"
    write_trec(make({"q": ranking}), path, IDS, "tandem")
    lines = [line.split(" ") for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line[3] for line in lines] == [str(rank) for rank in range(1, len(ranking) + 1)]
    assert trec_eval_order({line[2]: float(line[4]) for line in lines}) == [passage for passage, _ in ranking]


def test_scores_without_ties_survive_to_the_last_bit(tmp_path: Path) -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(len(IDS)).astype(np.float32))[::-1]
    run = Run(["q"], np.arange(len(IDS), dtype=np.int32)[None], values[None].copy())
    write_trec(run, tmp_path / "run.trec", IDS, "tandem")
    assert np.array_equal(read_trec(tmp_path / "run.trec", ROW).scores, run.scores)


def test_a_run_file_reads_as_one_expects(tmp_path: Path) -> None:
    write_trec(make({"q1": [("b", 0.1), ("é", -2.0)], "q2": [("Z", 12.5)]}), tmp_path / "r", IDS, "bm25")
    text = "q1 Q0 b 1 0.1 bm25\nq1 Q0 é 2 -2.0 bm25\nq2 Q0 Z 1 12.5 bm25\n"
    assert (tmp_path / "r").read_text(encoding="utf-8") == text


def test_a_query_without_passages_has_no_line(tmp_path: Path) -> None:
    write_trec(make({"empty": [], "q": [("a", 1.0)]}), tmp_path / "run.trec", IDS, "tandem")
    assert read_trec(tmp_path / "run.trec", ROW).query_ids == ["q"]


def test_reading_ties_the_scores_that_trec_eval_ties(tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text("q Q0 a 1 1.0000000001 t\nq Q0 b 2 1.0 t\n", encoding="utf-8")
    assert trec_eval_order({"a": 1.0000000001, "b": 1.0}) == ["b", "a"]
    assert names(read_trec(tmp_path / "run.trec", ROW)) == {"q": ["b", "a"]}


def test_reading_orders_by_score_and_ignores_the_rank(tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text(
        "\ufeffq1 Q0 a 1 1.0 t\r\nq2\tQ0\tb\t1\t3\tt\r\nq1 Q0 ab 2 2e0 t\r\nq1 Q0 b 3 1 t\r\n",
        encoding="utf-8",
    )
    run = read_trec(tmp_path / "run.trec", ROW)
    assert names(run) == {"q1": ["ab", "b", "a"], "q2": ["b"]}
    assert run.scores.tolist() == [[2.0, 1.0, 1.0], [3.0, -np.inf, -np.inf]]


@pytest.mark.parametrize(
    ("content", "line", "named"),
    [
        pytest.param("q Q0 a 1 2.0\n", 1, "5 columns", id="five columns"),
        pytest.param("q Q0 a 1 2.0 t\nq Q0 b 2 1.0 t t\n", 2, "7 columns", id="seven columns"),
        pytest.param("q Q0 a 1 high t\n", 1, "score 'high'", id="a score that is a word"),
        pytest.param("q Q0 a 1 nan t\n", 1, "score 'nan'", id="a score that is not a number"),
        pytest.param("q Q0 a 1 -inf t\n", 1, "score '-inf'", id="an infinite score"),
        pytest.param("q Q0 a 1 1e39 t\n", 1, "score '1e39'", id="a score beyond float32"),
        pytest.param("\nq Q0 zebra 1 2.0 t\n", 2, "passage 'zebra'", id="an unknown passage"),
        pytest.param("q Q0 a 1 2.0 t\nr Q0 a 1 2.0 t\nq Q0 a 2 1.0 t\n", 3, "passage 'a'", id="a passage twice"),
        pytest.param(b"q Q0 a 1 2.0 t\nq Q0 \xe9 2 1.0 t\n", 2, "UTF-8", id="Latin-1 text"),
    ],
)
def test_a_run_file_is_refused_for(tmp_path: Path, content: str | bytes, line: int, named: str) -> None:
    path = tmp_path / "run.trec"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(TandemError) as raised:
        read_trec(path, ROW)
    assert str(raised.value).startswith(f"{path}, line {line}: ")
    assert named in str(raised.value)


def test_the_first_line_that_repeats_a_passage_is_the_one_named(tmp_path: Path) -> None:
    lines = ["q Q0 b 1 5 t", "r Q0 a 1 4 t", "r Q0 Z 2 3 t", "r Q0 Z 3 2 t", "q Q0 b 2 1 t"]
    (tmp_path / "run.trec").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TandemError, match=r"line 4: passage 'Z' stands twice for query 'r'; keep one"):
        read_trec(tmp_path / "run.trec", ROW)


def test_a_run_over_passages_not_known_beforehand_gives_each_a_row_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run.trec").write_text("q Q0 x 1 1 t\nq Q0 y 2 2 t\nr Q0 z 1 1 t\nr Q0 x 2 1 t\n", encoding="utf-8")
    row = any_passage()
    run = read_trec(tmp_path / "run.trec", row)
    assert dict(row) == {"x": 0, "y": 1, "z": 2}
    assert run.rows.tolist() == [[1, 0], [2, 0]]  # r's tie is broken by id, as ever


def test_an_empty_or_missing_run_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"run\.trec does not exist"):
        read_trec(tmp_path / "run.trec", ROW)
    (tmp_path / "run.trec").write_text("\n", encoding="utf-8")
    with pytest.raises(TandemError, match=r"run\.trec has no rows"):
        read_trec(tmp_path / "run.trec", ROW)


@pytest.mark.parametrize(
    ("query", "passage", "tag", "score", "named"),
    [
        pytest.param("two words", "a", "t", 1.0, "'two words'", id="a space in a query id"),
        pytest.param("q", "a\tb", "t", 1.0, r"'a\\tb'", id="a tab in a passage id"),
        pytest.param("q", "a", "", 1.0, "''", id="an empty tag"),
        pytest.param("q", "a", "t", float("nan"), "not finite", id="a score that is not a number"),
        pytest.param("q", "a", "t", float("inf"), "not finite", id="an infinite score"),
    ],
)
def test_a_run_is_not_written_with(
    tmp_path: Path, query: str, passage: str, tag: str, score: float, named: str
) -> None:
    run = Run([query], np.array([[0, -1]], np.int32), np.array([[score, -np.inf]], np.float32))
    with pytest.raises(TandemError, match=rf"run\.trec was not written.*{named}"):
        write_trec(run, tmp_path / "run.trec", [passage], tag)
    assert list(tmp_path.iterdir()) == []


def test_ids_may_hold_spaces_that_are_not_ascii(tmp_path: Path) -> None:
    run = Run(["no\u00a0break"], np.array([[0]], np.int32), np.array([[1]], np.float32))
    write_trec(run, tmp_path / "run.trec", ["全角\u3000空白"], "t")
    again = read_trec(tmp_path / "run.trec", {"全角\u3000空白": 0})
    assert again.query_ids == run.query_ids
