"""The sentence of a passage that answers, and where it stands."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import CORPUS
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from tandemqa.data.dataset import Passage
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.search.highlight import BEHIND, FEW, MOST, best_sentences, likely_sentences, sentence_scores
from tandemqa.search.sentences import LONGEST, sentences


@pytest.fixture(scope="module")
def retriever(tiny_model: Path) -> DualEncoder:
    return DualEncoder.load(RetrieverConfig(model=str(tiny_model)))


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


# Sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Owl flies. He makes no sound! Why?", ["Dr. Owl flies.", "He makes no sound!", "Why?"]),
        ("  It is 3.5 m long.\n\nA new paragraph.  ", ["It is 3.5 m long.", "A new paragraph."]),
        ("東京は首都です。江戸と呼ばれた。", ["東京は首都です。", "江戸と呼ばれた。"]),
        ("مرحبا بك؟ كيف حالك.", ["مرحبا بك؟", "كيف حالك."]),
        ("यह एक है। दूसरा वाक्य।", ["यह एक है।", "दूसरा वाक्य।"]),
        ("A 👍🏽 first. A 𝔘𝔫𝔦 second.", ["A 👍🏽 first.", "A 𝔘𝔫𝔦 second."]),
        ("no full stop", ["no full stop"]),
        ("a\x00b.", ["a\x00b."]),
        (" \n\t\u3000 ", []),
        ("", []),
    ],
)
def test_a_text_is_cut_into_its_sentences(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


@given(
    st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" .!?\n。؟")), max_size=900)
)
def test_sentences_are_in_order_apart_trimmed_and_all_there_is(text: str) -> None:
    spans = list(sentences(text))
    assert all(0 < end - start <= LONGEST for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(text[start:end] == text[start:end].strip() for start, end in spans)
    kept = "".join(text[start:end] for start, end in spans)
    assert "".join(kept.split()) == "".join(text.split())


def test_a_text_without_full_stops_is_cut_at_spaces() -> None:
    pieces = cut("word " * 500)
    assert len(pieces) > 5 and all(set(piece.split()) == {"word"} for piece in pieces)
    assert [len(piece) for piece in cut("x" * 1000)] == [400, 400, 200]


# The one that answers


def answers(
    retriever: DualEncoder, questions: list[str], passages: list[Passage], own: list[int]
) -> list[tuple[int, int]]:
    queries = retriever.tokenize(questions)
    return best_sentences(retriever, queries, retriever.encode_queries(queries)[1], passages, own)


def test_a_score_is_the_mean_of_the_best_cosines_of_the_query_tokens(
    retriever: DualEncoder, tiny_model: Path
) -> None:
    """Against transformers itself, in float64, one text at a time."""
    model, tokenizer = AutoModel.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)

    def states(text: str) -> np.ndarray:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        vectors = model(**inputs).last_hidden_state[0, 1:-1].detach().numpy().astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    questions = ["why do prices rise", "what was Tokyo called before"]
    texts = ["Inflation More money chases the same goods.", "Edo it was.", "Recursion " * 200]
    own = np.array([0, 1, 0])
    _, query_tokens = retriever.encode_queries(retriever.tokenize(questions))
    scores = sentence_scores(retriever, query_tokens, retriever.tokenize(texts), own)
    for number, text in enumerate(texts):
        cosines = states(questions[own[number]]) @ states(text).T
        assert scores[number] == pytest.approx(cosines.max(axis=1).mean(), abs=0.02)  # bfloat16 where there is


def test_a_sentence_that_says_the_question_is_the_answer(retriever: DualEncoder) -> None:
    text = "Ants lay a trail of scent. When more money chases the same goods, prices rise.  Owls are quiet."
    passages = [Passage("a", "", text), Passage("b", "Inflation", text)]
    spans = answers(retriever, ["more money chases the same goods", "ants lay a trail"], passages, [0, 1])
    assert [text[start:end] for start, end in spans] == [
        "When more money chases the same goods, prices rise.",
        "Ants lay a trail of scent.",
    ]


@pytest.mark.parametrize("behind", [BEHIND, 2.0])  # all are within 2: FEW alone decides
def test_the_likely_sentences_are_those_nearest_by_their_embeddings(
    retriever: DualEncoder, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, behind: float
) -> None:
    """By hand, from the table of transformers' own model, in float64."""
    monkeypatch.setattr("tandemqa.search.highlight.BEHIND", behind)
    table = AutoModel.from_pretrained(tiny_model).get_input_embeddings().weight.detach().numpy().astype(np.float64)
    table /= np.maximum(1e-12, np.linalg.norm(table, axis=1, keepdims=True))  # padding has none
    questions = retriever.tokenize(["why do prices rise", "what was Tokyo called before"])
    own, texts, of = [0, 1, 0, 1], [], []
    for passage in range(4):
        for _, text, _ in CORPUS[10 * passage : 10 * passage + (10, 7, 1, 0)[passage]]:
            texts.append(text)
            of.append(passage)
    texts[3] = "\u200b"  # no token
    ids = retriever.tokenize(texts)
    found = likely_sentences(retriever, questions, ids, np.array(of), own)
    for passage, row in enumerate(own):
        numbers = [number for number in range(len(of)) if of[number] == passage]
        scores = {}
        for number in numbers:
            cosines = table[questions[row]] @ table[ids[number]].T
            scores[number] = cosines.max(axis=1).mean() if len(ids[number]) else -1.0
        best = sorted(numbers, key=lambda number: -scores[number])[:FEW]
        assert [n for n in numbers if found[n]] == sorted(n for n in best if scores[n] >= scores[best[0]] - behind)
    assert 2 <= found.sum() < len(texts)


def test_only_likely_sentences_are_read_and_one_alone_is_not(
    retriever: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["When prices rise, more money chases the same goods. Owls are quiet. Bees dance.", "Owls fly.", ""]
    passages = [Passage(str(number), "", text) for number, text in enumerate(texts)]
    read: list[int] = []

    def scores(retriever: object, query_tokens: object, texts: list[object], own: np.ndarray) -> np.ndarray:
        read.append(len(texts))
        return np.arange(len(texts), dtype=np.float32)  # the last is the best

    monkeypatch.setattr("tandemqa.search.highlight.sentence_scores", scores)
    for behind, expected, count in ((0.0, texts[0][:51], 0), (2.0, "Bees dance.", 3)):
        monkeypatch.setattr("tandemqa.search.highlight.BEHIND", behind)
        spans = answers(retriever, ["more money chases the same goods"], passages, [0, 0, 0])
        assert texts[0][slice(*spans[0])] == expected and spans[1:] == [(0, 9), (0, 0)] and read[-1] == count


def test_passages_without_text_have_an_empty_answer(retriever: DualEncoder) -> None:
    passages = [Passage("a", "Title", ""), Passage("b", "", " \n"), Passage("c", "", "One. Two.")]
    spans = answers(retriever, ["two"], passages, [0, 0, 0])
    assert spans[:2] == [(0, 0), (0, 0)] and spans[2] in [(0, 4), (5, 9)]
    assert answers(retriever, [], [], []) == []


def test_a_question_without_a_token_still_gets_a_sentence(retriever: DualEncoder) -> None:
    (span,) = answers(retriever, ["\u200b"], [Passage("a", "", "One. Two.")], [0])
    assert span == (0, 4)


def test_only_the_first_sentences_of_a_book_are_looked_at(retriever: DualEncoder) -> None:
    text = "Nothing here. " * MOST + "Owls fly without a sound."
    ((start, _),) = answers(retriever, ["owls fly"], [Passage("a", "", text)], [0])
    assert start < text.index("Owls")
