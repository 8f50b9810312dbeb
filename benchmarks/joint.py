"""The pair trained together against the same models trained each for itself, on the same lists from the same start.

    python benchmarks/joint.py DATA --out WORK [--recipe quick] [--questions 600] [--passages 6000] [--seed 13]

On a part of the dataset: `--questions` training questions, `--dev` dev questions, and `--passages` passages, every
positive among them. All variants share candidates and warm-up; only the weights of the loss differ. Without the
divergence the loss is a sum in which each model has a term of its own: each learns alone. Figures, MRR@10 on dev: the
retriever over all passages; the re-ranker, without any share of the retriever's score, on one fixed set of candidates
(the base retriever's); the two stages end to end, again the re-ranker's score alone and with the share that was
learnt on the other half of the questions. Interrupted, the same command goes on where it stopped.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tandemqa import Bundle, Dataset, load_dataset, load_recipe, train
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.dual import DualEncoder
from tandemqa.evaluation.blend import learn_blend
from tandemqa.evaluation.metrics import bootstrap_interval, counted_queries, evaluate_run
from tandemqa.files import read_json, whole_folder, write_json
from tandemqa.index.vectors import passage_index
from tandemqa.search.rank import blended, reranker_scores, retrieve

WEIGHTS = ("kl_weight", "reranker_weight", "retriever_weight")
VARIANTS = {
    "warm-up only": None,
    "each alone": (0, 1, 1),
    "joint, as in the paper": (1, 1, 0),
    "joint": (1, 1, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and for joint.json")
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe, as in `tandemqa train`")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--dev", type=int, default=250)
    parser.add_argument("--passages", type=int, default=6000)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seed", type=int, default=13)
    options = parser.parse_args()

    part = options.out / "data"
    if not part.exists():
        write_part(load_dataset(options.data), part, options.questions, options.dev, options.passages)
    dataset = load_dataset(part)
    common = ["evaluation.split=null", f"seed={options.seed}", *options.set]
    base = DualEncoder.load(load_recipe(options.recipe, common).retriever)
    measured = options.out / "joint.json"
    results = read_json(measured)["results"] if measured.exists() else {}
    for name, weights in VARIANTS.items():
        if name in results:
            continue
        folder = options.out / name.replace(" ", "-").replace(",", "")
        share_stages(options.out / "warm-up-only", folder)
        settings = ["joint.epochs=0"]
        if weights is not None:
            settings = [f"loss.{key}={value}" for key, value in zip(WEIGHTS, weights, strict=True)]
        bundle = train(dataset, folder, load_recipe(options.recipe, [*common, *settings]))
        results[name] = measure(bundle, base, dataset, options.depth)
        write_json(measured, {"options": vars(options) | {"out": str(options.out)}, "results": results})
        print(
            f"{name:24}" + "".join(f"  {what} {figure[0]:.4f}" for what, figure in results[name].items()), flush=True
        )
    print(json.dumps(results, indent=2))


def write_part(dataset: Dataset, folder: Path, questions: int, dev: int, passages: int) -> None:
    """A part of a dataset in BEIR layout: some questions of two splits, their positives, and other passages."""
    generator = np.random.default_rng(0)
    kept = {
        split: {
            query_id: dataset.qrels[split][query_id]
            for query_id in generator.permutation(counted_queries(dataset.judged(split)))[:count].tolist()
        }
        for split, count in (("train", questions), ("dev", dev))
    }
    rows = {dataset.passages.row[p] for qrels in kept.values() for grades in qrels.values() for p in grades}
    others = [row for row in generator.permutation(len(dataset.passages)).tolist() if row not in rows]
    rows.update(others[: max(0, passages - len(rows))])
    with whole_folder(folder) as partial:
        (partial / "qrels").mkdir()
        with (partial / "corpus.jsonl").open("w", encoding="utf-8") as file:
            for row in sorted(rows):
                passage = dataset.passages[row]
                file.write(json.dumps({"_id": passage.id, "title": passage.title, "text": passage.text}) + "\n")
        with (partial / "queries.jsonl").open("w", encoding="utf-8") as file:
            for qrels in kept.values():
                for query_id in qrels:
                    file.write(json.dumps({"_id": query_id, "text": dataset.queries[query_id]}) + "\n")
        for split, qrels in kept.items():
            lines = ["query-id\tcorpus-id\tscore"]
            lines += [f"{query}\t{p}\t{grade}" for query, grades in qrels.items() for p, grade in grades.items()]
            (partial / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def share_stages(source: Path, target: Path) -> None:
    """Begin with the stages that all variants have in common."""
    if source != target and not target.exists():
        for stage in ("mine", "warm_reranker", "lists"):
            shutil.copytree(source / "stages" / stage, target / "stages" / stage)


def measure(bundle: Bundle, base: DualEncoder, dataset: Dataset, depth: int) -> dict[str, tuple[float, float, float]]:
    """MRR@10 on dev with its 95 % interval."""
    qrels = dataset.judged("dev")
    query_ids = counted_queries(qrels)
    texts = [dataset.queries[query_id] for query_id in query_ids]
    reranker = bundle.reranker

    def retrieved(retriever: DualEncoder) -> Run:
        index = passage_index(retriever, dataset)
        return retrieve(retriever, index, query_ids, retriever.tokenize(texts), 100)

    def scored(candidates: Run) -> npt.NDArray[np.float32]:
        tokens = passage_tokens(dataset, reranker.tokenizer)
        return reranker_scores(reranker, candidates, reranker.tokenize(texts), tokens, show="re-rank")

    def figure(run: Run) -> npt.NDArray[np.float64]:
        return evaluate_run(run, qrels, dataset.passages.row, ["mrr@10"])["mrr@10"]

    own, fixed = retrieved(bundle.retriever), retrieved(base).cut(depth)
    scores = scored(fixed)
    top = own.cut(depth)
    own_scores = scores if np.array_equal(top.rows, fixed.rows) else scored(top)
    values = {
        "retriever": figure(own),
        "re-ranker on base candidates": figure(blended(fixed, scores, 0.0)),
        "two stages, re-ranker's score": figure(blended(top, own_scores, 0.0)),
        "two stages, blended": np.empty(len(query_ids)),
    }
    for half in (0, 1):
        others = {q: qrels[q] for q in query_ids[1 - half :: 2]}
        weight = learn_blend(top, own_scores, others, dataset.passages.row)
        values["two stages, blended"][half::2] = figure(blended(top, own_scores, weight))[half::2]
    return {what: (float(each.mean()), *bootstrap_interval(each, 0)) for what, each in values.items()}


if __name__ == "__main__":
    main()
