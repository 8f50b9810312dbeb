"""Variants of one recipe on a part of a dataset: trained from the same stages, measured alike, tested in pairs."""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tandemqa import Bundle, Dataset, load_dataset, load_recipe, train
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.dual import DualEncoder
from tandemqa.evaluation.blend import learn_blend
from tandemqa.evaluation.metrics import bootstrap_interval, counted_queries, evaluate_run
from tandemqa.evaluation.significance import holm, paired_interval, randomisation_test
from tandemqa.files import read_json, whole_folder, write_json
from tandemqa.index.vectors import passage_index
from tandemqa.search.rank import blended, reranker_scores, retrieve

Values = dict[str, list[float]]
"""What is measured -> its value for each question."""


def arguments(description: str, recipe: str, questions: int | None, passages: int | None) -> argparse.ArgumentParser:
    """The options that all comparisons share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and for measured.json")
    parser.add_argument("--recipe", default=recipe)
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe, as in `tandemqa train`")
    parser.add_argument("--questions", type=int, default=questions, help="training questions; all if not given")
    parser.add_argument("--dev", type=int, default=250, help="dev questions that are measured")
    parser.add_argument("--passages", type=int, default=passages, help="passages; all if not given")
    parser.add_argument("--depth", type=int, default=20, help="candidates that are re-ranked")
    parser.add_argument("--seed", type=int, default=13)
    return parser


def run_variants(options: argparse.Namespace, variants: Mapping[str, Sequence[str]]) -> None:
    """Train and measure each variant (name -> settings), the first one being what the others are held against.

    A variant begins with the stages of the first and redoes those whose settings differ. Interrupted, the same call
    goes on where it stopped.
    """
    part = options.out / "data"
    if not part.exists():
        write_part(load_dataset(options.data), part, options.questions, options.dev, options.passages)
    dataset = load_dataset(part)
    common = ["evaluation.split=null", f"seed={options.seed}", *options.set]
    base = DualEncoder.load(load_recipe(options.recipe, common).retriever)
    measured = options.out / "measured.json"
    values: dict[str, Values] = read_json(measured)["values"] if measured.exists() else {}
    first = next(iter(variants))
    for name, settings in variants.items():
        if name not in values:
            folder = options.out / folder_name(name)
            if name != first and not folder.exists():
                shutil.copytree(options.out / folder_name(first) / "stages", folder / "stages")
            bundle = train(dataset, folder, load_recipe(options.recipe, [*common, *settings]))
            values[name] = measure(bundle, base, dataset, options.depth)
            write_json(measured, {"options": vars(options) | {"out": str(options.out)}, "values": values})
            print(name, {what: round(float(np.mean(each)), 4) for what, each in values[name].items()}, flush=True)
    print(table({name: values[name] for name in variants}))


def table(values: Mapping[str, Values]) -> str:
    """Means with 95 % intervals, and for each variant its difference to the first, as markdown."""
    names = list(values)
    whats = list(values[names[0]])
    rows = ["| variant | " + " | ".join(whats) + " |", "|---" * (len(whats) + 1) + "|"]
    for name in names:
        cells = [np.array(values[name][what]) for what in whats]
        row = " | ".join(
            f"{c.mean():.3f} ({low:.3f} to {high:.3f})" for c in cells for low, high in [bootstrap_interval(c, 0)]
        )
        rows.append(f"| {name} | {row} |")
    rows += [
        "",
        f"Differences to {names[0]!r}, 95 % intervals, p of a randomisation test (Holm over the column):",
        "",
    ]
    rows += rows[:2]
    columns = []
    for column in whats:
        start = np.array(values[names[0]][column])
        others = [np.array(values[name][column]) for name in names[1:]]
        corrected = holm([randomisation_test(start, other, 0) for other in others])
        columns.append(
            [
                f"{(other - start).mean():+.3f} ({low:+.3f} to {high:+.3f}), p {p:.3f}"
                for other, p in zip(others, corrected, strict=True)
                for low, high in [paired_interval(start, other, 0)]
            ]
        )
    rows += [f"| {name} | " + " | ".join(cells) + " |" for name, *cells in zip(names[1:], *columns, strict=True)]
    return "\n".join(rows)


def write_part(dataset: Dataset, folder: Path, questions: int | None, dev: int, passages: int | None) -> None:
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
    rows.update(others[: len(others) if passages is None else max(0, passages - len(rows))])
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


def measure(bundle: Bundle, base: DualEncoder, dataset: Dataset, depth: int) -> Values:
    """MRR@10 of every dev question: the retriever over all passages; the re-ranker, without any share of the
    retriever's score, on one fixed set of candidates (the base retriever's); the two stages end to end, again by the
    re-ranker's score alone, and with the share that was learnt on the other half of the questions."""
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
        "re-ranker on the base's top": figure(blended(fixed, scores, 0.0)),
        "two stages, re-ranker's score": figure(blended(top, own_scores, 0.0)),
        "two stages, blended": np.empty(len(query_ids)),
    }
    for half in (0, 1):
        others = {q: qrels[q] for q in query_ids[1 - half :: 2]}
        weight = learn_blend(top, own_scores, others, dataset.passages.row)
        values["two stages, blended"][half::2] = figure(blended(top, own_scores, weight))[half::2]
    return {what: each.tolist() for what, each in values.items()}


def folder_name(variant: str) -> str:
    return variant.replace(" ", "-").replace(",", "")
