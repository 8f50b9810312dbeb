"""A bundle on a dataset: what each stage ranks, from BM25 to the re-ranked candidates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.qrels import write_qrels
from tandemqa.data.runs import Run, break_ties
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.backbone import Precision
from tandemqa.encoders.bundle import Bundle
from tandemqa.encoders.dual import DualEncoder
from tandemqa.errors import TandemError
from tandemqa.evaluation.blend import learn_blend, learn_fusion
from tandemqa.evaluation.confidence import learn_confidence
from tandemqa.evaluation.metrics import counted_queries
from tandemqa.evaluation.report import Report, measure, write_runs
from tandemqa.evaluation.stopping import learn_stopping
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.vectors import passage_index
from tandemqa.search.learnt import Learnt
from tandemqa.search.rank import FUSED, blended, followed_by, fuse, lexical, reranker_scores, retrieve


def evaluate(
    bundle: Bundle | str | Path,
    dataset: Dataset | str | Path,
    split: str = "test",
    k: int = 50,
    run_dir: str | Path | None = None,
    precision: Precision = "auto",
) -> Report:
    """Measure every stage on the questions of `split`: BM25, the retriever before and after its training, hybrid
    (the trained retriever and BM25 fused as was learnt on dev), and the trained retriever's top `k` re-ranked.

    "Before" is left out where the model that the training started from cannot be loaded any more. Where the final
    ranking blends in the retriever's score, "re-ranker alone" is what it would be without. `run_dir` receives a TREC
    run file a stage, and the judgements as `qrels.txt`, so that any tool that reads TREC files can check the figures.
    `precision` is what the trained models compute in; for "int8" the bundle must be calibrated, as it is when an
    index is built so.
    """
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    bundle = bundle.at(precision)
    rankings, learnt = rank_stages(bundle, dataset, split, k), Learnt.of(bundle)
    if run_dir is not None:
        write_runs(rankings.final(learnt), Path(run_dir), dataset.passages.ids)
        write_qrels(dataset.judged(split), Path(run_dir) / "qrels.txt")
    return rankings.report(learnt)


@dataclass(frozen=True)
class Rankings:
    """What the stages rank on one split, and the re-ranker's scores of the candidates, not yet made a ranking.

    reranker_scores: float32 of the shape of `candidates`. seconds: what each stage took.
    """

    dataset: Dataset
    split: str
    runs: dict[str, Run]
    candidates: Run
    reranker_scores: NDArray[np.float32]
    seconds: dict[str, float]

    def final(self, learnt: Learnt) -> dict[str, Run]:
        """The run of every stage, hybrid and re-ranked with the weights that were learnt.

        What the re-ranker did not see stands behind what it saw, in the retriever's order.
        """
        retrieved = self.runs["retriever after"]
        hybrid = fuse(*self._fused, retrieved.rows.shape[1], learnt.fusion)
        runs = self.runs | {
            "hybrid": break_ties(hybrid, self.dataset.passages.ids),
            "re-ranked": followed_by(blended(self.candidates, self.reranker_scores, learnt.blend), retrieved),
        }
        if learnt.blend > 0:
            alone = blended(self.candidates, self.reranker_scores, 0.0)
            runs["re-ranker alone"] = followed_by(alone, retrieved)
        return runs

    def learn(self) -> Learnt:
        """What ranks best on these questions, how sure it is of its first hit, and when it may stop reading."""
        qrels, row = self.dataset.judged(self.split), self.dataset.passages.row
        blend = learn_blend(self.candidates, self.reranker_scores, qrels, row)
        best = blended(self.candidates, self.reranker_scores, blend)
        return Learnt(
            blend=blend,
            fusion=learn_fusion(*self._fused, qrels, row),
            confidence=learn_confidence(best, qrels, row),
            stopping=learn_stopping(self.candidates, self.reranker_scores, blend, qrels, row),
        )

    @property
    def _fused(self) -> tuple[Run, Run]:
        """What a hybrid is made of."""
        return self.runs["retriever after"].cut(FUSED), self.runs["BM25"].cut(FUSED)

    def report(self, learnt: Learnt) -> Report:
        """The figures of every stage."""
        qrels = self.dataset.judged(self.split)
        depth = self.candidates.rows.shape[1]
        return measure(self.final(learnt), qrels, self.dataset.passages.row, self.split, depth, self.seconds)


def rank_stages(bundle: Bundle, dataset: Dataset, split: str, k: int) -> Rankings:
    """Rank the passages for every judged question of `split` with each stage."""
    if k < 1:
        raise TandemError(f"k is {k}; at least one candidate must be re-ranked.")
    depth = max(k, FUSED)
    query_ids = counted_queries(dataset.judged(split))
    texts = [dataset.queries[query_id] for query_id in query_ids]
    runs: dict[str, Run] = {}
    seconds: dict[str, float] = {}

    def repeatable(run: Run) -> Run:
        # Equal scores come in whatever order an index finds them; trec_eval's rule settles it.
        return break_ties(run, dataset.passages.ids)

    with _timed(seconds, "BM25"):
        words = LexicalIndex.build(passage.full for passage in dataset.passages)
        runs["BM25"] = repeatable(lexical(words, query_ids, texts, depth))

    base = _base_retriever(bundle)
    if base is not None:
        with _timed(seconds, "retriever before"):
            index = passage_index(base, dataset)
            runs["retriever before"] = repeatable(retrieve(base, index, query_ids, base.tokenize(texts), depth))

    with _timed(seconds, "retriever after"):
        retriever = bundle.retriever
        index = passage_index(retriever, dataset)
        retrieved = retrieve(retriever, index, query_ids, retriever.tokenize(texts), depth)
        runs["retriever after"] = repeatable(retrieved)

    with _timed(seconds, "re-ranked"):
        candidates = runs["retriever after"].cut(k)
        reranker = bundle.reranker
        tokens = passage_tokens(dataset, reranker.tokenizer)
        scores = reranker_scores(reranker, candidates, reranker.tokenize(texts), tokens, show="re-rank")
    return Rankings(dataset, split, runs, candidates, scores, seconds)


def _base_retriever(bundle: Bundle) -> DualEncoder | None:
    """The retriever that the training started from, or None where its weights cannot be found any more."""
    started_from = bundle.about.get("started_from")
    if started_from is None:
        return None
    try:
        return DualEncoder.load(bundle.retriever.config.model_copy(update={"model": started_from}))
    except TandemError:
        return None


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)
