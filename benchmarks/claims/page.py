"""What the grid has shown so far, as markdown and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from claims.cells import BACKBONES, CELLS, DEPTH, LENGTHS, SETS, STEPS, Job
from claims.measure import METRICS, STAGES
from claims.place import Place
from claims.statements import CLAIMS
from claims.verdicts import Outcome, Results, Verdict, advice, by_seed, outcomes_of, together
from tandemqa.evaluation.metrics import bootstrap_interval
from tandemqa.files import whole_file
from tandemqa.report.plots import BLUE, ORANGE, STYLE

COLOURS: dict[Verdict, str] = {"holds": BLUE, "does not hold here": ORANGE, "undecided": "#777777"}
SIZES = (4, 8, 16, 32, 64)
STRENGTHS = {"a quarter": "weak-", "all drawn": "", "whole set": "strong-"}


def read_results(place: Place) -> Results:
    """The cells that have been measured, with their present settings."""
    found = {}
    for path in sorted(place.result(Job(CELLS["base"], 0)).parent.glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        if name in CELLS and place.done(job := Job(CELLS[name], int(seed))):
            found[name, int(seed)] = place.load(job)
    return found


def write_page(places: Sequence[Place], folder: Path) -> Path:
    """`folder/claims.md` and its plots, of the places that have results."""
    measured = [(place, results) for place in places if (results := read_results(place))]
    letters = _letters(measured)
    parts = [_head(measured, letters), _glance(measured)]
    for place, results in measured:
        name = f"{place.name}-{place.backbone}"
        outcomes = {claim.text: outcomes_of(claim.comparisons, results) for claim in CLAIMS}
        _save(_forest(outcomes), folder / f"{name}-claims.svg")
        plots = [f"![Differences]({name}-claims.svg)"]
        for kind, figure in (("lists", _lists_plot(results)), ("teachers", _teachers_plot(results))):
            if figure is not None:
                _save(figure, folder / f"{name}-{kind}.svg")
                plots.append(f"![{kind}]({name}-{kind}.svg)")
        parts += [_place_head(place, results), _claims(results), *plots, *_figures(results, letters)]
    with whole_file(folder / "claims.md") as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return folder / "claims.md"


def _head(measured: Sequence[tuple[Place, Results]], letters: dict[str, str]) -> str:
    abouts = [result["about"] for _, results in measured for result in results.values()]
    said = {
        name: ", ".join(sorted({str(about[name]) for about in abouts})) for name in ("commit", "threads", "torch")
    }
    machines = "; ".join(f"{letter}: {name}" for name, letter in letters.items())
    return f"""# The paper's claims, measured

    python benchmarks/claims.py run --work WORK
    python benchmarks/claims.py table --work WORK

Commit {said["commit"]}; {said["threads"]} thread a cell, torch {said["torch"]}; machines: {machines}.
All figures are of dev questions, over all passages of a set; test questions were not looked at.

A cell differs from the reference, `dynamic`, in what its line says. The reference is the recipe `quick` with the
paper's loss (`loss.retriever_weight: 0`), {STEPS} joint steps, and texts cut at half of its lengths
({", ".join(f"`{each}`" for each in LENGTHS)}). A seed draws the training questions too. The retriever
ranks all passages. The re-ranker alone orders the same candidates in all cells: the untouched base model's top
{DEPTH}, and the positives that are not among them. End to end it orders the top {DEPTH} of its own retriever, whose
score counts by a share that was learnt on the other half of the questions. Differences are in MRR@10, the seeds
averaged for each question; intervals are 95 %, by resampling questions; p is the paired randomisation test's,
corrected for the comparisons of a claim (Holm). They tell of other questions, not of other training runs: see the
single seeds for those. "Training" is the time of all steps, whichever cell made them, those behind a bundle
that a cell starts from included, and of mining and scoring, at the speed measured afterwards; a letter tells the
machine, and times of different machines do not compare; two cells ran beside each other, and now and then other work,
so that a time may be half too long. Where one machine trained in bfloat16 and the other in float32, that too is in a
difference between their cells.

A claim **holds** if all its comparisons are better with p < 0.05. It **does not hold here** if one is worse with
p < 0.05, or a gain of a point lies outside its interval. Else it is **undecided**, also while a comparison has not
been run. What stands "beside", remedies in case it does not hold and the same at other stages, does not count."""


def _glance(measured: Sequence[tuple[Place, Results]]) -> str:
    """The verdict on every claim in every place."""
    titles = [f"{place.name}, {place.backbone}" for place, _ in measured]
    rows = [f"| claim | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for claim in CLAIMS:
        told = []
        for _, results in measured:
            outcomes = outcomes_of(claim.comparisons, results)
            told.append(together(outcomes, len(claim.comparisons)) if outcomes else "not run")
        rows.append(f"| {claim.text} | {' | '.join(told)} |")
    return "\n".join(rows)


def _letters(measured: Sequence[tuple[Place, Results]]) -> dict[str, str]:
    """A letter for each machine."""
    machines = sorted({result["about"]["machine"] for _, results in measured for result in results.values()})
    return {machine: chr(ord("A") + number) for number, machine in enumerate(machines)}


def _place_head(place: Place, results: Results) -> str:
    cells, seeds = {name for name, _ in results}, sorted({seed for _, seed in results})
    told = (
        f"{place.set.questions:,} training questions a seed, {len(place.query_ids):,} dev questions, "
        f"{len(place.dataset.passages):,} passages; {len(cells)} of {len(CELLS)} cells, seeds "
        f"{', '.join(map(str, seeds))}."
    )
    note = SETS[place.name].note
    return f"## {place.name}, {BACKBONES[place.backbone]}\n\n{told}{' ' + note if note else ''}"


def _claims(results: Results) -> str:
    rows = [
        "| claim | comparison | stage | difference | p (Holm) | single seeds | verdict | what to set |",
        "|---" * 8 + "|",
    ]
    for claim in CLAIMS:
        outcomes = outcomes_of(claim.comparisons, results)
        beside = outcomes_of(claim.beside, results)
        if not outcomes and not beside:
            continue
        verdict = together(outcomes, len(claim.comparisons))
        open_ = len(claim.comparisons) - len(outcomes)
        missing = f", {open_} comparison{'s' if open_ > 1 else ''} to be run" if open_ else ""
        rows.append(f"| **{claim.text}** | | | | | | **{verdict}**{missing} | |")
        rows += [_row(outcome, results, "") for outcome in outcomes]
        rows += [_row(outcome, results, "beside: ") for outcome in beside]
    return "\n".join(rows)


def _row(outcome: Outcome, results: Results, prefix: str) -> str:
    return (
        f"| | {prefix}{_versus(outcome)} | {STAGES[outcome.comparison.stage]} | {outcome.difference:+.3f} "
        f"({outcome.low:+.3f} to {outcome.high:+.3f}) | {outcome.p_holm:.4f} | "
        f"{', '.join(f'{each:+.3f}' for each in outcome.by_seed.values())} | {outcome.verdict} | "
        f"{advice(outcome, results)} |"
    )


def _versus(outcome: Outcome) -> str:
    comparison = outcome.comparison
    if comparison.against_stage:
        return f"`{comparison.cell}` against its {STAGES[comparison.against_stage]}"
    return f"`{comparison.cell}` against `{comparison.against}`"


def _figures(results: Results, letters: dict[str, str]) -> list[str]:
    """A table a stage: every cell, the mean over its seeds, of MRR@10 with its interval."""
    tables = []
    for stage, title in STAGES.items():
        rows = [
            f"### {title[0].upper()}{title[1:]}",
            "",
            f"| cell | | seeds | {' | '.join(METRICS.values())} | training, minutes |",
            "|---" * (4 + len(METRICS)) + "|",
        ]
        for name, cell in CELLS.items():
            seeds = sorted(seed for other, seed in results if other == name)
            if not seeds or stage not in results[name, seeds[0]]["values"]:
                continue
            low, high = bootstrap_interval(
                np.mean([results[name, seed]["values"][stage] for seed in seeds], axis=0), 0
            )
            figures = [
                f"{np.mean([results[name, seed]['means'][stage][metric] for seed in seeds]):.3f}"
                for metric in METRICS
            ]
            figures[0] += f" ({low:.3f} to {high:.3f})"
            minutes = _minutes([results[name, seed]["about"] for seed in seeds], letters)
            rows.append(f"| `{name}` | {cell.what} | {len(seeds)} | {' | '.join(figures)} | {minutes} |")
        tables.append("\n".join(rows))
    return tables


def _minutes(abouts: Sequence[Mapping[str, Any]], letters: dict[str, str]) -> str:
    """How long the training took on each machine, the mean of its seeds."""
    told = []
    for machine, letter in letters.items():
        seconds = [about["seconds"] for about in abouts if about["machine"] == machine and "seconds" in about]
        if seconds:
            told.append(f"{np.mean(seconds) / 60:.1f} {letter}")
    return ", ".join(told)


@matplotlib.rc_context(STYLE)
def _forest(outcomes: dict[str, list[Outcome]]) -> Figure:
    """The differences of all claims' comparisons, with their intervals."""
    lines: list[tuple[str, Outcome | None]] = []
    for text, some in outcomes.items():
        if some:
            lines.append((text, None))
            lines += [("", outcome) for outcome in some]
    figure = Figure(figsize=(10, 1 + 0.24 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, (_, outcome) in enumerate(lines):
        if outcome is not None:
            colour = COLOURS[outcome.verdict]
            error = [[outcome.difference - outcome.low], [outcome.high - outcome.difference]]
            axes.errorbar(outcome.difference, -place, xerr=error, fmt="o", color=colour, markersize=5)
    for verdict, colour in COLOURS.items():
        axes.plot([], [], "o-", color=colour, markersize=5, label=verdict)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(COLOURS))
    axes.axvline(0, color="#222222", linewidth=0.8)
    labels = [
        text if outcome is None else f"{_versus(outcome)} ({STAGES[outcome.comparison.stage]})".replace("`", "")
        for text, outcome in lines
    ]
    axes.set_yticks([-place for place in range(len(lines))], labels)
    for label, (_, outcome) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontsize(8.5)
        label.set_fontweight("bold" if outcome is None else "normal")
    axes.grid(visible=False, axis="y")
    axes.set_ylim(-len(lines), 1)
    figure.supxlabel("difference in MRR@10 and its 95 % interval", size=10)
    return figure


@matplotlib.rc_context(STYLE)
def _lists_plot(results: Results) -> Figure | None:
    """MRR@10 by the size of the lists, at equal steps and at equal time."""
    series = {
        "equal steps": (BLUE, [f"lists-{size}" for size in SIZES]),
        "equal time": (ORANGE, ["lists-16" if size == 16 else f"time-{size}" for size in SIZES]),
    }
    labels = [str(size) for size in SIZES]
    return _by_stage(results, series, labels, "passages in a list")


@matplotlib.rc_context(STYLE)
def _teachers_plot(results: Results) -> Figure | None:
    """MRR@10 by how many questions the re-ranker was warmed on."""
    colours = {"dynamic": BLUE, "static": ORANGE, "none": "#777777"}
    series = {
        kind: (colour, [f"{prefix}{kind}" for prefix in STRENGTHS.values()]) for kind, colour in colours.items()
    }
    return _by_stage(results, series, list(STRENGTHS), "questions that warmed the re-ranker")


def _by_stage(
    results: Results, series: dict[str, tuple[str, list[str]]], labels: list[str], what: str
) -> Figure | None:
    """A panel a stage, a line a series; None where a line has not two points."""
    if any(sum(name == cell for name, _ in results) == 0 for _, cells in series.values() for cell in cells[:2]):
        return None
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    stages = list(STAGES)[:3]
    for axes, stage in zip(figure.subplots(1, len(stages)), stages, strict=True):
        for name, (colour, cells) in series.items():
            _line(axes, results, stage, name, colour, cells)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_title(STAGES[stage])
        axes.set_xlabel(what)
    figure.axes[0].set_ylabel("MRR@10 and 95 % interval")
    figure.axes[0].legend(frameon=False)
    return figure


def _line(axes: Axes, results: Results, stage: str, name: str, colour: str, cells: list[str]) -> None:
    places, means, errors = [], [], []
    for place, cell in enumerate(cells):
        values = list(by_seed(results, cell, stage).values())
        if values:
            averaged = np.mean(values, axis=0)
            low, high = bootstrap_interval(averaged, 0)
            places.append(place)
            means.append(averaged.mean())
            errors.append((averaged.mean() - low, high - averaged.mean()))
    axes.errorbar(places, means, np.array(errors).T, color=colour, marker="o", markersize=5, capsize=3, label=name)


def _save(figure: Figure, path: Path) -> None:
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with whole_file(path) as partial, matplotlib.rc_context(STYLE):
        figure.savefig(partial, format="svg", metadata=nothing)
