"""Judgements: written for TREC's tools, read from TREC's and BEIR's files, with or without known ids."""

from pathlib import Path

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemqa.data.qrels import Qrels, read_qrels, write_qrels
from tandemqa.errors import TandemError

ids = st.sampled_from(["1", "q-7", "вопрос", "日本語", "no\u00a0break", "😀", "0"])
judgements = st.dictionaries(ids, st.dictionaries(ids, st.integers(-2, 9), min_size=1), min_size=1)


@settings(max_examples=60)
@given(qrels=judgements)
def test_written_judgements_are_read_back(tmp_path_factory: pytest.TempPathFactory, qrels: Qrels) -> None:
    path = tmp_path_factory.mktemp("qrels") / "qrels.txt"
    write_qrels(qrels, path)
    assert read_qrels(path) == qrels


def test_written_judgements_are_what_treceval_reads(tmp_path: Path) -> None:
    qrels = {"q2": {"p1": 1, "p2": 0}, "q1": {"p3": 3, "p1": -1}}
    write_qrels(qrels, tmp_path / "qrels.txt")
    assert (tmp_path / "qrels.txt").read_text() == "q2 0 p1 1\nq2 0 p2 0\nq1 0 p3 3\nq1 0 p1 -1\n"
    with (tmp_path / "qrels.txt").open() as file:
        assert pytrec_eval.parse_qrel(file) == qrels


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp3\t0\nq2\tp2\t1\n", id="BEIR with a header"),
        pytest.param("q1\tp1\t2\nq1\tp3\t0\nq2\tp2\t1\n", id="BEIR without one"),
        pytest.param("q1 0 p1 2\nq1 0 p3 0\nq2 Q0 p2 1\n", id="TREC with spaces"),
        pytest.param("q1\t0\tp1\t2\nq1\t0\tp3\t0\nq2\t0\tp2\t1\n", id="TREC with tabs"),
        pytest.param("q1  0  p1   2\r\n\r\nq1  0  p3   0\r\nq2  0  p2   1", id="TREC with columns lined up, CRLF"),
    ],
)
def test_judgements_are_read_from(tmp_path: Path, content: str) -> None:
    (tmp_path / "qrels").write_bytes(content.encode())
    assert read_qrels(tmp_path / "qrels") == {"q1": {"p1": 2, "p3": 0}, "q2": {"p2": 1}}


def test_ids_are_checked_only_where_the_known_ones_are_given(tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("q1 0 p1 1\n")
    assert read_qrels(tmp_path / "qrels", queries={"q1"}) == {"q1": {"p1": 1}}
    with pytest.raises(TandemError, match=r"line 1: query-id 'q1' is not in queries\.jsonl"):
        read_qrels(tmp_path / "qrels", queries={"q2"})
    with pytest.raises(TandemError, match=r"line 1: corpus-id 'p1' is not in corpus\.jsonl"):
        read_qrels(tmp_path / "qrels", passages=())


@pytest.mark.parametrize(
    ("qrels", "named"),
    [
        pytest.param({"two words": {"p": 1}}, "'two words'", id="a space in a query id"),
        pytest.param({"q": {"p": 1, "a\tb": 1}}, r"'a\\tb'", id="a tab in a passage id"),
        pytest.param({"q": {"": 1}}, "''", id="an empty passage id"),
    ],
)
def test_judgements_are_not_written_with(tmp_path: Path, qrels: Qrels, named: str) -> None:
    with pytest.raises(TandemError, match=rf"qrels\.txt was not written: the name {named}"):
        write_qrels(qrels, tmp_path / "qrels.txt")
    assert list(tmp_path.iterdir()) == []
