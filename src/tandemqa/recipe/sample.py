"""A small sample of the dev questions and the corpus, on which a pair in training is measured quickly."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tandemqa.data.dataset import Dataset
from tandemqa.data.runs import Run, break_ties
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.evaluation.metrics import counted_queries, mean_mrr
from tandemqa.files import save_arrays
from tandemqa.index.dense import DenseIndex
from tandemqa.search.rank import rerank, retrieve

SPLIT = "dev"
# Candidates of a question: those of BM25 and of the retriever that join the sample, and those that are re-ranked.
HARD = 10
RERANKED = 20

RETRIEVER, RERANKED_BY = "retriever_mrr@10", "reranked_mrr@10"


class Sample(NamedTuple):
    """Dev questions, and the rows of the passages that they are asked of, int64 (P,), rising."""

    query_ids: list[str]
    rows: npt.NDArray[np.int64]

    def save(self, path: Path) -> None:
        save_arrays(path, query_ids=np.array(self.query_ids), rows=self.rows)

    @classmethod
    def load(cls, path: Path) -> "Sample":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["query_ids"].tolist(), arrays["rows"])


def sampled_questions(dataset: Dataset, count: int, seed: int) -> list[str]:
    """At most `count` dev questions, drawn from the seed."""
    query_ids = counted_queries(dataset.judged(SPLIT))
    drawn = np.random.default_rng(seed).permutation(len(query_ids))[:count]
    return [query_ids[number] for number in sorted(drawn)]


def draw_sample(dataset: Dataset, hard: list[Run], passages: int, seed: int) -> Sample:
    """The passages for the questions of the runs `hard`: all their positives, the first candidates of each run, and
    random others until there are `passages`."""
    query_ids = hard[0].query_ids
    qrels, row = dataset.judged(SPLIT), dataset.passages.row
    chosen = {row[p] for query_id in query_ids for p, grade in qrels[query_id].items() if grade > 0}
    for run in hard:
        chosen |= set(run.cut(HARD).rows.flatten().tolist())
    chosen.discard(-1)
    order = np.random.default_rng(seed).permutation(len(dataset.passages))
    others = order[~np.isin(order, list(chosen))][: max(0, passages - len(chosen))]
    return Sample(query_ids, np.sort(np.concatenate([np.array(list(chosen), dtype=np.int64), others])))


def measure_on(sample: Sample, dataset: Dataset, retriever: DualEncoder, reranker: CrossEncoder) -> dict[str, float]:
    """MRR@10 of the retriever and of its candidates re-ranked, over the sample's passages alone."""
    questions = [dataset.queries[query_id] for query_id in sample.query_ids]
    texts = [passage_tokens(dataset, model.tokenizer) for model in (retriever, reranker)]
    passages = [[ids[int(row)] for row in sample.rows] for ids in texts]
    names = [dataset.passages.ids[int(row)] for row in sample.rows]
    index = DenseIndex.build(retriever.encode(passages[0], "passage"))
    retrieved = retrieve(retriever, index, sample.query_ids, retriever.tokenize(questions), RERANKED)
    reranked = rerank(reranker, retrieved, reranker.tokenize(questions), passages[1])
    qrels = {query_id: dataset.judged(SPLIT)[query_id] for query_id in sample.query_ids}
    rows = {name: row for row, name in enumerate(names)}
    return {
        figure: mean_mrr(break_ties(run, names), qrels, rows)
        for figure, run in ((RETRIEVER, retrieved), (RERANKED_BY, reranked))
    }
