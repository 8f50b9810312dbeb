"""Early stopping: the rule learnt on dev questions, its dial on dev and on test questions.

    python benchmarks/stopping.py BUNDLE DATA [--questions 250] [--depth 50]

The retriever's top candidates are all scored, once; the dial is then played on the scores, as search would. Prints
the share of candidates that the re-ranker reads and the MRR@10, on dev (which the rule, and the retriever's weight in
the final score, are learnt on) and on test, with the 95 % interval of the difference to reading all, over questions.
"""

import argparse

import numpy as np

from tandemqa import Bundle, load_dataset
from tandemqa.data.dataset import Dataset
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.evaluation.blend import learn_blend
from tandemqa.evaluation.metrics import evaluate_run
from tandemqa.evaluation.significance import paired_interval
from tandemqa.evaluation.stopping import learn_stopping
from tandemqa.index.vectors import passage_index
from tandemqa.search.rank import blended, final_scores, reranker_scores, retrieve
from tandemqa.search.stopping import read_until_settled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--questions", type=int, default=250, help="questions of each split")
    parser.add_argument("--depth", type=int, default=50)
    options = parser.parse_args()

    dataset, bundle = load_dataset(options.data), Bundle.load(options.bundle)
    row = dataset.passages.row
    candidates, scores, qrels = _scored(bundle, dataset, "dev", options.questions, options.depth)
    blend = learn_blend(candidates, scores, qrels, row)
    rule = learn_stopping(candidates, scores, blend, qrels, row)
    assert rule is not None
    print(f"blend {blend:.3g}; {rule.model_dump(exclude={'curve'})}\n")
    test, test_scores, test_qrels = _scored(bundle, dataset, "test", options.questions, options.depth)
    final = final_scores(test, test_scores, blend)
    retrieved = evaluate_run(test, test_qrels, row, ["mrr@10"])["mrr@10"].mean()
    print(f"the retriever alone on test: MRR@10 {retrieved:.4f}\n")
    print(
        "| dial | read, dev | MRR@10, dev | read, test | MRR@10, test | difference to reading all |\n"
        + "|---" * 6
        + "|"
    )
    whole = None
    for point in rule.curve:
        done = read_until_settled(test.rows >= 0, test.scores, lambda _: final, rule, point.stopping)
        run = blended(test, np.where(done, test_scores, np.float32(-np.inf)), blend)
        values = evaluate_run(run, test_qrels, row, ["mrr@10"])["mrr@10"]
        whole = values if whole is None else whole
        low, high = paired_interval(whole, values, seed=0)
        print(
            f"| {point.stopping} | {point.share:.3f} | {point.mrr:.4f} | {done.mean():.3f} | {values.mean():.4f} | "
            f"{(values - whole).mean():+.4f} ({low:+.4f} to {high:+.4f}) |"
        )


def _scored(
    bundle: Bundle, dataset: Dataset, split: str, count: int, depth: int
) -> tuple[Run, np.ndarray, dict[str, dict[str, int]]]:
    """The candidates of some questions, the re-ranker's scores of all of them, and the judgements."""
    judged = dataset.judged(split)
    drawn = np.random.default_rng(0).choice(len(judged), size=min(count, len(judged)), replace=False)
    query_ids = [list(judged)[number] for number in np.sort(drawn)]
    texts = [dataset.queries[query_id] for query_id in query_ids]
    index = passage_index(bundle.retriever, dataset)
    candidates = retrieve(bundle.retriever, index, query_ids, bundle.retriever.tokenize(texts), depth)
    tokens = passage_tokens(dataset, bundle.reranker.tokenizer)
    scores = reranker_scores(bundle.reranker, candidates, bundle.reranker.tokenize(texts), tokens, show=split)
    return candidates, scores, {query_id: judged[query_id] for query_id in query_ids}


if __name__ == "__main__":
    main()
