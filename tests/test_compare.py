"""Runs compared: by hand on a few questions, against trec_eval on many, and what the command says."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from typer.testing import CliRunner

from tandemqa.cli import app
from tandemqa.data.runs import Run, read_trec
from tandemqa.errors import TandemError
from tandemqa.evaluation.compare import Comparison, compare

# q4 has no positive and is not counted; p9 stands in no run.
QRELS = {
    "q1": {"p1": 1},
    "q2": {"p2": 2, "p9": 1, "p1": 0},
    "q3": {"p3": 1},
    "q4": {"p1": 0},
    "q5": {"p5": 1},
}
FIRST = {"q1": ["p2", "p1"], "q2": ["p2", "p1"], "q3": ["p1", "p2", "p4", "p3"], "q5": ["p1"], "q4": ["p7"]}
SECOND = {"q1": ["p1", "p2"], "q2": ["p3", "p2"], "q3": ["p3"], "unjudged": ["p1"]}

Rankings = dict[str, list[str]]


def write_run(path: Path, rankings: Rankings) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = [
        f"{query} Q0 {passage} {rank} {-rank} test\n"
        for query, passages in rankings.items()
        for rank, passage in enumerate(passages, start=1)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def qrels(tmp_path: Path) -> Path:
    lines = [f"{query} 0 {passage} {grade}\n" for query, grades in QRELS.items() for passage, grade in grades.items()]
    (tmp_path / "qrels.txt").write_text("".join(lines))
    return tmp_path / "qrels.txt"


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first.trec", FIRST)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return write_run(tmp_path / "second.trec", SECOND)


def run(*arguments: object) -> Any:
    """The command in this process; what it raised, other than an exit, is raised again."""
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# By hand


def test_two_runs_by_hand(qrels: Path, first: Path, second: Path) -> None:
    comparison = compare(qrels, [first, second])
    assert comparison.queries == ["q1", "q2", "q3", "q5"]
    assert comparison.values["first"]["mrr@10"].tolist() == [1 / 2, 1, 1 / 4, 0]
    assert comparison.values["second"]["mrr@10"].tolist() == [1, 1 / 2, 1, 0]
    one, other = comparison.runs["first"], comparison.runs["second"]
    assert (one.mean, one.missing, one.depth) == (1.75 / 4, 0, 4)
    assert (other.mean, other.missing, other.depth) == (2.5 / 4, 1, 2)
    assert 0 <= one.low < one.mean < one.high <= 1
    assert list(comparison.differences) == ["second"]
    difference = comparison.differences["second"]
    assert difference.mean == 0.75 / 4
    assert (difference.wins, difference.ties, difference.losses) == (2, 1, 1)
    # Of the patterns of 1/2, 1/2 and 3/4, the sum of 3/4 is reached by 7/4 and 3/4: 1 and 2 patterns, and as
    # many with the other sign.
    assert difference.p == difference.p_holm == 6 / 8
    assert difference.low <= 0.75 / 4 <= difference.high


def test_the_unjudged_share_by_hand(qrels: Path, first: Path, second: Path) -> None:
    comparison = compare(qrels, [first, second])
    # Judged are q1: p1; q2: p2 and, with grade 0, p1; q3: p3. Questions that are not counted stay out.
    assert comparison.runs["first"].unjudged == 5 / 9
    assert comparison.runs["second"].unjudged == 2 / 5


def test_only_the_top_ten_count_as_unjudged(tmp_path: Path, qrels: Path) -> None:
    ranked = write_run(tmp_path / "deep.trec", {"q1": ["p1"] + [f"x{place}" for place in range(30)]})
    assert compare(qrels, [ranked]).runs["deep"].unjudged == 9 / 10


def test_each_p_is_corrected_for_the_number_of_runs(tmp_path: Path) -> None:
    """Nine questions: the third run is first on all, the second on none but the last."""
    questions = [f"q{number}" for number in range(9)]
    (tmp_path / "qrels").write_text("".join(f"{query} 0 right 1\n" for query in questions))
    half = write_run(tmp_path / "half", {query: ["wrong", "right"] for query in questions})
    same = write_run(tmp_path / "same", {query: ["wrong", "right"] for query in questions[:-1]} | {"q8": ["right"]})
    best = write_run(tmp_path / "best", {query: ["right"] for query in questions})
    none = write_run(tmp_path / "none", {query: ["wrong"] for query in questions})
    differences = compare(tmp_path / "qrels", [half, same, best, none]).differences
    assert {name: each.p for name, each in differences.items()} == {"same": 1.0, "best": 2 / 512, "none": 2 / 512}
    assert {name: each.p_holm for name, each in differences.items()} == {
        "same": 1.0,
        "best": 6 / 512,
        "none": 6 / 512,
    }


def test_one_run_alone_is_measured(qrels: Path, first: Path) -> None:
    comparison = compare(qrels, [first], metric="recall@1")
    assert comparison.runs["first"].mean == 0.5 / 4
    assert comparison.differences == {}
    assert "against" not in comparison.table()


# Against trec_eval


def test_every_metric_of_every_question_equals_trec_eval(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    passages = [f"p{number}" for number in range(150)]
    judged = {
        f"q{number}": {passages[at]: int(random.integers(0, 3)) for at in random.integers(0, 150, 30)}
        for number in range(25)
    }
    judged["q0"] = dict.fromkeys(passages[:3], 1)
    rankings = {query: random.permutation(passages)[:120].tolist() for query in judged}
    (tmp_path / "qrels").write_text(
        "".join(
            f"{query} 0 {passage} {grade}\n" for query, grades in judged.items() for passage, grade in grades.items()
        )
    )
    deep = write_run(tmp_path / "deep.trec", rankings)
    shallow = write_run(tmp_path / "shallow.trec", {query: ranked[:50] for query, ranked in rankings.items()})
    out = tmp_path / "out" / "values.jsonl"
    compare(tmp_path / "qrels", [deep, shallow], metric="map").write_per_query(out)

    names = {"map": "map", "ndcg@10": "ndcg_cut_10", "recall@1": "recall_1", "recall@20": "recall_20"}
    names["recall@100"] = "recall_100"
    measures = {"map", "ndcg_cut.10", "recall.1,20,100", "recip_rank"}
    scored = {query: {passage: -float(at) for at, passage in enumerate(ranked)} for query, ranked in rankings.items()}
    expected = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(scored)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["query"] for line in lines] == list(judged)
    for line in lines:
        values, oracle = line["runs"]["deep"], expected[line["query"]]
        assert set(values) == {*names, "mrr@10"}
        for metric, name in names.items():
            assert values[metric] == pytest.approx(oracle[name], abs=1e-9)
        assert values["mrr@10"] == pytest.approx(oracle["recip_rank"] if oracle["recip_rank"] >= 0.1 else 0.0)
        # Ranked down to 50, a run says nothing of its recall at 100.
        assert set(line["runs"]["shallow"]) == set(values) - {"recall@100"}
        assert line["runs"]["shallow"]["recall@20"] == values["recall@20"]


# What is read


def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "qrels").mkdir(parents=True)
    lines = ["query-id\tcorpus-id\tscore\n"]
    lines += [
        f"{query}\t{passage}\t{grade}\n" for query, grades in QRELS.items() for passage, grade in grades.items()
    ]
    (tmp_path / "data" / "qrels" / "test.tsv").write_text("".join(lines))
    (tmp_path / "data" / "qrels" / "dev.tsv").write_text("q1\tp1\t1\n")
    return tmp_path / "data"


def same(one: Comparison, other: Comparison) -> bool:
    return one.as_json() == other.as_json()


def test_judgements_mean_the_same_wherever_they_stand(tmp_path: Path, qrels: Path, first: Path, second: Path) -> None:
    data = folder(tmp_path)
    expected = compare(qrels, [first, second])
    assert same(compare(data, [first, second]), expected)
    assert same(compare(str(data / "qrels" / "test.tsv"), [str(first), str(second)]), expected)
    assert compare(data, [first, second], split="dev").queries == ["q1"]


def test_runs_are_named_after_their_files_and_by_their_path_where_two_have_one_name(
    tmp_path: Path, qrels: Path, first: Path
) -> None:
    one, other = write_run(tmp_path / "a" / "run.trec", FIRST), write_run(tmp_path / "b" / "run.txt", SECOND)
    assert list(compare(qrels, [one, first, other]).runs) == [str(one), "first", str(other)]


def test_one_run_is_in_memory_at_a_time(tmp_path: Path, qrels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[weakref.ref[Run]] = []

    def reading(path: Path, row: dict[str, int]) -> Run:
        assert not any(earlier() for earlier in read)
        run = read_trec(path, row)
        read.append(weakref.ref(run))
        return run

    monkeypatch.setattr("tandemqa.evaluation.compare.read_trec", reading)
    compare(qrels, [write_run(tmp_path / name, FIRST) for name in "abc"])
    assert len(read) == 3


# The command


def test_the_command_prints_a_line_a_run_and_a_line_a_difference(qrels: Path, first: Path, second: Path) -> None:
    result = run(qrels, first, second)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["mrr@10", "over", "4", "questions"]
    assert lines[3][:2] == ["first", "0.438"] and lines[3][-2:] == ["0", "55.6%"]
    assert lines[4][:2] == ["second", "0.625"] and lines[4][-2:] == ["1", "40.0%"]
    assert lines[6][:3] == ["against", "first", "difference"]
    assert lines[7][:2] == ["second", "+0.188"] and lines[7][-5:] == ["0.7500", "0.7500", "2", "1", "1"]
    assert "Warning: second ranks 2 passages at most; mrr@10 looks at 10." in result.stdout


def test_a_p_too_small_to_print_is_not_printed_as_zero(tmp_path: Path) -> None:
    questions = [f"q{number}" for number in range(40)]
    (tmp_path / "qrels").write_text("".join(f"{query} 0 right 1\n" for query in questions))
    worse = write_run(tmp_path / "worse", {query: ["wrong", "right"] for query in questions})
    better = write_run(tmp_path / "better", {query: ["right", "wrong"] for query in questions})
    assert "<0.0001" in compare(tmp_path / "qrels", [worse, better]).table()


def test_the_command_prints_one_json_document(qrels: Path, first: Path, second: Path) -> None:
    result = run(qrels, first, second, "--metric", "ndcg@2", "--json")
    document = json.loads(result.stdout)
    assert document == compare(qrels, [first, second], metric="ndcg@2").as_json()
    assert document["metric"] == "ndcg@2" and document["questions"] == 4 and document["against"] == "first"
    assert set(document["runs"]["first"]) == {"mean", "low", "high", "missing", "depth", "unjudged"}
    assert set(document["differences"]["second"]) >= {"mean", "low", "high", "p", "p_holm", "wins", "ties", "losses"}


def test_the_command_writes_the_metrics_of_each_question(
    tmp_path: Path, qrels: Path, first: Path, second: Path
) -> None:
    assert run(qrels, first, second, "--per-query", tmp_path / "values.jsonl").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    assert [line["query"] for line in lines] == ["q1", "q2", "q3", "q5"]
    assert lines[0]["runs"] == {
        "first": {"mrr@10": 0.5, "ndcg@10": pytest.approx(1 / np.log2(3)), "recall@1": 0.0},
        "second": {"mrr@10": 1.0, "ndcg@10": 1.0, "recall@1": 1.0},
    }
    assert lines[3]["runs"]["second"] == {"mrr@10": 0.0, "ndcg@10": 0.0, "recall@1": 0.0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"runs": ["gone.trec"]}, "gone.trec does not exist", id="a run that is not there"),
        pytest.param({"runs": ["broken.trec"]}, "broken.trec, line 1: 2 columns", id="a run of two columns"),
        pytest.param({"runs": ["other.trec"]}, "other.trec ranks no question that", id="a run over other questions"),
        pytest.param({"runs": ["ok.trec", "ok.trec"]}, "ok.trec is given twice", id="a run given twice"),
        pytest.param({"judgements": "gone"}, "gone does not exist", id="judgements that are not there"),
        pytest.param({"judgements": "ok.trec"}, "ok.trec, line 1: 6 columns", id="a run in place of judgements"),
        pytest.param({"judgements": "none.txt"}, "none.txt has no positive", id="judgements without a positive"),
        pytest.param({"options": ["--metric", "mrr"]}, "There is no metric 'mrr'", id="an unknown metric"),
        pytest.param({"judgements": "data", "options": ["--split", "x"]}, "has: dev, test.", id="an unknown split"),
        pytest.param({"options": ["--per-query", "data/qrels"]}, "could not be written", id="a folder to write to"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    folder(tmp_path)
    write_run(tmp_path / "ok.trec", FIRST)
    write_run(tmp_path / "other.trec", {"elsewhere": ["p1"]})
    (tmp_path / "broken.trec").write_text("q1 p1\n")
    (tmp_path / "none.txt").write_text("q1 0 p1 0\n")
    judgements = tmp_path / change.get("judgements", "data")
    options = [str(tmp_path / word) if "/" in word else word for word in change.get("options", [])]
    result = run(judgements, *(tmp_path / name for name in change.get("runs", ["ok.trec"])), *options)
    assert result.exit_code == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and named in last


def test_a_metric_is_refused_before_anything_is_read() -> None:
    with pytest.raises(TandemError, match="There is no metric"):
        compare("nowhere", ["nothing"], metric="precision")
