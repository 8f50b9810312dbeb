"""What makes the figures of a dataset too good or too bad: repeated questions, telling titles, unjudged copies."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.dataset import Dataset, Passage, Passages
from tandemqa.data.qrels import Qrels
from tandemqa.data.similar import SimilarTexts, normalised
from tandemqa.progress import track
from tandemqa.wording import counted

TRAIN = "train"
EXAMPLES = 5
SHOWN_WIDTH = 100
# What each kind of finding says of its questions, and what to do.
ADVICE = {
    "repeated": (
        "are training questions too, word for word",
        "Take them out of one of the two splits: a model may know their answers by heart.",
    ),
    "similar": (
        "are nearly the same as a training question",
        "Read them, and keep those that ask the same in one split.",
    ),
    "titles": (
        "name the title of their positive, which no other passage has",
        "Matching titles answers these: measure without titles too before trusting the figures.",
    ),
    "copies": (
        "have a positive whose text stands under other ids that are no positives",
        "Judge the copies as positives, or keep one id for each text: a model that ranks a copy is marked wrong.",
    ),
}


@dataclass(frozen=True)
class Repeat:
    """A question and the training question most like it; similarity is the Jaccard index of their 5-grams."""

    query: str
    question: str
    training_query: str
    training_question: str
    similarity: float

    def __str__(self) -> str:
        return _shown(self.query, self.question, f"{self.training_query}: {self.training_question}")


@dataclass(frozen=True)
class TellingTitle:
    """A question that holds the title of its positive, a title that no other passage has."""

    query: str
    question: str
    positive: str
    title: str

    def __str__(self) -> str:
        return _shown(self.query, self.question, f"{self.positive}: {self.title}")


@dataclass(frozen=True)
class UnjudgedCopies:
    """A positive of a question, and the passages of identical text that are not judged positive for it."""

    query: str
    question: str
    positive: str
    copies: list[str]

    def __str__(self) -> str:
        return _shown(self.query, self.question, f"{self.positive} = {', '.join(self.copies)}")


@dataclass(frozen=True)
class Leaks:
    """What `find_leaks` found among the `questions` of `split`, held against `training_questions`.

    At most one finding a question; of copies, one a positive.
    """

    split: str
    questions: int
    training_questions: int
    repeated: list[Repeat]
    similar: list[Repeat]
    titles: list[TellingTitle]
    copies: list[UnjudgedCopies]

    def as_json(self) -> dict[str, Any]:
        """Every finding, and for each kind the number of questions and their share."""
        kinds = {
            kind: {
                "questions": _questions(found),
                "share": _questions(found) / self.questions,
                "found": [asdict(each) for each in found],
            }
            for kind, found in self._kinds().items()
        }
        return {
            "split": self.split,
            "questions": self.questions,
            "training_questions": self.training_questions,
            **kinds,
        }

    def text(self) -> str:
        """For each kind of finding the number of questions, what to do, and a few examples."""
        asked, trained = (self.questions, f"{self.split} question"), (self.training_questions, "training question")
        lines = [f"{counted(*asked)}, {counted(*trained)}"]
        for kind, found in self._kinds().items():
            what, advice = ADVICE[kind]
            count = _questions(found)
            lines += ["", f"{count:,} ({count / self.questions:.1%}) {what}."]
            if found:
                lines += [advice, *map(str, found[:EXAMPLES])]
        return "\n".join(lines)

    def _kinds(self) -> dict[str, Sequence[Repeat | TellingTitle | UnjudgedCopies]]:
        return {"repeated": self.repeated, "similar": self.similar, "titles": self.titles, "copies": self.copies}


def find_leaks(dataset: Dataset, split: str = "test") -> Leaks:
    """Check the questions of `split` that have a positive.

    Questions and titles are compared without case, punctuation, whitespace and the forms of Unicode; a title counts
    as named where a question holds it as whole words. Copies are passages whose title and text are the same but for
    whitespace. Without a split `train`, or for it, no questions are held against it.

    A split that is missing, or has no positive, is a `TandemError`.
    """
    positives = _positives(dataset.judged(split))
    training = [] if split == TRAIN else list(_positives(dataset.qrels.get(TRAIN, {})))
    repeated, similar = _repeats(dataset.queries, list(positives), training)
    with_title, with_text = _shared(dataset.passages)
    return Leaks(
        split,
        len(positives),
        len(training),
        repeated,
        similar,
        _telling_titles(dataset, positives, with_title),
        _unjudged_copies(dataset, positives, with_text),
    )


class _Rows:
    """The rows of the passages by one of their texts, given as the hash of each, int64 (n,)."""

    def __init__(self, hashes: NDArray[np.int64]) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def of(self, text: str) -> list[int]:
        first = np.searchsorted(self._hashes, hash(text), side="left")
        end = np.searchsorted(self._hashes, hash(text), side="right")
        rows: list[int] = self._order[first:end].tolist()
        return rows


def _positives(qrels: Qrels) -> dict[str, list[str]]:
    """Query id -> ids of its positives, for the queries that have any."""
    positives = {
        query: [passage for passage, grade in grades.items() if grade > 0] for query, grades in qrels.items()
    }
    return {query: passages for query, passages in positives.items() if passages}


def _repeats(
    queries: Mapping[str, str], checked: Sequence[str], training: Sequence[str]
) -> tuple[list[Repeat], list[Repeat]]:
    """Those of the `checked` questions that are training questions, and those that nearly are."""
    known: dict[str, str] = {}
    for query in training:
        known.setdefault(normalised(queries[query]), query)
    texts = SimilarTexts(list(known))
    repeated, similar = [], []
    for query in track(checked, "compare", len(checked), "question"):
        text = normalised(queries[query])
        if text in known:
            repeated.append(Repeat(query, queries[query], known[text], queries[known[text]], 1.0))
        elif nearest := texts.most_similar(text):
            row, similarity = nearest
            other = known[texts.texts[row]]
            similar.append(Repeat(query, queries[query], other, queries[other], similarity))
    return repeated, similar


def _shared(passages: Passages) -> tuple[_Rows, _Rows]:
    """The rows by normalised title, and by title and text as they stand."""
    hashes = np.empty((2, len(passages)), dtype=np.int64)
    for row, passage in enumerate(track(passages, "read", len(passages), "passage")):
        hashes[:, row] = hash(normalised(passage.title)), hash(_whole(passage))
    return _Rows(hashes[0]), _Rows(hashes[1])


def _telling_titles(dataset: Dataset, positives: Mapping[str, list[str]], with_title: _Rows) -> list[TellingTitle]:
    found: dict[str, TellingTitle] = {}
    for query, passages in positives.items():
        question = f" {normalised(dataset.queries[query])} "
        for passage in passages:
            title = dataset.passages[dataset.passages.row[passage]].title
            words = normalised(title)
            if words and f" {words} " in question and len(with_title.of(words)) == 1:
                found.setdefault(query, TellingTitle(query, dataset.queries[query], passage, title))
    return list(found.values())


def _unjudged_copies(dataset: Dataset, positives: Mapping[str, list[str]], with_text: _Rows) -> list[UnjudgedCopies]:
    found = []
    for query, passages in positives.items():
        for passage in passages:
            rows = with_text.of(_whole(dataset.passages[dataset.passages.row[passage]]))
            copies = [dataset.passages.ids[row] for row in rows if dataset.passages.ids[row] not in passages]
            if copies:
                found.append(UnjudgedCopies(query, dataset.queries[query], passage, copies))
    return found


def _whole(passage: Passage) -> str:
    return " ".join(passage.full.split())


def _questions(found: Sequence[Repeat | TellingTitle | UnjudgedCopies]) -> int:
    return len({each.query for each in found})


def _shown(query: str, question: str, finding: str) -> str:
    first, second = (
        textwrap.shorten(text, SHOWN_WIDTH, placeholder=" …") for text in (f"{query}: {question}", finding)
    )
    return f"  {first}\n    {second}"
