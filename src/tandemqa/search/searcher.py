"""Questions answered from an index: the retriever finds candidates, the re-ranker orders them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from tandemqa.data.runs import Run
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.index.index import Index
from tandemqa.search.rank import rerank


@dataclass(frozen=True)
class Hit:
    """One passage found. `rank` and `retriever_rank` count from 1.

    `score` is what the hits are ranked by: the re-ranker's, plus the bundle's blend of the retriever's.
    """

    rank: int
    id: str
    title: str
    text: str
    score: float
    retriever_score: float
    retriever_rank: int


@dataclass(frozen=True)
class Answer(Sequence[Hit]):
    """The hits of one question, best first; a sequence of `Hit`.

    seconds: what each stage took ("retrieve", "re-rank", "read"); of questions asked together, each one's share.
    """

    question: str
    hits: tuple[Hit, ...]
    seconds: dict[str, float]

    def __len__(self) -> int:
        return len(self.hits)

    @overload
    def __getitem__(self, place: int) -> Hit: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Hit, ...]: ...

    def __getitem__(self, place: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[place]


class Searcher:
    """Search over one index with the models that built it."""

    def __init__(self, index: Index | str | Path, bundle: Bundle | str | Path | None = None) -> None:
        """`bundle` is needed only if it is no longer where it was when the index was built."""
        self.index = index if isinstance(index, Index) else Index.open(index)
        self.bundle = self.index.load_bundle(bundle)

    def search(self, question: str, k: int = 5, depth: int = 50, where: Sequence[str] = ()) -> Answer:
        """The `k` passages that answer `question` best, of the retriever's top `depth`.

        Only passages that fulfil all conditions in `where`, such as "year>=2001", are searched.
        """
        return self.search_many([question], k, depth, where)[0]

    def search_many(
        self, questions: Sequence[str], k: int = 5, depth: int = 50, where: Sequence[str] = ()
    ) -> list[Answer]:
        """Search for many questions at once, which is faster than one by one.

        At least `k` candidates are re-ranked, whatever `depth`; both are cut at the size of the index. A question
        that is empty or no Unicode text, and a `k` or `depth` below 1, is a `TandemError`.
        """
        if k < 1:
            raise TandemError(f"k is {k}; ask for at least 1 passage.")
        if depth < 1:
            raise TandemError(f"depth is {depth}; at least 1 candidate must be re-ranked.")
        for question in questions:
            _check(question)
        if not len(self.index):
            raise TandemError(f"The index {self.index.folder} is empty: all its passages were deleted; add some.")
        if not questions:
            return []
        started = time.perf_counter()
        retriever, reranker = self.bundle.retriever, self.bundle.reranker
        vectors = retriever.encode(retriever.tokenize(questions), "query")
        count = min(max(k, depth), len(self.index))
        candidates = Run(list(questions), *self.index.search_vectors(vectors, count, where))
        retrieved = time.perf_counter()
        best = rerank(reranker, candidates, reranker.tokenize(questions), self.index.tokens, self.bundle.blend).cut(k)
        reranked = time.perf_counter()

        hits = [self._hits(candidates, best, number) for number in range(len(questions))]
        seconds = {
            "retrieve": (retrieved - started) / len(questions),
            "re-rank": (reranked - retrieved) / len(questions),
            "read": (time.perf_counter() - reranked) / len(questions),
        }
        return [Answer(question, found, seconds) for question, found in zip(questions, hits, strict=True)]

    def _hits(self, candidates: Run, best: Run, number: int) -> tuple[Hit, ...]:
        """The re-ranked passages of one question, with what the retriever made of each."""
        rows = [row for row in best.rows[number].tolist() if row >= 0]
        place = {row: i for i, row in enumerate(candidates.rows[number].tolist())}
        return tuple(
            Hit(
                rank,
                *passage,
                score=float(best.scores[number, rank - 1]),
                retriever_score=float(candidates.scores[number, place[row]]),
                retriever_rank=place[row] + 1,
            )
            for rank, (row, passage) in enumerate(zip(rows, self.index.passages.rows(rows), strict=True), start=1)
        )


def _check(question: str) -> None:
    if not question.strip():
        raise TandemError("The question is empty; write a few words.")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TandemError(f"The question {question!r} is not valid Unicode text; type it as UTF-8.") from error
