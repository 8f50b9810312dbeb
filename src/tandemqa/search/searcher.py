"""Questions answered from an index: the first stage finds candidates, the re-ranker orders them."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.dataset import Passage
from tandemqa.data.lines import Metadata
from tandemqa.data.runs import Run
from tandemqa.data.tokens import TokenIds
from tandemqa.encoders.bundle import Bundle
from tandemqa.errors import TandemError
from tandemqa.index.index import Index
from tandemqa.lists.confidence import Calibration
from tandemqa.search.candidates import Candidates, Mode, find
from tandemqa.search.highlight import best_sentences
from tandemqa.search.learnt import Learnt, doubt
from tandemqa.search.rank import blended, final_scores, reranker_scores
from tandemqa.search.stopping import read_until_settled

# Pairs whose re-ranking takes seconds.
WORTH_A_BAR = 200
STAGES = ("retrieve", "re-rank", "read", "highlight")


@dataclass(frozen=True)
class Hit:
    """One passage found. `rank` and `retriever_rank`, its place before re-ranking, count from 1.

    `score` is what the hits are ranked by: the re-ranker's, plus the bundle's blend of the retriever's. What the
    re-ranker did not read, below the depth or where it stopped early, has no `reranker_score`, and a `score` that
    only keeps the order; where nothing was to be re-ranked (depth 0), `score` is that of the first stage.
    `bm25_score` is there where BM25 was asked and found the passage. `answer` is the sentence that answers best:
    `text[answer_start:answer_end]`, empty if the passage has no text. `metadata` is what the passage carries besides.
    """

    rank: int
    id: str
    title: str
    text: str
    score: float
    reranker_score: float | None
    retriever_score: float
    retriever_rank: int
    bm25_score: float | None
    answer: str = ""
    answer_start: int = 0
    answer_end: int = 0
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class Answer(Sequence[Hit]):
    """The hits of one question, best first; a sequence of `Hit`.

    confidence: the probability that the first hit answers the question; None if the bundle did not learn it on dev,
    or nothing was re-ranked.
    found: whether there is a hit, and no confidence below what was learnt to tell answers from none.
    seconds: what each stage took ("retrieve", "re-rank", "read", "highlight"); of questions asked together, each
    one's share.
    """

    question: str
    hits: tuple[Hit, ...]
    confidence: float | None
    found: bool
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
    """Search over one index with the models that built it, from any number of threads.

    Each search sees the generation that is committed when it begins, and that one to its end. Between searches the
    segments stay open for the next one, and nothing keeps SQLite from folding its log.
    """

    def __init__(self, index: Index | str | Path, bundle: Bundle | str | Path | None = None) -> None:
        """`bundle` is needed only if it is no longer where it was when the index was built."""
        self._latest = index if isinstance(index, Index) else Index.open(index)
        self.bundle = self._latest.load_bundle(bundle)
        self.learnt = Learnt.of(self.bundle)
        self._doubt = doubt(self.bundle)
        self._models = _models(self._latest)
        with self._searched():
            pass

    @property
    def index(self) -> Index:
        """The index as it is now, opened for whoever asks; an index that has become one of other models is a
        `TandemError`."""
        index = Index.open(self._latest.folder, self._latest)
        if _models(index) != self._models:
            raise TandemError(
                f"The index {index.folder} was built again with other models, or in another precision; "
                "open it again, with a new Searcher."
            )
        return index

    @contextmanager
    def _searched(self) -> Iterator[Index]:
        """The index for one search."""
        index = self.index
        with closing(index.passages):
            self._latest = index  # what it has open the next one need not open
            yield index

    def search(
        self,
        question: str,
        k: int = 5,
        depth: int | None = None,
        mode: Mode | None = None,
        stopping: float | None = None,
        where: Sequence[str] = (),
    ) -> Answer:
        """The `k` passages that answer `question` best, of the first stage's top `depth`; see `search_many`."""
        return self.search_many([question], k, depth, mode, stopping, where)[0]

    def search_many(
        self,
        questions: Sequence[str],
        k: int = 5,
        depth: int | None = None,
        mode: Mode | None = None,
        stopping: float | None = None,
        where: Sequence[str] = (),
    ) -> list[Answer]:
        """Search for many questions at once, which is faster than one by one.

        depth: how many candidates the re-ranker reads; those below it follow in the order in which they were found,
        and with 0 all stay so. mode: who finds them: the retriever ("dense"), "bm25", or both ("hybrid"). stopping: 0
        re-ranks all candidates; up to 1, re-ranking ends sooner and loses more. It is judged by the first hit only,
        so the hits behind it lose more than that (`search.stopping`; the bundle's curve is that of the mode "dense").
        Where one of the three is None, it is what `tune` chose for the bundle, else 50, "dense" and 0. `k` and
        `depth` are cut at the size of the index. A question that is empty or no Unicode text, and an option out of
        its range, is a `TandemError`. Where the bundle's re-ranker was not measured on dev, or ranked worse than the
        retriever there, the first search that re-ranks warns of it.
        """
        usual = self.learnt.setting
        depth = usual.depth if depth is None else depth
        mode = usual.mode if mode is None else mode
        stopping = usual.stopping if stopping is None else stopping
        if k < 1:
            raise TandemError(f"k is {k}; ask for at least 1 passage.")
        if depth < 0:
            raise TandemError(f"depth is {depth}; re-rank some candidates, or none with 0.")
        if not 0 <= stopping <= 1:
            raise TandemError(f"stopping is {stopping}; it goes from 0, which reads all candidates, to 1.")
        if stopping > 0 and self.learnt.stopping is None:
            raise TandemError(
                f"The bundle {self.bundle.folder} did not learn when to stop, which takes dev questions; "
                "search with stopping 0."
            )
        for question in questions:
            _check(question)
        if not questions:
            return []
        if depth > 0 and self._doubt is not None:
            warnings.warn(self._doubt, stacklevel=2)
            self._doubt = None
        with self._searched() as index:
            if not len(index):
                raise TandemError(f"The index {index.folder} is empty: all its passages were deleted; add some.")
            return self._answers(index, questions, k, depth, mode, stopping, where)

    def _answers(
        self,
        index: Index,
        questions: Sequence[str],
        k: int,
        depth: int,
        mode: Mode,
        stopping: float,
        where: Sequence[str],
    ) -> list[Answer]:
        times = [time.perf_counter()]
        retriever = self.bundle.retriever
        queries = retriever.tokenize(questions)
        vectors, query_tokens = retriever.encode_queries(queries)
        candidates = find(index, questions, vectors, max(k, depth), mode, self.learnt.fusion, where)
        times.append(time.perf_counter())
        scores = np.full(candidates.run.rows.shape, -np.inf, dtype=np.float32)
        if depth == 0:
            best = candidates.run.cut(k)
        else:
            by_similarity = Run(candidates.run.query_ids, candidates.run.rows, candidates.similarity)
            scores[:, :depth] = self._reranker_scores(index, questions, by_similarity.cut(depth), stopping)
            best = blended(by_similarity, scores, self.learnt.blend).cut(k)
        times.append(time.perf_counter())
        hits = self._hits(index, candidates, scores, best)
        times.append(time.perf_counter())
        hits = self._with_answers(queries, query_tokens, hits)
        times.append(time.perf_counter())
        seconds = {
            stage: (end - start) / len(questions)
            for stage, start, end in zip(STAGES, times[:-1], times[1:], strict=True)
        }
        return [
            Answer(question, tuple(found), *self._confidence(found, depth > 0), seconds)
            for question, found in zip(questions, hits, strict=True)
        ]

    def _reranker_scores(
        self, index: Index, questions: Sequence[str], candidates: Run, stopping: float
    ) -> NDArray[np.float32]:
        """The re-ranker's score of each candidate, float32 of their shape, -inf for those it did not read.

        The candidates come with their similarities, in the order in which they are read.
        """
        reranker = self.bundle.reranker
        queries = reranker.tokenize(questions)
        if stopping == 0 or self.learnt.stopping is None:
            show = "re-rank" if candidates.rows.size >= WORTH_A_BAR else None
            return reranker_scores(reranker, candidates, queries, index.tokens, show)
        scores = np.full(candidates.rows.shape, -np.inf, dtype=np.float32)

        def read(wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
            new = reranker_scores(reranker, candidates, queries, index.tokens, wanted=wanted)
            scores[wanted] = new[wanted]
            return final_scores(candidates, new, self.learnt.blend)

        read_until_settled(candidates.rows >= 0, candidates.scores, read, self.learnt.stopping, stopping)
        return scores

    def _hits(self, index: Index, candidates: Candidates, scores: NDArray[np.float32], best: Run) -> list[list[Hit]]:
        """The best passages of each question, with what both stages made of each, still without their answers."""
        words, passages = candidates.words, index.passages
        hits: list[list[Hit]] = []
        for number, ranking in enumerate(best.rows.tolist()):
            rows = [row for row in ranking if row >= 0]
            place = {row: i for i, row in enumerate(candidates.run.rows[number].tolist())}
            hits.append(
                [
                    Hit(
                        rank,
                        *passage,
                        score=float(best.scores[number, rank - 1]),
                        reranker_score=_finite(scores[number, place[row]]),
                        retriever_score=float(candidates.similarity[number, place[row]]),
                        retriever_rank=place[row] + 1,
                        bm25_score=None if words is None else _finite(words[number, place[row]]),
                        metadata=metadata,
                    )
                    for rank, (row, passage, metadata) in enumerate(
                        zip(rows, passages.rows(rows), passages.metadata(rows), strict=True), start=1
                    )
                ]
            )
        return hits

    def _with_answers(
        self, queries: TokenIds, query_tokens: Sequence[NDArray[np.float32]], hits: list[list[Hit]]
    ) -> list[list[Hit]]:
        """The hits with the sentence of each that answers best."""
        own = [number for number, found in enumerate(hits) for _ in found]
        passages = [Passage(hit.id, hit.title, hit.text) for found in hits for hit in found]
        spans = iter(best_sentences(self.bundle.retriever, queries, query_tokens, passages, own))
        return [
            [
                replace(hit, answer=hit.text[start:end], answer_start=start, answer_end=end)
                for hit, (start, end) in zip(found, spans, strict=False)
            ]
            for found in hits
        ]

    def _confidence(self, hits: Sequence[Hit], reranked: bool) -> tuple[float | None, bool]:
        """How sure the first hit is, and whether that is enough; learnt of final scores, it knows no others."""
        learnt = self.learnt.confidence
        if learnt is None or not reranked:
            return None, bool(hits)
        best = np.array([hits[0].score if hits else -np.inf])
        confidence = float(Calibration(learnt.slope, learnt.offset).confidence(best)[0])
        return confidence, confidence >= learnt.threshold and bool(hits)


def _models(index: Index) -> tuple[object, ...]:
    """What tells the models that built an index from others."""
    return index.about["bundle"]["fingerprint"], index.precision, index.about.get("calibration")


def _finite(score: np.float32) -> float | None:
    return float(score) if np.isfinite(score) else None


def _check(question: str) -> None:
    if not question.strip():
        raise TandemError("The question is empty; write a few words.")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TandemError(f"The question {question!r} is not valid Unicode text; type it as UTF-8.") from error
