"""A bundle on a dataset: what each stage ranks, from BM25 to the re-ranked candidates."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.bundle import Bundle
from tandemqa.encoders.dual import DualEncoder
from tandemqa.errors import TandemError
from tandemqa.evaluation.metrics import counted_queries
from tandemqa.evaluation.report import Report, measure, write_runs
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.vectors import passage_index
from tandemqa.search.rank import fuse, lexical, rerank, retrieve

# Deep enough for R@50 of every stage, and for fusion to find what only one of its two runs ranks high.
DEPTH = 100


def evaluate(
    bundle: Bundle | str | Path,
    dataset: Dataset | str | Path,
    split: str = "test",
    k: int = 50,
    run_dir: str | Path | None = None,
) -> Report:
    """Measure every stage on the questions of `split`: BM25, the retriever before and after its training, hybrid
    (the trained retriever and BM25 fused), and the trained retriever's top `k` re-ranked.

    "Before" is left out where the model that the training started from cannot be loaded any more. `run_dir` receives
    a TREC run file a stage.
    """
    if k < 1:
        raise TandemError(f"k is {k}; at least one candidate must be re-ranked.")
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    depth = max(k, DEPTH)
    qrels = dataset.judged(split)
    query_ids = counted_queries(qrels)
    texts = [dataset.queries[query_id] for query_id in query_ids]
    runs: dict[str, Run] = {}
    seconds: dict[str, float] = {}

    with _timed(seconds, "BM25"):
        words = LexicalIndex.build(passage.full for passage in dataset.passages)
        runs["BM25"] = lexical(words, query_ids, texts, depth)

    base = _base_retriever(bundle)
    if base is not None:
        with _timed(seconds, "retriever before"):
            index = passage_index(base, dataset)
            runs["retriever before"] = retrieve(base, index, query_ids, base.tokenize(texts), depth)

    with _timed(seconds, "retriever after"):
        retriever = bundle.retriever
        index = passage_index(retriever, dataset)
        runs["retriever after"] = retrieve(retriever, index, query_ids, retriever.tokenize(texts), depth)

    runs["hybrid"] = fuse(runs["retriever after"], runs["BM25"], depth)

    with _timed(seconds, "re-ranked"):
        candidates = runs["retriever after"].cut(k)
        reranker = bundle.reranker
        tokens = passage_tokens(dataset, reranker.tokenizer)
        runs["re-ranked"] = rerank(
            reranker, candidates, reranker.tokenize(texts), tokens, bundle.blend, show="re-rank"
        )

    if run_dir is not None:
        write_runs(runs, Path(run_dir), dataset.passages.ids)
    return measure(runs, qrels, dataset.passages.row, split, k, seconds)


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
