"""From figures to verdicts: what is held against what, how sure the difference is, and what a user should set."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from claims.cells import CELLS, RECIPE, REFERENCE, STEPS, Cell
from tandemqa import load_recipe
from tandemqa.evaluation.significance import holm, paired_interval, randomisation_test
from tandemqa.recipe.stage import leaves

Verdict = Literal["holds", "does not hold here", "undecided"]

# A gain of less than a point of MRR@10 is none that a user should pay for.
WORTHWHILE = 0.01
SIGNIFICANT = 0.05

Results = Mapping[tuple[str, int], Mapping[str, Any]]
"""(cell, seed) -> its file: `about`, `means` by stage and metric, and `values` by stage, of `METRIC`."""


@dataclass(frozen=True)
class Comparison:
    """A cell that should be better at a stage than another, or than another stage (`against_stage`)."""

    cell: str
    against: str
    stage: str
    against_stage: str | None = None


@dataclass(frozen=True)
class Claim:
    """A sentence that holds if every comparison does. `beside` do not count: remedies in case it does not hold, and
    the same at other stages."""

    text: str
    comparisons: tuple[Comparison, ...]
    beside: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A comparison's difference in MRR@10, seeds averaged for each question, with its paired 95 % interval, p of the
    randomisation test, that p corrected for the claim's comparisons (Holm), and the difference with each seed."""

    comparison: Comparison
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    by_seed: dict[int, float]
    questions: int

    @property
    def verdict(self) -> Verdict:
        return judge(self.difference, self.high, self.p_holm)


def judge(difference: float, high: float, p: float) -> Verdict:
    """Holds: better, and not by chance. Does not hold here: worse, and not by chance, or a gain that is worthwhile is
    outside the interval."""
    if p < SIGNIFICANT:
        return "holds" if difference > 0 else "does not hold here"
    return "does not hold here" if high < WORTHWHILE else "undecided"


def together(outcomes: list[Outcome], expected: int) -> Verdict:
    """The verdict on a claim that all its comparisons must bear out; undecided while some are still to be run."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if "does not hold here" in verdicts:
        return "does not hold here"
    return "holds" if verdicts == {"holds"} and len(outcomes) == expected else "undecided"


def outcomes_of(comparisons: tuple[Comparison, ...], results: Results) -> list[Outcome]:
    """The outcomes of those comparisons whose cells have been run."""
    found = [outcome for each in comparisons if (outcome := compared(each, results)) is not None]
    corrected = holm([outcome.p for outcome in found])
    return [replace(outcome, p_holm=p) for outcome, p in zip(found, corrected, strict=True)]


def compared(comparison: Comparison, results: Results) -> Outcome | None:
    """The outcome by itself, over the seeds that both cells have; None if there are none."""
    first = by_seed(results, comparison.against, comparison.against_stage or comparison.stage)
    second = by_seed(results, comparison.cell, comparison.stage)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    means = [np.mean([values[seed] for seed in seeds], axis=0) for values in (first, second)]
    p = randomisation_test(*means, seed=0)
    return Outcome(
        comparison,
        float((means[1] - means[0]).mean()),
        *paired_interval(*means, seed=0),
        p,
        p,
        {seed: float((second[seed] - first[seed]).mean()) for seed in seeds},
        len(means[0]),
    )


def by_seed(results: Results, cell: str, stage: str) -> dict[int, npt.NDArray[np.float64]]:
    """The values of a cell's stage for each seed; a cell that knows no seeds has the same with all of them."""
    found = {
        seed: np.array(result["values"][stage])
        for (name, seed), result in results.items()
        if name == cell and stage in result["values"]
    }
    if CELLS[cell].seeded or not found:
        return found
    return dict.fromkeys((seed for _, seed in results), found[0])


# What to set


def advice(outcome: Outcome, results: Results) -> str:
    """What follows for a user, in a sentence."""
    comparison, verdict = outcome.comparison, outcome.verdict
    cell, against = CELLS[comparison.cell], CELLS[comparison.against]
    not_settled = f"{outcome.questions:,} questions and {_count(outcome.by_seed, 'seed')} do not settle it"
    if cell is against:
        return {
            "holds": "Re-rank.",
            "does not hold here": "Re-ranking does not pay: let it read few candidates (`search --depth`).",
            "undecided": f"{not_settled}: re-rank if its time does not matter.",
        }[verdict]
    this, other = how(cell, against), how(against, cell)
    points = f"{100 * abs(outcome.difference):.1f} points"
    if verdict == "holds":
        return f"Use {this}: {points} better."
    if verdict == "undecided":
        return (
            f"{not_settled}: {'keep what the recipe has' if against.kind == 'trained' else 'either may be better'}."
        )
    if outcome.p_holm < SIGNIFICANT:
        return f"Use {other}: {this} is {points} worse."
    if outcome.low > -WORTHWHILE and _quicker(cell, against, results):
        return f"Use {this}: it takes less time, and no point is lost."
    return f"Use {other}: {this} does not gain a point."


def how(cell: Cell, against: Cell) -> str:
    """The settings in which a cell differs from another, or what it is where one of them is no recipe."""
    if cell.kind != "trained":
        return f"`{cell.name}` ({cell.what})"
    if against.kind != "trained":
        return f"the pair, as `{cell.name}`"
    settings, others = settings_of(cell), settings_of(against)
    keys = dict.fromkeys(setting.partition("=")[0] for setting in (*cell.settings, *against.settings))
    different = [f"`{key}={settings[key]}`" for key in keys if settings[key] != others[key]]
    if cell.steps != against.steps:
        different.append(f"{STEPS * cell.steps:.0f} joint steps" if cell.steps else "no joint training")
    return ", ".join(different)


def settings_of(cell: Cell) -> dict[str, str]:
    """Every setting of a cell's recipe, as YAML; bundles and backbones by their names alone."""
    names = dict(zip(CELLS, CELLS, strict=True)) | {"other": "the-other-backbone", "half": str(STEPS // 2)}
    names["unlabelled"] = "1000"
    common = ("retriever.model=the-backbone", "reranker.model=the-backbone", *REFERENCE)
    recipe = load_recipe(RECIPE, [*common, *(setting.format_map(names) for setting in cell.settings)])
    return {name: yaml.safe_dump(value).partition("\n")[0] for name, value in leaves(recipe.model_dump())}


def _quicker(cell: Cell, against: Cell, results: Results) -> bool:
    """Whether a cell is known to take less time to train than another: with each of two seeds or more of which one
    machine ran both."""
    abouts = [
        {seed: result["about"] for (name, seed), result in results.items() if name == each.name}
        for each in (cell, against)
    ]
    pairs = [
        (first["seconds"], second["seconds"])
        for first, second in ((about, abouts[1].get(seed)) for seed, about in abouts[0].items())
        if second and "seconds" in first and "seconds" in second and first["machine"] == second["machine"]
    ]
    return len(pairs) > 1 and all(first < second for first, second in pairs)


def _count(some: Sized, what: str) -> str:
    return f"{len(some)} {what}{'' if len(some) == 1 else 's'}"
