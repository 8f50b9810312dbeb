"""Leaks: found where they were put; near-duplicates against the comparison of all pairs; what the command says."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tandemqa.cli import app
from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.leaks import Leaks, UnjudgedCopies, find_leaks
from tandemqa.data.similar import SimilarTexts, normalised
from tandemqa.errors import TandemError

PASSAGES = [
    ("p1", "Kettle", "Water boils in it."),
    ("p2", "", "Steam lifts the lid."),
    ("p3", "Bread", "Flour, water and time."),
]


def write_dataset(
    folder: Path,
    questions: dict[str, dict[str, str]],
    passages: list[tuple[str, str, str]] = PASSAGES,
    qrels: dict[str, dict[str, int]] | None = None,
) -> Path:
    """A dataset of split -> query id -> text; a question without `qrels` of its own is answered by p2."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": name, "title": title, "text": text}) for name, title, text in passages]
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    texts = {query: text for split in questions.values() for query, text in split.items()}
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": query, "text": text}) for query, text in texts.items())
    )
    for split, asked in questions.items():
        grades = {query: (qrels or {}).get(query, {"p2": 1}) for query in asked}
        (folder / "qrels" / f"{split}.tsv").write_text(
            "".join(f"{query}\t{passage}\t{grade}\n" for query in asked for passage, grade in grades[query].items())
        )
    return folder


def run(*arguments: object) -> Any:
    """The command in this process; what it raised, other than an exit, is raised again."""
    result = CliRunner().invoke(app, ["leaks", *map(str, arguments)], env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# Questions that were trained on


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("How hot is steam?", "how hot IS steam", id="case and punctuation"),
        pytest.param("How hot is steam", "  How\thot  is\nsteam ", id="whitespace"),
        pytest.param("How hot - is steam", "how hot is “steam”…", id="a dash and quotes of any kind"),
        pytest.param("Ｈｏｗ ｈｏｔ", "How hot", id="full width letters"),
        pytest.param("caf\u00e9", "cafe\u0301", id="an accent composed or not"),
        pytest.param("STRASSE", "straße", id="letters whose case changes their number"),
        pytest.param("well-known", "well known", id="a hyphen"),
    ],
)
def test_texts_are_the_same_but_for(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param("what is C++", "what is C", id="a sign that is no punctuation"),
        pytest.param("कि", "का", id="vowel signs"),
        pytest.param("resume", "résumé", id="accents"),
        pytest.param("type 1", "type 2", id="numbers"),
    ],
)
def test_texts_differ_by(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_repeated_and_similar_questions_are_found(tmp_path: Path) -> None:
    questions = {
        "train": {
            "t1": "Why does the lid of a kettle rattle?",
            "t2": "How long must bread dough rise in the cold?",
            "t3": "Which flour is best?",
        },
        "test": {
            "s1": "why does the lid of a kettle rattle",
            "s2": "How long must bread dough rise in the cold, then?",
            "s3": "Who was first on the moon?",
        },
        "dev": {"d1": "which flour is best??"},
    }
    dataset = load_dataset(write_dataset(tmp_path / "data", questions))
    found = find_leaks(dataset)
    assert (found.split, found.questions, found.training_questions) == ("test", 3, 3)
    (repeat,) = found.repeated
    assert (repeat.query, repeat.training_query, repeat.similarity) == ("s1", "t1", 1.0)
    assert (repeat.question, repeat.training_question) == (questions["test"]["s1"], questions["train"]["t1"])
    (near,) = found.similar
    assert (near.query, near.training_query) == ("s2", "t2")
    # Without its punctuation t2 has 42 characters and 38 grams; " then" adds five.
    assert near.similarity == 38 / 43
    assert [each.query for each in find_leaks(dataset, "dev").repeated] == ["d1"]


def test_only_questions_with_a_positive_count(tmp_path: Path) -> None:
    questions = {
        "train": {"t1": "Is it hot?", "t2": "Is it cold?"},
        "test": {"s1": "is it hot", "s2": "is it cold", "s3": "is it warm"},
    }
    qrels = {"t1": {"p1": 0}, "s2": {"p2": 0}}
    found = find_leaks(load_dataset(write_dataset(tmp_path / "data", questions, qrels=qrels)))
    assert (found.questions, found.training_questions, found.repeated) == (2, 1, [])


@pytest.mark.parametrize("split", ["train", "test"])
def test_nothing_is_held_against_a_split_without_training_questions(tmp_path: Path, split: str) -> None:
    dataset = load_dataset(write_dataset(tmp_path / "data", {split: {"q1": "Is it hot?", "q2": "is it hot"}}))
    found = find_leaks(dataset, split)
    assert (found.questions, found.training_questions, found.repeated, found.similar) == (2, 0, [], [])


# Near-duplicates


def grams(text: str) -> set[str]:
    return {text[start : start + 5] for start in range(len(text) - 4)} or {text}


def most_similar_of_all(texts: list[str], text: str) -> tuple[int, float] | None:
    shares = [len(grams(text) & grams(other)) / len(grams(text) | grams(other)) for other in texts]
    best = max(shares, default=0.0)
    return (shares.index(best), best) if best >= 0.8 else None


words = st.lists(st.sampled_from(["a", "bread", "breads", "kettle", "of", "steam"]), min_size=1, max_size=12)
phrases = words.map(" ".join)


@settings(max_examples=200)
@given(st.lists(phrases, max_size=12), phrases)
def test_the_most_similar_text_is_the_one_that_comparing_all_finds(texts: list[str], text: str) -> None:
    assert SimilarTexts(texts).most_similar(text) == most_similar_of_all(texts, text)


@pytest.mark.parametrize("size", [*range(1, 12), 20, 35, 60])
def test_texts_that_reach_the_threshold_exactly_are_found(size: int) -> None:
    """A text of n different 5-grams, and its beginning of 0.8 n of them, rounded up."""
    whole = "".join(chr(0x4E00 + number) for number in range(size + 4))
    part = whole[: -(-4 * size // 5) + 4]
    assert (len(grams(whole)), len(grams(part))) == (size, -(-4 * size // 5))
    assert SimilarTexts([whole]).most_similar(part) == (0, len(grams(part)) / size)
    assert SimilarTexts([part]).most_similar(whole) == (0, len(grams(part)) / size)


def test_fifteen_thousand_questions_take_seconds_even_when_made_from_templates(tmp_path: Path) -> None:
    letters = random.Random(0)
    names = ["".join(letters.choices("abcdefghijklmnop", k=letters.randint(5, 14))) for _ in range(5000)]
    templates = ["What are the symptoms of {}?", "How is {} treated?", "Is {} inherited from the parents?"]
    asked = [template.format(name) for name in names for template in templates]
    questions = {
        "train": {f"t{number}": text for number, text in enumerate(asked[:13_000])},
        "test": {f"s{number}": text for number, text in enumerate(asked[13_000:])},
    }
    dataset = load_dataset(write_dataset(tmp_path / "data", questions))
    started = time.process_time()
    found = find_leaks(dataset)
    assert time.process_time() - started < 10
    assert found.questions == 2000


def test_texts_from_one_template_are_not_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand texts of which each is nearly every other."""
    cut = 0

    def counted(text: str) -> set[str]:
        nonlocal cut
        cut += 1
        return grams(text)

    monkeypatch.setattr("tandemqa.data.similar._grams", counted)
    texts = [f"ticket {number}: what did the customer ask for, and when will it be there?" for number in range(1000)]
    similar = SimilarTexts(texts)
    cut = 0
    for number in range(1000, 1100):
        assert similar.most_similar(texts[0].replace("0", str(number))) is not None
    assert cut <= 100 * 101


# Titles that give the answer away


@pytest.mark.parametrize(
    ("question", "title", "named"),
    [
        pytest.param("What is a kettle?", "Kettle", True, id="the question holds the title"),
        pytest.param("Kettle!", "Kettle", True, id="the question is the title"),
        pytest.param("what about the TEA kettle", "Tea-kettle", True, id="but for case and punctuation"),
        pytest.param("What is a kettledrum?", "Kettle", False, id="a part of a word"),
        pytest.param("What is a kettle?", "Copper kettle", False, id="a part of the title"),
        pytest.param("What is a kettle?", "", False, id="no title"),
        pytest.param("What is a kettle?", "?!", False, id="a title of punctuation"),
        pytest.param("What is bread?", "Bread", False, id="a title that another passage has"),
    ],
)
def test_a_title_tells_when(tmp_path: Path, question: str, title: str, named: bool) -> None:
    passages = [("p1", title, "Water boils in it."), ("p2", "bread.", "Flour."), ("p3", "", "Steam.")]
    folder = write_dataset(tmp_path / "data", {"test": {"s1": question}}, passages, {"s1": {"p3": 1, "p1": 1}})
    found = find_leaks(load_dataset(folder)).titles
    assert [(each.query, each.positive, each.title) for each in found] == [("s1", "p1", title)] * named


def test_the_title_of_a_passage_that_is_no_positive_tells_nothing(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"test": {"s1": "A kettle"}}, qrels={"s1": {"p1": 0, "p2": 1}})
    assert find_leaks(load_dataset(folder)).titles == []


# Copies that are not judged


@pytest.mark.parametrize(
    ("grades", "copies"),
    [
        pytest.param({"p1": 1}, [("p1", ["p2", "p3"])], id="none of them judged"),
        pytest.param({"p1": 1, "p2": 0}, [("p1", ["p2", "p3"])], id="one judged no positive"),
        pytest.param({"p1": 1, "p3": 2}, [("p1", ["p2"]), ("p3", ["p2"])], id="one still missing"),
        pytest.param({"p1": 1, "p2": 1, "p3": 1}, [], id="all judged positive"),
        pytest.param({"p4": 1}, [], id="the same text under another title"),
    ],
)
def test_copies_of_a_positive_are_found(
    tmp_path: Path, grades: dict[str, int], copies: list[tuple[str, list[str]]]
) -> None:
    text = "It is passed on by either parent."
    passages = [("p1", "", text), ("p2", "", text), ("p3", "", text.replace(" ", "\n ")), ("p4", "Hair", text)]
    folder = write_dataset(tmp_path / "data", {"test": {"s1": "Who?"}}, passages, {"s1": grades})
    assert find_leaks(load_dataset(folder)).copies == [
        UnjudgedCopies("s1", "Who?", positive, others) for positive, others in copies
    ]


# The command


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """Eight test questions: seven are training questions too, the positive of the eighth has a copy."""
    asked = [f"Why is number {number} so large?" for number in ("one", "two", "three", "four", "five", "six")]
    questions = {
        "train": {"t0": "What is a kettle?", **{f"t{n}": text for n, text in enumerate(asked, start=1)}},
        "test": {"s0": "what is a kettle", **{f"s{n}": text.lower() for n, text in enumerate(asked, start=1)}},
        "dev": {"d0": "Nothing alike \x1b[31m here"},
    }
    passages = [
        *PASSAGES,
        ("p4", "Kettle", "Another.\x1b[0m"),
        ("p5", "Odd kettle", "Lid."),
        ("p6", "Odd  kettle", "Lid."),
    ]
    questions["test"]["s9"] = "Which odd kettle?"
    qrels = {"s9": {"p5": 1}}
    return write_dataset(tmp_path / "leaky", questions, passages, qrels)


def test_the_command_counts_advises_and_shows_five_of_each(leaky: Path) -> None:
    result = run(leaky)
    assert result.exit_code == 0
    blocks = [block.splitlines() for block in result.stdout.strip().split("\n\n")]
    assert blocks[0] == ["8 test questions, 7 training questions"]
    assert blocks[1][0] == "7 (87.5%) are training questions too, word for word."
    assert blocks[1][1].startswith("Take them out of one of the two splits")
    assert blocks[1][2:4] == ["  s0: what is a kettle", "    t0: What is a kettle?"]
    assert len(blocks[1]) == 2 + 2 * 5
    assert blocks[2] == ["0 (0.0%) are nearly the same as a training question."]
    assert blocks[3] == ["0 (0.0%) name the title of their positive, which no other passage has."]
    assert blocks[4][0].startswith("1 (12.5%) have a positive whose text stands under other ids")
    assert blocks[4][2:] == ["  s9: Which odd kettle?", "    p5 = p6"]


def test_the_command_prints_one_json_document_with_all(leaky: Path) -> None:
    document = json.loads(run(leaky, "--json").stdout)
    assert document == find_leaks(load_dataset(leaky)).as_json()
    assert (document["split"], document["questions"], document["training_questions"]) == ("test", 8, 7)
    assert document["repeated"]["questions"] == 7 and len(document["repeated"]["found"]) == 7
    assert document["repeated"]["share"] == 7 / 8
    assert document["copies"]["found"] == [
        {"query": "s9", "question": "Which odd kettle?", "positive": "p5", "copies": ["p6"]}
    ]
    assert document["similar"] == document["titles"] == {"questions": 0, "share": 0.0, "found": []}


def test_a_question_with_two_copied_positives_counts_once() -> None:
    copies = [UnjudgedCopies("q", "Who?", positive, ["p9"]) for positive in ("p1", "p2")]
    document = Leaks("test", 4, 0, [], [], [], copies).as_json()
    assert (document["copies"]["questions"], document["copies"]["share"]) == (1, 0.25)


def test_nothing_in_a_question_steers_the_terminal(tmp_path: Path) -> None:
    questions = {"train": {"t1": "Hot\x1b[31m?"}, "test": {"s1": "hot\x1b[31m"}}
    result = run(write_dataset(tmp_path / "data", questions))
    assert "s1: hot" in result.stdout and "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["gone"], "gone is not a folder", id="a folder that is not there"),
        pytest.param(
            ["leaky", "--split", "x"], "has no split 'x'; choose one of dev, test, train", id="no such split"
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(leaky: Path, arguments: list[str], named: str) -> None:
    result = run(leaky.parent / arguments[0], *arguments[1:])
    assert result.exit_code == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and named in last


def test_a_split_without_a_positive_is_refused(tmp_path: Path) -> None:
    dataset: Dataset = load_dataset(write_dataset(tmp_path / "d", {"test": {"s": "Who?"}}, qrels={"s": {"p1": 0}}))
    with pytest.raises(TandemError, match="has no positive"):
        find_leaks(dataset)
