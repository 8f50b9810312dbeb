"""The recipe `default` on the test questions of a set: against the same lists without distillation, and against
sentence-transformers in the same time.

    python benchmarks/default.py DATA --out WORK [--recipe default] [--questions 800] [--mining after] [--seed 13]

Each pair learns on all dev questions how much its retriever's score counts, as `train` does at its end, and ranks the
test questions once; what has been measured lies in WORK/measured.json and is not done again. `--mining` should be
what is best for sentence-transformers on dev. Its time is that of the seconds of our steps and of our mining;
tokenising, which its trainer does as it goes, and the drawing of lists are not in ours. The extra `data` is needed.
Training is resumable but for that of sentence-transformers, which begins again.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from claims.measure import METRICS
from claims.place import surroundings
from claims.train import stage_seconds

from tandemqa import Bundle, Dataset, load_dataset, load_recipe, train
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.backbone import Precision
from tandemqa.evaluation.metrics import bootstrap_interval, evaluate_run
from tandemqa.evaluation.significance import holm, paired_interval, randomisation_test
from tandemqa.evaluation.stages import rank_stages
from tandemqa.files import read_json, whole_folder, write_json
from tandemqa.search.rank import reranker_scores

ALONE = ("loss.kl_weight=0", "loss.retriever_weight=1")
# Texts and questions by which the speed of reading is told.
SOME, SOME_QUESTIONS = 1000, 50
BEFORE, RETRIEVER, PAIR = "retriever before", "retriever after", "re-ranked"
SHOWN = {BEFORE: "base retriever", RETRIEVER: "retriever", PAIR: "pair"}
JOINT, APART, TODAY = "default", "no distillation", "sentence-transformers"
# What is held against what: a pair and its stage, and another pair and its stage.
DIFFERENCES = (
    ((JOINT, PAIR), (JOINT, BEFORE)),
    ((JOINT, PAIR), (JOINT, RETRIEVER)),
    ((JOINT, PAIR), (TODAY, PAIR)),
    ((JOINT, RETRIEVER), (TODAY, RETRIEVER)),
    ((JOINT, RETRIEVER), (APART, RETRIEVER)),
    ((JOINT, PAIR), (APART, PAIR)),
)


def main() -> None:
    options = arguments().parse_args()
    dataset = load_dataset(options.data)
    settings = [f"data.questions={options.questions}", f"seed={options.seed}", "evaluation.split=null", *options.set]
    recipe = load_recipe(options.recipe, settings)
    path = options.out / "measured.json"
    told = {name: str(value) for name, value in vars(options).items()} | {"data": dataset.fingerprint}
    kept: dict[str, Any] = read_json(path) if path.exists() else {"options": told, "pairs": {}}
    if kept["options"] != told:
        raise SystemExit(
            f"{path} was measured with other options ({kept['options']}); choose another place for --out."
        )
    measured = kept["pairs"]

    def joint() -> tuple[Bundle, dict[str, float] | None]:
        return train(dataset, options.out / "joint", recipe), None

    def apart() -> tuple[Bundle, dict[str, float] | None]:
        run = options.out / "apart"
        if not run.exists():
            with whole_folder(run) as partial:
                shutil.copytree(options.out / "joint" / "stages", partial / "stages")
        return train(dataset, run, load_recipe(options.recipe, [*settings, *ALONE])), None

    def today() -> tuple[Bundle, dict[str, float] | None]:
        from claims.today import train_today  # needs the extra `data`

        budget = sum(measured[JOINT]["work"].values())
        return train_today(dataset, recipe, options.out / "today", budget, options.mining)

    pairs: dict[str, Callable[[], tuple[Bundle, dict[str, float] | None]]] = {
        JOINT: joint, APART: apart, TODAY: today,
    }  # fmt: skip
    for name, make in pairs.items():
        if name not in measured:
            bundle, work = make()
            work = work or stage_seconds(bundle.folder.parent, len(dataset.passages), speeds(bundle, dataset))
            bundle = at(bundle, options.precision, dataset)
            learnt = rank_stages(bundle, dataset, "dev", options.depth).learn()
            rankings = rank_stages(bundle, dataset, "test", options.depth)
            values = {stage: values_of(dataset, run) for stage, run in rankings.final(learnt).items()}
            measured[name] = {"work": work, "blend": learnt.blend, "values": values} | surroundings()
            write_json(path, kept)
    print(table(measured))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout, with the splits train, dev and test")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and for measured.json")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe, as in `tandemqa train`")
    parser.add_argument("--questions", type=int, default=800, help="training questions")
    parser.add_argument("--depth", type=int, default=20, help="candidates that are re-ranked")
    parser.add_argument("--mining", choices=["before", "after", "twice"], default="after",
                        help="when sentence-transformers mines its negatives")  # fmt: skip
    parser.add_argument("--precision", choices=["auto", "fp32", "int8"], default="auto",
                        help="what the trained models compute in when they are measured")  # fmt: skip
    parser.add_argument("--seed", type=int, default=13)
    return parser


def speeds(bundle: Bundle, dataset: Dataset) -> dict[str, float]:
    """Passages and pairs a second in the precision of the training, by some of each."""
    random = np.random.default_rng(0)
    tokens, known = passage_tokens(dataset, bundle.retriever.tokenizer), list(dataset.queries)[:SOME_QUESTIONS]
    rows = random.permutation(len(tokens))[:SOME].astype(np.int32)
    started = time.monotonic()
    bundle.retriever.encode([tokens[row] for row in rows], "passage")
    passages = len(rows) / (time.monotonic() - started)
    rows = random.integers(len(tokens), size=(len(known), SOME // len(known)), dtype=np.int32)
    queries = bundle.reranker.tokenize([dataset.queries[query_id] for query_id in known])
    started = time.monotonic()
    reranker_scores(bundle.reranker, Run(known, rows, np.zeros(rows.shape, np.float32)), queries, tokens)
    return {"passages a second": passages, "pairs a second": rows.size / (time.monotonic() - started)}


def at(bundle: Bundle, precision: Precision, dataset: Dataset) -> Bundle:
    """The pair in the precision that it is measured in."""
    if precision == "int8" and not bundle.calibrated:
        bundle.calibrate(list(dataset.queries.values()), [passage.full for passage in dataset.passages])
    return bundle.at(precision)


def values_of(dataset: Dataset, run: Run) -> dict[str, list[float]]:
    """Every metric's value for each test question."""
    figures = evaluate_run(run, dataset.judged("test"), dataset.passages.row, list(METRICS))
    return {metric: np.asarray(values).round(6).tolist() for metric, values in figures.items()}


def table(measured: dict[str, Any]) -> str:
    """The pairs' figures and their differences in MRR@10, as markdown."""
    rows = [f"| | {' | '.join(METRICS.values())} | training, minutes |", "|---" * (2 + len(METRICS)) + "|"]
    rows.append(f"| {SHOWN[BEFORE]} | {_figures(measured[JOINT]['values'][BEFORE])} | |")
    for name, found in measured.items():
        minutes = sum(found["work"].values()) / 60
        for stage in (RETRIEVER, PAIR):
            rows.append(f"| {name}: {SHOWN[stage]} | {_figures(found['values'][stage])} | {minutes:.1f} |")
    rows += ["", "| difference in MRR@10 | against | | p (Holm) |", "|---|---|---|---|"]
    values = [[np.array(measured[name]["values"][stage]["mrr@10"]) for name, stage in each] for each in DIFFERENCES]
    corrected = holm([randomisation_test(other, this, 0) for this, other in values])
    for (first, second), (this, other), p in zip(DIFFERENCES, values, corrected, strict=True):
        low, high = paired_interval(other, this, 0)
        rows.append(
            f"| {first[0]}: {SHOWN[first[1]]} | {second[0]}: {SHOWN[second[1]]} | "
            f"{(this - other).mean():+.3f} ({low:+.3f} to {high:+.3f}) | {p:.4f} |"
        )
    return "\n".join(rows)


def _figures(values: dict[str, list[float]]) -> str:
    low, high = bootstrap_interval(np.array(values["mrr@10"]), 0)
    figures = [f"{np.mean(values[metric]):.3f}" for metric in METRICS]
    return " | ".join([f"{figures[0]} ({low:.3f} to {high:.3f})", *figures[1:]])


if __name__ == "__main__":
    main()
