"""BM25, the untrained base retriever and their fusion on a split: figures to check an evaluation against.

python benchmarks/base.py DATA [--split test]
"""

import argparse

from tandemqa import load_dataset
from tandemqa.data.runs import break_ties
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.evaluation.metrics import counted_queries
from tandemqa.evaluation.report import METRICS, measure
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.vectors import passage_index
from tandemqa.search.rank import fuse, lexical, retrieve

DEPTH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--split", default="test")
    options = parser.parse_args()

    dataset = load_dataset(options.data)
    qrels = dataset.judged(options.split)
    query_ids = counted_queries(qrels)
    texts = [dataset.queries[query_id] for query_id in query_ids]
    retriever = DualEncoder.load(RetrieverConfig())
    words = LexicalIndex.build(passage.full for passage in dataset.passages)
    runs = {"BM25": lexical(words, query_ids, texts, DEPTH)}
    index = passage_index(retriever, dataset)
    runs["base retriever"] = retrieve(retriever, index, query_ids, retriever.tokenize(texts), DEPTH)
    runs["hybrid"] = fuse(runs["base retriever"], runs["BM25"], DEPTH)
    runs = {stage: break_ties(run, dataset.passages.ids) for stage, run in runs.items()}
    report = measure(runs, qrels, dataset.passages.row, options.split, DEPTH, {})
    print(f"{report.questions} {report.split} questions, {report.passages} passages")
    for stage, figures in report.stages.items():
        print(f"{stage:16}" + "".join(f"  {metric} {figures[metric].mean:.4f}" for metric in METRICS))


if __name__ == "__main__":
    main()
