"""The demo's dataset: enough questions, split by topic, each with passages of this Python."""

import logging
from collections import Counter

import pytest

from tandemqa import load_dataset
from tandemqa.demo.corpus import build_passages, clean_passages, weak_pairs
from tandemqa.demo.dataset import load_questions, split_by_topic, write_datasets


@pytest.fixture(scope="module")
def passages():
    return clean_passages()


@pytest.fixture(scope="module")
def splits(passages):
    return split_by_topic(load_questions({passage.id for passage in passages}))


def test_there_are_enough_questions(splits):
    assert sum(map(len, splits.values())) >= 400
    assert len(splits["test"]) >= 150


def test_no_topic_passage_or_question_stands_in_two_splits(splits):
    for of in (lambda q: {q.topic}, lambda q: set(q.passages), lambda q: {q.text.lower()}):
        seen = {name: set().union(*map(of, questions)) for name, questions in splits.items()}
        assert not seen["train"] & seen["dev"] | seen["train"] & seen["test"] | seen["dev"] & seen["test"]


def test_no_question_is_asked_twice(splits):
    texts = Counter(question.text.lower() for questions in splits.values() for question in questions)
    assert [text for text, count in texts.items() if count > 1] == []


def test_questions_do_not_name_their_passage(splits):
    for questions in splits.values():
        for question in questions:
            for name in question.passages:
                assert name.startswith("topics/") or f" {name} " not in f" {question.text} ", question


def test_passages_are_the_same_every_time_and_have_distinct_ids(passages):
    assert clean_passages() == passages
    assert len({passage.id for passage in passages}) == len(passages) > 4000
    docstrings = [passage for passage in passages if not passage.id.startswith("topics/")]
    assert not any(" at 0x" in passage.text for passage in docstrings)


def test_what_other_libraries_add_to_the_standard_library_is_no_passage(passages, monkeypatch):
    def shout(self) -> None:
        """Say it louder than any other method of a logger would."""

    monkeypatch.setattr(logging.Logger, "shout", shout, raising=False)
    assert "logging.Logger.shout" in {passage.id for passage in build_passages()}, "the trap is set"
    assert clean_passages() == passages


def test_a_weak_pair_does_not_give_its_summary_away(passages):
    pairs = weak_pairs(passages)
    assert len(pairs) > 1000
    assert not [summary for summary, _, body in pairs if summary in body]


def test_the_datasets_are_whole_and_read_back(tmp_path):
    questions, docstrings = (load_dataset(folder) for folder in write_datasets(tmp_path))
    assert set(questions.qrels) == {"train", "dev", "test"}
    assert set(docstrings.qrels) == {"train"}
