"""The sentence of a passage that answers, and where it stands."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from tandemqa.data.dataset import Passage
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.search.highlight import MOST, best_sentences, sentence_scores
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
    spans = sentences(text)
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
    ids = retriever.tokenize(questions), retriever.tokenize(texts)
    scores = sentence_scores(retriever, *ids, own)
    for number, text in enumerate(texts):
        cosines = states(questions[own[number]]) @ states(text).T
        assert scores[number] == pytest.approx(cosines.max(axis=1).mean(), abs=0.02)  # bfloat16 where there is


def test_a_sentence_that_says_the_question_is_the_answer(retriever: DualEncoder) -> None:
    text = "Ants lay a trail of scent. When more money chases the same goods, prices rise.  Owls are quiet."
    passages = [Passage("a", "", text), Passage("b", "Inflation", text)]
    queries = retriever.tokenize(["more money chases the same goods", "ants lay a trail"])
    spans = best_sentences(retriever, queries, passages, [0, 1])
    assert [text[start:end] for start, end in spans] == [
        "When more money chases the same goods, prices rise.",
        "Ants lay a trail of scent.",
    ]


def test_passages_without_text_have_an_empty_answer(retriever: DualEncoder) -> None:
    passages = [Passage("a", "Title", ""), Passage("b", "", " \n"), Passage("c", "", "One. Two.")]
    spans = best_sentences(retriever, retriever.tokenize(["two"]), passages, [0, 0, 0])
    assert spans[:2] == [(0, 0), (0, 0)] and spans[2] in [(0, 4), (5, 9)]
    assert best_sentences(retriever, [], [], []) == []


def test_a_question_without_a_token_still_gets_a_sentence(retriever: DualEncoder) -> None:
    (span,) = best_sentences(retriever, retriever.tokenize(["\u200b"]), [Passage("a", "", "One. Two.")], [0])
    assert span == (0, 4)


def test_only_the_first_sentences_of_a_book_are_looked_at(retriever: DualEncoder) -> None:
    text = "Nothing here. " * MOST + "Owls fly without a sound."
    ((start, _),) = best_sentences(retriever, retriever.tokenize(["owls fly"]), [Passage("a", "", text)], [0])
    assert start < text.index("Owls")
