"""Long lists: what it saves, and costs, to carry back only the gradient that matters.

    python benchmarks/long_lists.py DATA --out WORK [--questions 96] [--passages 6000]

Lists of 128 (one positive, 127 of the retriever's top 200) for the same pair from the same start; the variants differ
in `joint.grad_keep` alone. Prints the measures of `variants.py`; the share of the tokens that each training read with
gradient; and the time of a list, all variants taking turns on the same lists, with the models as they are before the
joint training and as the first variant leaves them.
"""

import argparse
import json
import statistics
import time

import numpy as np
from variants import arguments, folder_name, run_variants

from tandemqa import load_dataset, load_recipe
from tandemqa.lists.build import TrainingLists
from tandemqa.recipe.materials import Materials
from tandemqa.training.checkpoint import load_weights

VARIANTS = {f"grad_keep {keep}": [f"joint.grad_keep={keep}"] for keep in (1.0, 0.99, 0.95)}
LONG = ["lists.size=128", "lists.depth=200", "mine.depth=200", "joint.batch_lists=4", "loss.retriever_weight=1"]


STEPS, LISTS = 3, 4


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], recipe="quick", questions=96, passages=6000)
    options = parser.parse_args()
    options.set = [*LONG, *options.set]
    run_variants(options, VARIANTS)
    print("\n| variant | tokens read with gradient |\n|---|---|")
    for name in VARIANTS:
        log = options.out / folder_name(name) / "stages" / "joint" / "log.jsonl"
        steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        share = sum(step["gradient_tokens"] for step in steps) / sum(step["padded_tokens"] for step in steps)
        print(f"| {name} | {share:.0%} |")
    side_by_side(options)


def side_by_side(options: argparse.Namespace) -> None:
    """Print the time of a list by variant, and the tokens that it reads with gradient."""
    first, *_ = VARIANTS
    stages = options.out / folder_name(first) / "stages"
    recipe = load_recipe(options.recipe, ["evaluation.split=null", f"seed={options.seed}", *options.set])
    materials = Materials(load_dataset(options.out / "data"), recipe)
    lists = TrainingLists.load(stages / "lists" / "lists.npz")
    print("\n| models | variant | s a list | of the first | tokens read with gradient |\n|---|---|---|---|---|")
    for when, folders in {"before": ("warm_retriever", "warm_reranker"), "after": ("joint", "joint")}.items():
        for model, folder, name in zip(
            (materials.retriever, materials.reranker), folders, ("retriever", "reranker"), strict=True
        ):
            load_weights(stages / folder / f"{name}.safetensors", model)
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        tokens = dict.fromkeys(VARIANTS, 0.0)
        rows = np.random.default_rng(0).permutation(len(lists))
        for step in range(1 + STEPS):  # the first does not count
            for name, (setting,) in VARIANTS.items():
                config = recipe.joint.model_copy(update={"grad_keep": float(setting.partition("=")[2])})
                objective = materials.listwise(lists, recipe.loss, config)
                objective.model.train()
                started = time.perf_counter()
                record = objective.backward(rows[step * LISTS : (step + 1) * LISTS])
                objective.model.zero_grad()
                if step:
                    seconds[name].append((time.perf_counter() - started) / LISTS)
                    tokens[name] += record["gradient_tokens"] / record["padded_tokens"] / STEPS
        whole = statistics.median(seconds[first])
        for name, values in seconds.items():
            own = statistics.median(values)
            print(f"| {when} | {name} | {own:.2f} | {own / whole:.0%} | {tokens[name]:.0%} |", flush=True)


if __name__ == "__main__":
    main()
