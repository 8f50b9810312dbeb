"""The pair trained together against each model alone, on the same lists from the same start.

    python benchmarks/joint.py DATA --out WORK [--recipe quick] [--split dev] [--questions 1000] [--seed 13]

Every variant shares candidates and warm-up; only the weights of the loss differ, so that each model sees the very
same lists. Three figures a variant, MRR@10: the retriever over all passages, the re-ranker on one fixed set of
candidates (the base retriever's), and the two stages end to end. Interrupted, the same command goes on where it
stopped.
"""

import argparse
import json
import shutil
from pathlib import Path

from tandemqa import Bundle, Dataset, load_dataset, load_recipe, train
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.evaluation.metrics import bootstrap_interval, counted_queries, evaluate_run
from tandemqa.files import write_json
from tandemqa.index.vectors import passage_index
from tandemqa.search.rank import rerank, retrieve

WEIGHTS = ("kl_weight", "reranker_weight", "retriever_weight")
VARIANTS = {
    "warm-up only": None,
    "retriever alone": (0, 0, 1),
    "re-ranker alone": (0, 1, 0),
    "both, no divergence": (0, 1, 1),
    "joint, as in the paper": (1, 1, 0),
    "joint": (1, 1, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and for joint.json")
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seed", type=int, default=13)
    options = parser.parse_args()

    dataset = load_dataset(options.data)
    common = ["evaluation.split=null", f"data.questions={options.questions}", f"seed={options.seed}"]
    results = {}
    for name, weights in VARIANTS.items():
        folder = options.out / name.replace(" ", "-").replace(",", "")
        share_stages(options.out / "warm-up-only", folder)
        settings = ["joint.epochs=0"]
        if weights is not None:
            settings = [f"loss.{key}={value}" for key, value in zip(WEIGHTS, weights, strict=True)]
        bundle = train(dataset, folder, load_recipe(options.recipe, [*common, *settings]))
        results[name] = measure(bundle, dataset, options.split, options.depth)
        write_json(
            options.out / "joint.json", {"options": vars(options) | {"out": str(options.out)}, "results": results}
        )
        print(
            f"{name:24}" + "".join(f"  {what} {figure[0]:.4f}" for what, figure in results[name].items()), flush=True
        )
    print(json.dumps(results, indent=2))


def share_stages(source: Path, target: Path) -> None:
    """Begin with the stages that all variants have in common."""
    if source != target and not target.exists():
        for stage in ("candidates", "warmup"):
            shutil.copytree(source / "stages" / stage, target / "stages" / stage)


def measure(bundle: Bundle, dataset: Dataset, split: str, depth: int) -> dict[str, tuple[float, float, float]]:
    """MRR@10 with its 95 % interval: retriever, re-ranker on the base's candidates, both stages."""
    qrels = dataset.judged(split)
    query_ids = counted_queries(qrels)
    texts = [dataset.queries[query_id] for query_id in query_ids]

    def retrieved(retriever: DualEncoder) -> Run:
        index = passage_index(retriever, dataset)
        return retrieve(retriever, index, query_ids, retriever.tokenize(texts), 100)

    def reranked(candidates: Run) -> Run:
        tokens = passage_tokens(dataset, bundle.reranker.tokenizer)
        queries = bundle.reranker.tokenize(texts)
        return rerank(bundle.reranker, candidates.cut(depth), queries, tokens, bundle.blend, show="re-rank")

    own, base = retrieved(bundle.retriever), retrieved(DualEncoder.load(RetrieverConfig()))
    runs = {"retriever": own, "re-ranker on base candidates": reranked(base), "two stages": reranked(own)}
    figures = {}
    for what, run in runs.items():
        values = evaluate_run(run, qrels, dataset.passages.row, ["mrr@10"])["mrr@10"]
        figures[what] = (float(values.mean()), *bootstrap_interval(values, 0))
    return figures


if __name__ == "__main__":
    main()
