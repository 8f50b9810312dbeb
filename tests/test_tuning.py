"""Settings of search on judged questions: what each ranks, what it costs, and which is chosen."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tandemqa.cli import app
from tandemqa.data.dataset import load_dataset
from tandemqa.describe import describe
from tandemqa.encoders import backbone
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.evaluation import tuning
from tandemqa.evaluation.tuning import Point, choose, tune
from tandemqa.files import read_json
from tandemqa.index import vectors
from tandemqa.index.index import Index
from tandemqa.search.candidates import Mode
from tandemqa.search.learnt import Learnt, Setting
from tandemqa.search.searcher import Searcher

RULE = {"best": -1.0, "own": 0.0, "lead": 0.0, "ahead": 0.0, "read": 0.0, "offset": 0.0, "curve": []}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the score of a pair moves with the batch that it is in."""
    monkeypatch.setattr(backbone, "has_bfloat16", lambda device: False)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A pair that knows how to blend and when to stop, to be changed; nothing of it is in the cache."""
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path / "cache"))
    bundle = Bundle.load(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    bundle.remember(blend=2.0, stopping=RULE)
    return bundle


def reciprocal_rank(ids: list[str], relevant: set[str]) -> float:
    return next((1 / rank for rank, name in enumerate(ids[:10], 1) if name in relevant), 0.0)


def test_quality_and_reads_of_a_setting_are_those_of_the_search_with_it(
    bundle: Bundle, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_pointless", lambda *_: False)
    monkeypatch.setattr(tuning, "TURNS", 1)
    dataset = load_dataset(tiny_dataset)
    index = Index.build(bundle, dataset, bundle.folder.parent / "index")
    tuned = tune(bundle, dataset, 1e6, [index.folder], split="train", questions=100)
    judged = tuning._drawn(dataset.judged("train"), 100)
    assert tuned.tuned.questions == len(judged) == len(dataset.judged("train"))
    settings = {(point.setting.mode, point.setting.depth) for point in tuned.points}
    assert settings == {(mode, depth) for mode in ("dense", "hybrid") for depth in (0, 5, 10, 20)}
    assert {point.setting.stopping for point in tuned.points} == {0.0, *tuning.DIAL}
    searcher = Searcher(index.folder)
    for point in tuned.points:
        setting = point.setting
        questions = [dataset.queries[query_id] for query_id in judged]
        answers = searcher.search_many(questions, 40, setting.depth, setting.mode, setting.stopping)
        values = [
            reciprocal_rank([hit.id for hit in hits], {name for name, grade in grades.items() if grade})
            for hits, grades in zip(answers, judged.values(), strict=True)
        ]
        assert point.values["mrr@10"].tolist() == pytest.approx(values, abs=1e-6), setting
        reads = [sum(hit.reranker_score is not None for hit in hits) for hits in answers]
        assert point.reads.tolist() == reads, setting
        if setting.stopping == 0:
            assert reads == [setting.depth] * len(questions)
    stopped = [point for point in tuned.points if 0 < point.reads.mean() < point.setting.depth]
    assert {point.setting.mode for point in stopped} == {"dense", "hybrid"}


def test_what_is_chosen_is_how_search_searches_until_it_is_told_otherwise(bundle: Bundle, tiny_dataset: Path) -> None:
    before = read_json(bundle.folder / "tandem.json")
    tuned = tune(bundle, tiny_dataset, 1e6, questions=10)
    after = read_json(bundle.folder / "tandem.json")
    assert after == before | {"tuned": tuned.tuned.model_dump()}
    assert tuned.chosen in tuned.points and tuned.tuned.p95_ms <= 1e6
    # The index that was built before the manifest was written still takes the bundle.
    searcher = Searcher(tuned.chosen.searcher.index.folder)
    assert searcher.learnt.tuned == tuned.tuned

    def told(**chosen: Any) -> Searcher:
        about = {**searcher.bundle.about, "tuned": tuned.tuned.model_dump() | chosen}
        return Searcher(searcher.index, dataclasses.replace(searcher.bundle, about=about))

    question = "how does bread rise"
    usual = told(depth=7, mode="hybrid", stopping=1.0)
    settings: list[dict[str, Any]] = [{}, {"depth": 20}, {"mode": "dense"}, {"stopping": 0.0}]
    for given in settings:
        said = {"depth": 7, "mode": "hybrid", "stopping": 1.0} | given
        assert usual.search(question, **given).hits == searcher.search(question, **said).hits
    untuned = told()
    untuned.learnt = untuned.learnt.model_copy(update={"tuned": None})
    assert untuned.search(question).hits == searcher.search(question, 5, 50, "dense", 0.0).hits


def test_measured_again_nothing_is_read_again(bundle: Bundle, tiny_dataset: Path, monkeypatch: Any) -> None:
    first = tune(bundle, tiny_dataset, 1e6, questions=5)
    monkeypatch.setattr(tuning, "_measure", lambda points, *_: [point.seconds.append(1.0) for point in points])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a pair was read, or a passage encoded")

    monkeypatch.setattr("tandemqa.encoders.cross.CrossEncoder.score", fail)
    monkeypatch.setattr("tandemqa.index.build.build", fail)
    again = tune(bundle, tiny_dataset, 1e6, questions=5)
    assert [p.mean("mrr@10") for p in again.points] == [p.mean("mrr@10") for p in first.points]


def test_no_setting_fast_enough_is_an_error_and_nothing_is_written(bundle: Bundle, tiny_dataset: Path) -> None:
    before = (bundle.folder / "tandem.json").read_bytes()
    message = r"No setting .* within 0\.001 ms: the fastest, \w+ with depth \d+ over the exact index, takes [\d.]+ ms"
    with pytest.raises(TandemError, match=message):
        tune(bundle, tiny_dataset, 0.001, questions=5)
    assert (bundle.folder / "tandem.json").read_bytes() == before
    with pytest.raises(TandemError, match="1 questions of dev are too few"):
        tune(bundle, tiny_dataset, 80, questions=1)
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TandemError, match="p95_ms is"):
            tune(bundle, tiny_dataset, limit)


EXACT: Any = SimpleNamespace(index=SimpleNamespace(segments=[SimpleNamespace(vectors=SimpleNamespace(kind="exact"))]))


def point(mrr: list[float], milliseconds: float, depth: int = 0) -> Point:
    values = {"mrr@10": np.array(mrr), "ndcg@10": np.array(mrr)}
    seconds = [milliseconds / 1000] * 20
    return Point(EXACT, Setting(depth=depth), values, np.zeros(len(mrr), dtype=np.int64), seconds)


def test_the_best_within_the_limit_is_chosen_and_a_faster_one_only_if_it_surely_loses_next_to_nothing() -> None:
    slow = point([1.0] * 200, 90)
    best = point([1.0] * 180 + [0.5] * 20, 50)
    # As often better as worse, and 0.0005 less in the mean, with a standard error of 0.022: nobody knows.
    chance = point([1.0] * 170 + [0.5] * 10 + [0.99] * 10 + [0.5] * 10, 40)
    assert 0 < best.mean("mrr@10") - chance.mean("mrr@10") < 0.001
    assert choose([slow, best, chance], 80) is best
    # 0.002 less on each question: no doubt that it is less, and none that it hardly is.
    alike = point([0.998] * 180 + [0.498] * 20, 30)
    assert choose([slow, best, chance, alike], 80) is alike
    # 0.01 less on each: no doubt that it is more than that.
    worse = point([0.99] * 180 + [0.49] * 20, 20)
    assert choose([slow, best, chance, worse], 80) is best
    assert choose([slow, best, chance, alike, worse], 100) is slow
    as_fast = point([1.0] * 180 + [0.5] * 20, 32)
    assert choose([alike, as_fast, best], 80) is as_fast  # better than what is a little faster, by chance
    assert choose([slow, best, chance, worse], 25) is worse
    with pytest.raises(TandemError, match=r"takes 20\.0 ms"):
        choose([slow, best, chance, worse], 10)


def test_an_index_is_built_as_tune_chose_unless_it_is_told_otherwise(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path
) -> None:
    tuned = tune(bundle, tiny_dataset, 1e6, questions=5).tuned

    def built(chosen: dict[str, Any], **given: Any) -> tuple[str, str, str]:
        bundle.remember(tuned=tuned.model_dump() | chosen)
        index = Index.build(bundle, tiny_dataset, tmp_path / "index", **given)
        return index.segments[0].vectors.kind, index.about["vectors"], index.precision

    assert built({}) == ("exact", "auto", "auto")
    other = {"vectors": "hnsw", "precision": "fp32"}
    assert built(other) == ("hnsw", "hnsw", "fp32")
    assert built(other, vectors="ivf") == ("ivf", "ivf", "fp32")
    assert built(other, vectors="auto", precision="auto") == ("exact", "auto", "auto")
    # Exact search over few passages says nothing of many; over many it does.
    assert built({"vectors": "exact", "passages": 2_000_000})[1] == "exact"
    bundle.remember(tuned=tuned.model_dump() | other)
    command = ["index", str(bundle.folder), str(tiny_dataset), "--out", str(tmp_path / "own")]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert describe(tmp_path / "own")["vectors"] == "hnsw" and describe(tmp_path / "own")["precision"] == "fp32"
    with pytest.raises(TandemError, match="what `tune` chose is not valid; tune it again"):
        built({"vectors": "best"})


def test_int8_that_was_tuned_elsewhere_is_left_out_where_the_processor_lacks_it(
    bundle: Bundle, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandemqa.index.build.has_int8", lambda: False)
    bundle.remember(tuned={"vectors": "exact", "precision": "int8", "passages": 40})
    assert Index.build(bundle, tiny_dataset, tmp_path / "index").precision == "auto"


def test_kept_indexes_and_scores_are_those_of_the_same_code_and_libraries(
    bundle: Bundle, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(tiny_dataset)

    def kept() -> tuple[Path, Path]:
        (index,) = tuning._built(bundle, dataset)
        return index, tuning._Scores(Searcher(index), dataset, list(dataset.queries)).path

    first = kept()
    assert kept() == first
    known = tuning.code_version
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "code_version", lambda *places: known(*places) + "2" * ("encoders" in places))
        assert not set(kept()) & set(first)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "version", lambda name: "99.0" if name == "torch" else "1.0")
        assert not set(kept()) & set(first)
    # Whatever else makes other vectors makes another index.
    usual = vectors.has_bfloat16
    monkeypatch.setattr(vectors, "has_bfloat16", lambda device: not usual(device))
    assert kept()[0] != first[0]


def test_slow_questions_count_and_not_the_mean() -> None:
    uneven = Point(
        EXACT,
        Setting(),
        {"mrr@10": np.ones(4)},
        np.zeros(4, dtype=np.int64),
        [0.01] * 90 + [0.2] * 10,
    )
    steady = point([0.5] * 4, 60)
    assert uneven.milliseconds(50) == pytest.approx(10) and uneven.milliseconds(95) == pytest.approx(200)
    assert choose([uneven, steady], 100) is steady


def test_the_front_is_what_none_beats() -> None:
    points = [point([0.5], 10), point([0.4], 20), point([0.7], 30), point([0.7], 25), point([0.6], 26)]
    unused: Any = SimpleNamespace()
    found = tuning.Tuning(points, points[0], unused)
    assert found.front == [points[0], points[3]]


def test_a_setting_that_reads_more_and_ranks_worse_is_not_measured() -> None:
    def reading(reads: int, mrr: float) -> Point:
        return Point(EXACT, Setting(), {"mrr@10": np.full(4, mrr)}, np.full(4, reads))

    few, more, better, again = points = [reading(8, 0.5), reading(12, 0.5), reading(12, 0.6), reading(12, 0.6)]
    assert [tuning._pointless(point, points) for point in points] == [False, True, False, True]
    assert not tuning._pointless(few, [more, few]) and not tuning._pointless(again, [again, better])


def test_an_index_without_the_passages_judged_is_refused(bundle: Bundle, tiny_dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "corpus.jsonl").write_text('{"_id": "x1", "title": "Owls", "text": "Owls fly."}\n')
    index = Index.build(bundle, other, tmp_path / "index")
    with pytest.raises(TandemError, match="holds no passage that is relevant"):
        tune(bundle, tiny_dataset, 80, [index.folder])


def test_nonsense_in_the_manifest_is_an_error(bundle: Bundle) -> None:
    bundle.remember(tuned={"depth": -3})
    with pytest.raises(TandemError, match=r"tandem\.json: tuned\.depth is not valid"):
        Learnt.of(bundle)


def test_depth_zero_leaves_the_candidates_as_they_were_found(bundle: Bundle, tiny_dataset: Path) -> None:
    bundle.remember(confidence={"slope": 2.0, "offset": -1.0, "threshold": 0.4})
    searcher = Searcher(Index.build(bundle, tiny_dataset, bundle.folder.parent / "index").folder)
    modes: list[Mode] = ["dense", "hybrid", "bm25"]
    for mode in modes:
        answer = searcher.search("how does bread rise", 5, 0, mode)
        assert [hit.retriever_rank for hit in answer] == list(range(1, len(answer) + 1)) and len(answer) >= 2
        assert all(hit.reranker_score is None and hit.answer for hit in answer)
        scores = [hit.score for hit in answer]
        assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()
        assert answer.confidence is None and answer.found
    dense = searcher.search("how does bread rise", 5, 0)
    assert [hit.score for hit in dense] == [hit.retriever_score for hit in dense]
