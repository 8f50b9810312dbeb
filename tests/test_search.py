"""Questions answered from an index."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.runs import Run
from tandemqa.encoders import backbone
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.evaluation.stages import rank_stages
from tandemqa.index.dense import DenseIndex
from tandemqa.index.index import Index
from tandemqa.index.lexical import LexicalIndex
from tandemqa.search.candidates import Mode
from tandemqa.search.highlight import best_sentences
from tandemqa.search.learnt import Learnt
from tandemqa.search.rank import fuse, lexical, rerank, retrieve
from tandemqa.search.searcher import Answer, Searcher

TUNED = {"vectors": "exact", "precision": "auto", "passages": 40, "split": "dev", "questions": 7, "mrr": 0.5}
TUNED |= {"ndcg": 0.5, "limit_ms": 80, "p50_ms": 5, "p95_ms": 9, "k": 5, "threads": 1}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the score of a pair moves with the batch that it is in."""
    monkeypatch.setattr(backbone, "has_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Dataset:
    return load_dataset(tiny_dataset)


@pytest.fixture(scope="module")
def searcher(bundle: Bundle, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "has_bfloat16", lambda device: False)
        patch.setenv("TANDEMQA_CACHE", str(tmp_path_factory.mktemp("cache")))  # elsewhere the vectors are bfloat16's
        return Searcher(Index.build(bundle, dataset, tmp_path_factory.mktemp("search") / "index").folder)


def ids(answer: Answer) -> list[str]:
    return [hit.id for hit in answer]


def test_search_ranks_as_the_two_stages_do_by_hand(searcher: Searcher, bundle: Bundle, dataset: Dataset) -> None:
    texts = [passage.full for passage in dataset.passages]
    questions = list(dataset.queries.values())
    retriever, reranker = bundle.retriever, bundle.reranker
    index = DenseIndex.build(retriever.encode(retriever.tokenize(texts), "passage"))
    candidates = retrieve(retriever, index, questions, retriever.tokenize(questions), 12)
    best = rerank(reranker, candidates, reranker.tokenize(questions), reranker.tokenize(texts))
    for number, answer in enumerate(searcher.search_many(questions, k=5, depth=12)):
        rows = best.rows[number, :5].tolist()
        assert ids(answer) == [dataset.passages.ids[row] for row in rows]
        assert [hit.score for hit in answer] == pytest.approx(best.scores[number, :5].tolist(), abs=1e-5)
        for hit, row in zip(answer, rows, strict=True):
            place = candidates.rows[number].tolist().index(row)
            assert hit.retriever_rank == place + 1
            assert hit.retriever_score == pytest.approx(candidates.scores[number, place], abs=1e-5)
            assert (hit.title, hit.text) == dataset.passages[row][1:]


def test_the_retriever_score_is_the_cosine_of_the_two_vectors(searcher: Searcher, bundle: Bundle) -> None:
    question = "why do prices rise"
    retriever = bundle.retriever
    (query,) = retriever.encode(retriever.tokenize([question]), "query").astype(np.float64)
    for hit in searcher.search(question, k=40):
        (passage,) = retriever.encode(retriever.tokenize([f"{hit.title} {hit.text}".strip()]), "passage")
        cosine = query @ passage / np.linalg.norm(query) / np.linalg.norm(passage)
        assert hit.retriever_score == pytest.approx(cosine, abs=2e-3)  # the index keeps half precision


def test_hits_are_ranked_from_one_by_falling_score(searcher: Searcher) -> None:
    answer = searcher.search("what is window glass made of", k=10)
    assert [hit.rank for hit in answer] == list(range(1, 11))
    scores = [hit.score for hit in answer]
    assert scores == sorted(scores, reverse=True)
    assert len(set(ids(answer))) == 10


def test_only_the_top_candidates_are_re_ranked(searcher: Searcher) -> None:
    whole = searcher.search("how does bread rise", k=40)
    top = {hit.id for hit in whole if hit.retriever_rank <= 3}
    few = searcher.search("how does bread rise", k=3, depth=3)
    assert set(ids(few)) == top
    assert ids(few) == [hit.id for hit in whole if hit.id in top]


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_below_the_depth_hits_stand_in_the_order_of_the_first_stage(searcher: Searcher, mode: Mode) -> None:
    question = "how does bread rise from a starter of flour and water"
    deep, shallow = (searcher.search(question, k=10, depth=depth, mode=mode) for depth in (4, 40))
    assert sorted(hit.retriever_rank for hit in deep[:4]) == [1, 2, 3, 4]
    assert [hit.retriever_rank for hit in deep[4:]] == list(range(5, len(deep) + 1)) and len(deep) > 4
    assert all(hit.reranker_score is not None for hit in [*deep[:4], *shallow])
    assert all(hit.reranker_score is None for hit in deep[4:])
    scores = [hit.score for hit in deep]
    assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()
    # The re-ranker's order among those that it read is the one among all.
    top = {hit.id for hit in deep[:4]}
    everything = searcher.search(question, k=40, depth=40, mode=mode)
    assert ids(deep)[:4] == [hit.id for hit in everything if hit.id in top]


def test_no_more_pairs_are_read_than_the_depth(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    score = searcher.bundle.reranker.score
    monkeypatch.setattr(
        searcher.bundle.reranker, "score", lambda q, p, pairs, **o: read.append(len(pairs)) or score(q, p, pairs, **o)
    )
    assert len(searcher.search("owls", k=30, depth=7)) == 30
    assert len(with_learnt(searcher, stopping=RULE).search("owls", k=30, depth=7, stopping=1.0)) == 30
    assert read[0] == 7 and sum(read[1:]) <= 7


def test_k_is_cut_at_the_size_of_the_index(searcher: Searcher) -> None:
    answer = searcher.search("bees", k=10**9)
    assert len(answer) == 40 and len(set(ids(answer))) == 40


def test_questions_asked_together_get_the_answers_of_questions_asked_alone(searcher: Searcher) -> None:
    questions = ["owls", "what was Tokyo called before", "owls", "why must the blood group fit my own? " * 30]
    for question, together in zip(questions, searcher.search_many(questions), strict=True):
        alone = searcher.search(question)
        assert together.question == question and ids(together) == ids(alone)
        assert [hit.score for hit in together] == pytest.approx([hit.score for hit in alone], abs=1e-4)


def test_no_questions_get_no_answers(searcher: Searcher) -> None:
    assert searcher.search_many([]) == []


@pytest.mark.parametrize("question", ["\u200b", "?", "日本", "\x00", "word " * 5000, "a\nb\tc"])
def test_an_odd_question_still_gets_an_answer(searcher: Searcher, question: str) -> None:
    answer = searcher.search(question)
    assert len(answer) == 5 and np.isfinite([hit.score for hit in answer]).all()


@pytest.mark.parametrize("question", ["", "  ", "\n\t", "\u3000"])
def test_an_empty_question_is_an_error(searcher: Searcher, question: str) -> None:
    with pytest.raises(TandemError, match="The question is empty"):
        searcher.search_many(["owls", question])


def test_a_question_that_is_no_text_is_an_error(searcher: Searcher) -> None:
    with pytest.raises(TandemError, match="not valid Unicode"):
        searcher.search("caf\udce9")  # what Python makes of a Latin-1 argument


@pytest.mark.parametrize(("k", "depth", "message"), [(0, 50, "k is 0"), (-1, 50, "k is -1"), (5, -1, "depth is -1")])
def test_numbers_too_small_are_errors(searcher: Searcher, k: int, depth: int, message: str) -> None:
    with pytest.raises(TandemError, match=message):
        searcher.search("owls", k, depth)


def test_an_answer_is_a_sequence_that_tells_its_time(searcher: Searcher) -> None:
    answer = searcher.search("owls")
    assert answer[0] is answer.hits[0] and answer[-2:] == answer.hits[-2:] and answer[1] in answer
    assert list(answer.seconds) == ["retrieve", "re-rank", "read", "highlight"]
    assert all(seconds > 0 for seconds in answer.seconds.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer[0].score = 1.0  # type: ignore[misc]


def test_a_searcher_takes_an_open_index_and_a_loaded_bundle(searcher: Searcher, bundle: Bundle) -> None:
    again = Searcher(Index.open(searcher.index.folder), bundle)
    assert again.bundle is bundle and ids(again.search("owls")) == ids(searcher.search("owls"))


# What the bundle knows of its re-ranker


def warned(searcher: Searcher, depth: int = 5) -> list[str]:
    """What three searches, one of them of two questions, warn of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        searcher.search("owls", depth=depth)
        searcher.search_many(["owls", "bees"], depth=depth)
        searcher.search("owls", depth=depth)
    return [str(each.message) for each in told]


def measured(reranked: float) -> dict[str, object]:
    means = {"retriever after": 0.5, "re-ranked": reranked}
    return {"stages": {stage: {"mrr@10": {"mean": mean, "low": mean, "high": mean}} for stage, mean in means.items()}}


def test_a_reranker_that_was_not_measured_or_ranks_worse_is_warned_of_once(searcher: Searcher) -> None:
    folder = searcher.bundle.folder
    command = f"tandemqa bundle --retriever {folder} --reranker {folder} --out BUNDLE --data DATA"
    (message,) = warned(with_learnt(searcher))
    assert "was never measured on dev questions and may rank worse" in message and message.endswith(command)
    (message,) = warned(with_learnt(searcher, metrics=measured(0.4)))
    assert "re-ranking made the ranking" in message and "worse (MRR@10 0.400, that of the retriever 0.500)" in message
    assert warned(with_learnt(searcher, metrics=measured(0.5))) == []
    assert (
        warned(with_learnt(searcher, metrics=measured(0.4)), depth=0) == warned(with_learnt(searcher), depth=0) == []
    )
    assert warned(with_learnt(searcher, metrics=measured(0.4), tuned=TUNED)) == []


# Who finds the candidates


def with_learnt(searcher: Searcher, **learnt: object) -> Searcher:
    """The same search, by a bundle that learnt something on dev."""
    about = {**searcher.bundle.about, **learnt}
    return Searcher(searcher.index, dataclasses.replace(searcher.bundle, about=about))


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
@pytest.mark.parametrize("share", [None, 0.3])
def test_every_mode_ranks_its_candidates_by_both_models(
    searcher: Searcher, bundle: Bundle, dataset: Dataset, mode: Mode, share: float | None
) -> None:
    texts, questions = [passage.full for passage in dataset.passages], list(dataset.queries.values())
    retriever, reranker = bundle.retriever, bundle.reranker
    vectors = retriever.encode(retriever.tokenize(texts), "passage").astype(np.float64)
    asked = retriever.encode(retriever.tokenize(questions), "query").astype(np.float64)
    dense = Run(questions, *searcher.index.search_vectors(asked.astype(np.float32), 40))
    words = lexical(LexicalIndex.build(texts), questions, questions, 8 if mode == "bm25" else 40)
    candidates = {"dense": dense.cut(8), "bm25": words, "hybrid": fuse(dense, words, 8, share)}[mode]
    ids = reranker.tokenize(questions), reranker.tokenize(texts)
    answers = with_learnt(searcher, blend=3.0, fusion=share).search_many(questions, k=8, depth=8, mode=mode)
    for number, answer in enumerate(answers):
        rows = [row for row in candidates.rows[number].tolist() if row >= 0]
        read = reranker.score(*ids, np.array([(number, row) for row in rows]).reshape(-1, 2))
        finals = {
            row: score + 3.0 * float(vectors[row] @ asked[number]) for row, score in zip(rows, read, strict=True)
        }
        assert {hit.id for hit in answer} == {dataset.passages.ids[row] for row in rows}
        for hit in answer:
            row = dataset.passages.row[hit.id]
            assert hit.score == pytest.approx(finals[row], abs=0.02)
            assert hit.retriever_score == pytest.approx(vectors[row] @ asked[number], abs=2e-3)
            assert hit.reranker_score == pytest.approx(read[rows.index(row)], abs=1e-4)
            assert hit.retriever_rank == rows.index(row) + 1
            known = words.rows[number].tolist()
            if mode == "dense" or row not in known:
                assert hit.bm25_score is None
            else:
                assert hit.bm25_score == pytest.approx(words.scores[number, known.index(row)])


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize(("fused", "measured"), [(100, 5), (10, 20)])
def test_a_hybrid_is_the_one_that_was_measured_however_few_are_asked_for(
    searcher: Searcher,
    bundle: Bundle,
    dataset: Dataset,
    share: float | None,
    fused: int,
    measured: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """How far the two rankings go decides how their scores are scaled, and who meets whom."""
    # In the precision of the index, and with vectors of its own.
    monkeypatch.setattr(backbone, "has_bfloat16", lambda device: False)
    monkeypatch.setenv("TANDEMQA_CACHE", str(tmp_path))
    for module in ("search.candidates", "evaluation.stages"):
        monkeypatch.setattr(f"tandemqa.{module}.FUSED", fused)
    hybrid = rank_stages(bundle, dataset, "train", measured).final(Learnt(fusion=share))["hybrid"]
    questions = [dataset.queries[query_id] for query_id in hybrid.query_ids]
    answers = with_learnt(searcher, fusion=share).search_many(questions, k=5, depth=0, mode="hybrid")
    for number, answer in enumerate(answers):
        measured_at = dict(zip(hybrid.rows[number].tolist(), hybrid.scores[number].tolist(), strict=True))
        scores = [hit.score for hit in answer]
        assert scores == pytest.approx(hybrid.scores[number, :5].tolist(), abs=2e-3)
        assert scores == pytest.approx([measured_at[dataset.passages.row[name]] for name in ids(answer)], abs=2e-3)


def test_bm25_finds_nothing_without_a_shared_word(searcher: Searcher) -> None:
    answer = with_learnt(searcher, confidence=CONFIDENCE).search("zzzz", mode="bm25")
    assert len(answer) == 0 and not answer.found and answer.confidence == 0.0
    assert len(searcher.search("zzzz", mode="hybrid")) == 5


def test_an_unknown_mode_is_an_error(searcher: Searcher) -> None:
    with pytest.raises(TandemError, match="no mode 'sparse'; choose one of dense, bm25, hybrid"):
        searcher.search("owls", mode="sparse")  # type: ignore[arg-type]


# The answer


def test_each_hit_has_the_place_of_its_answer(searcher: Searcher, bundle: Bundle, dataset: Dataset) -> None:
    questions = ["what was Tokyo called before", "how does bread rise"]
    queries = bundle.retriever.tokenize(questions)
    _, tokens = bundle.retriever.encode_queries(queries)
    for number, answer in enumerate(searcher.search_many(questions, k=40)):
        passages = [dataset.passages[dataset.passages.row[hit.id]] for hit in answer]
        expected = best_sentences(bundle.retriever, queries, tokens, passages, [number] * 40)
        assert [(hit.answer_start, hit.answer_end) for hit in answer] == expected
        assert all(hit.answer and hit.answer == hit.text[hit.answer_start : hit.answer_end] for hit in answer)


CONFIDENCE = {"slope": 2.0, "offset": -1.0, "threshold": 0.4}


def test_the_confidence_is_that_of_the_first_hit(searcher: Searcher) -> None:
    for answer in with_learnt(searcher, confidence=CONFIDENCE).search_many(["owls", "bees", "why do prices rise"]):
        assert answer.confidence == pytest.approx(1 / (1 + np.exp(-(2.0 * answer[0].score - 1.0))))
        assert answer.found == (answer.confidence >= 0.4)
    answer = searcher.search("owls")
    assert answer.confidence is None and answer.found


def test_nonsense_in_the_manifest_is_an_error(searcher: Searcher) -> None:
    with pytest.raises(TandemError, match=r"tandem\.json: confidence\.slope is not valid"):
        with_learnt(searcher, confidence={**CONFIDENCE, "slope": "steep"})


# Stopping early


RULE = {"best": -1.0, "own": 0.0, "lead": 0.0, "ahead": 0.0, "read": 0.0, "offset": 0.0, "curve": []}


def test_what_was_not_read_stands_behind_in_the_order_of_the_candidates(searcher: Searcher) -> None:
    early = with_learnt(searcher, stopping=RULE)
    questions = ["owls", "what was Tokyo called before", "how does bread rise"]
    for question, together in zip(questions, early.search_many(questions, k=40, stopping=1.0), strict=True):
        read = [hit for hit in together if hit.reranker_score is not None]
        left = [hit for hit in together if hit.reranker_score is None]
        assert 4 <= len(read) < 40 and list(together) == [*read, *left]
        assert sorted(hit.retriever_rank for hit in read) == list(range(1, len(read) + 1))
        assert [hit.retriever_rank for hit in left] == list(range(len(read) + 1, 41))
        scores = [hit.score for hit in together]
        assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()
        alone = early.search(question, k=40, stopping=1.0)
        assert ids(alone) == ids(together)


@pytest.mark.parametrize("blend", [0.0, 5.0])
def test_reading_stops_by_the_similarity_of_what_is_left_whatever_its_weight(
    searcher: Searcher, blend: float
) -> None:
    whole = sorted(searcher.search("how does bread rise", k=40), key=lambda hit: hit.retriever_rank)
    similarity = [hit.retriever_score for hit in whole]
    middle = (similarity[11] + similarity[12]) / 2  # what is left is more similar than this until 12 are read
    rule = {**RULE, "best": 0.0, "ahead": 1e7, "offset": -1e7 * middle}
    early = with_learnt(searcher, blend=blend, stopping=rule).search("how does bread rise", k=40, stopping=0.5)
    assert sum(hit.reranker_score is not None for hit in early) == 12


def test_stopping_zero_reads_all(searcher: Searcher) -> None:
    early = with_learnt(searcher, stopping=RULE)
    assert ids(early.search("owls", k=40)) == ids(searcher.search("owls", k=40))
    assert all(hit.reranker_score is not None for hit in early.search("owls", k=40))


def test_a_bundle_that_did_not_learn_to_stop_says_so(searcher: Searcher) -> None:
    with pytest.raises(TandemError, match="did not learn when to stop"):
        searcher.search("owls", stopping=0.1)
    with pytest.raises(TandemError, match=r"stopping is 1\.5; it goes from 0"):
        searcher.search("owls", stopping=1.5)


# Any question at all


ODD = {
    "one letter": "a",
    "one mark": "?",
    "no width": "\u200b",
    "a hundred thousand letters": "x" * 100_000,
    "a hundred thousand characters of words": "why do prices rise " * 5_263,
    "emoji": "👩‍👩‍👧 🦉🏽?",
    "right to left": "ما هي عاصمة اليابان؟ \u202eabc",
    "controls": "\x1b[2J owls \x07\x08\r\n\t",
    "a nul": "\x00",
    "nul among words": "owls\x00fly",
    "half a pair of accents": "e\u0301\u0301\u0301",
    "outside the plane": "𝔬𝔴𝔩 𠮷",
}


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
@pytest.mark.parametrize("question", ODD.values(), ids=ODD.keys())
def test_no_question_is_too_odd(searcher: Searcher, question: str, mode: Mode) -> None:
    answer = searcher.search(question, k=100, depth=1, mode=mode)
    assert answer.question == question and len(answer) == (40 if mode != "bm25" else len(set(ids(answer))))
    assert np.isfinite([(hit.score, hit.retriever_score) for hit in answer]).all()
    assert [hit.reranker_score is not None for hit in answer] == [place == 0 for place in range(len(answer))]
