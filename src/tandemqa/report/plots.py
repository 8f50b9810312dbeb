"""The plots of a report, as SVG to stand inside a page."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tandemqa.evaluation.report import Report
from tandemqa.report.gather import Changes, Confidence, Curve
from tandemqa.wording import counted

# Of Okabe and Ito (2008), told apart with any colour vision.
BLUE, ORANGE = "#0072b2", "#d55e00"
WIDTH = 10.0
LINE_POINTS = 400
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tandemqa",
    "text.parse_math": False,
    "path.simplify": False,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
}
METRICS = {"mrr@10": "MRR@10", "ndcg@10": "nDCG@10", "recall@1": "R@1", "recall@20": "R@20", "recall@50": "R@50"}
TERMS = {"kl": "KL divergence", "reranker": "Re-ranker's own loss", "retriever": "Retriever's own loss"}


@matplotlib.rc_context(STYLE)
def stages_plot(report: Report) -> Markup:
    """The metrics of each stage: dots, with whiskers for their 95 % intervals."""
    stages = list(report.stages)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.33 * len(stages)), layout="constrained")
    panels = figure.subplots(1, len(METRICS), sharey=True)
    places = np.arange(len(stages))[::-1]
    for axes, (metric, name) in zip(panels, METRICS.items(), strict=True):
        figures = [report.stages[stage][metric] for stage in stages]
        means = np.array([each.mean for each in figures])
        lows, highs = np.array([(each.low, each.high) for each in figures]).T
        axes.hlines(places, lows, highs, color=BLUE, linewidth=1.8)
        axes.plot(means, places, "o", color=BLUE, markersize=5)
        axes.set_title(name)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(places, stages)
    panels[0].set_ylim(-0.6, len(stages) - 0.4)
    over = counted(report.questions, f"{report.split} question")
    figure.supxlabel(f"mean over {over} (0 to 1) and its 95 % interval", size=10)
    return _svg(figure, "Metrics of each stage")


@matplotlib.rc_context(STYLE)
def scores_plot(confidence: Confidence) -> Markup:
    """How the re-ranker scores labelled positives and other candidates, with the thresholds as scores."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    for counts, color, name in (
        (confidence.others, ORANGE, "other candidates"),
        (confidence.positives, BLUE, "labelled positives"),
    ):
        total = int(counts.sum())
        shares = 100 * counts / max(1, total)
        axes.stairs(shares, confidence.edges, color=color, fill=True, alpha=0.25)
        axes.stairs(shares, confidence.edges, color=color, linewidth=1.5, label=f"{name} ({total:,})")
    axes.set_xlabel("re-ranker score")
    axes.set_ylabel("share of the group, % per bin")
    axes.set_title("Scores of the candidates")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # the names of the thresholds stand above the bars
    axes.legend(frameon=False)
    if confidence.calibration.slope > 0:
        for name, threshold in (("low", confidence.low), ("high", confidence.high)):
            (score,) = _scores(confidence, [threshold])
            if confidence.edges[0] <= score <= confidence.edges[-1]:
                axes.axvline(score, color="#222222", linestyle="--", linewidth=1.2)
                axes.annotate(
                    f"{name} {threshold:.2f}",
                    (score, 1),
                    (3 if name == "high" else -3, -11),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha="left" if name == "high" else "right",
                )
        marks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]
        if _scores(confidence, marks)[-1] - _scores(confidence, marks)[0] < 0.4 * np.ptp(confidence.edges):
            marks = [0.001, 0.5, 0.999]  # more would run into each other
        above = axes.secondary_xaxis("top")
        above.set_xticks(_scores(confidence, marks), [f"{mark:g}" for mark in marks])
        above.set_xlabel("confidence")
    axes.set_xlim(confidence.edges[0], confidence.edges[-1])
    return _svg(figure, "Distribution of the re-ranker's scores")


@matplotlib.rc_context(STYLE)
def curve_plot(curve: Curve) -> Markup:
    """The course of a training stage: moving averages over what each step was."""
    values = curve.values
    panels = [("Loss", "nats per list", {"loss": BLUE})]
    if "rank_correlation" in values:  # else only one model takes part, and its term is the loss
        panels += [(name, "nats per list, unweighted", {term: BLUE}) for term, name in TERMS.items()]
        panels += [("Agreement of the two", "Spearman's rank correlation", {"rank_correlation": BLUE})]
    norms = {"retriever_gradient_norm": BLUE, "reranker_gradient_norm": ORANGE}
    panels += [
        ("Gradient", "norm", {name: color for name, color in norms.items() if name in values}),
        ("Speed", "tokens per second", {"tokens_per_second": BLUE}),
    ]
    columns = 3 if len(panels) == 3 else 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 2.4 * rows), layout="constrained")
    for number, (title, unit, series) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        for name, color in series.items():
            label = name.split("_")[0].replace("reranker", "re-ranker")
            _line(axes, curve.steps, values[name], color, label)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=9)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.locator_params(axis="x", nbins=4, integer=True)
    return _svg(figure, f"Training curves of {curve.stage}")


@matplotlib.rc_context(STYLE)
def changes_plot(changes: Changes) -> Markup:
    """The difference on each question, from the largest loss to the largest win."""
    differences = changes.differences
    count = len(differences)
    kept = _thinned(count, 5 * LINE_POINTS)
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    for color, part in ((ORANGE, np.minimum(differences, 0)), (BLUE, np.maximum(differences, 0))):
        axes.fill_between(kept + 1, part[kept], step="mid", color=color, linewidth=0)
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.set_title("Re-ranked against the retriever before training")
    axes.set_xlabel(f"{changes.split} questions, from the largest loss to the largest win")
    axes.set_ylabel("difference in MRR@10")
    axes.set_xlim(0.5, count + 0.5)
    axes.set_ylim(-1.05, 1.05)
    axes.locator_params(axis="x", integer=True)
    return _svg(figure, "Differences in MRR@10, question by question")


def moving_average(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the `window` values around each, of fewer at the ends: float64 of the shape of `values`.

    A value that is not finite, as the norm of a gradient that overflowed, is passed over.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    low = np.maximum(0, places - window // 2)
    high = np.minimum(len(values), places + (window + 1) // 2)
    return np.asarray((sums[high] - sums[low]) / np.maximum(1, counts[high] - counts[low]))


def _line(axes: Axes, steps: NDArray[np.int64], values: NDArray[np.float64], color: str, label: str) -> None:
    kept = _thinned(len(steps), LINE_POINTS)
    # Strokes without length but with round ends are dots, all in one element; each marker would be one of its own.
    x = np.repeat(steps[kept].astype(np.float64), 3)
    y = np.repeat(values[kept], 3)
    x[2::3] = y[2::3] = np.nan
    axes.plot(x, y, color=color, alpha=0.3, linewidth=2.2, solid_capstyle="round")
    smooth = moving_average(values, max(1, len(values) // 20))
    axes.plot(steps[kept], smooth[kept], color=color, linewidth=1.7, label=label)


def _thinned(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of `count` places, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _scores(confidence: Confidence, values: Sequence[float]) -> list[float]:
    """The scores that have these confidences; infinite for 0 and 1."""
    slope, offset = confidence.calibration
    with np.errstate(divide="ignore"):
        logits = np.log(values) - np.log1p(-np.asarray(values))
    return [float(logit) for logit in (logits - offset) / slope]


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an <svg> element that is as wide as its place."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    _, _, svg = file.getvalue().partition("<svg ")
    _, _, body = svg.partition(">")
    # Names such as "axes_1", to which nothing refers, come back in every plot of the page.
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    # A hundredth of a point is finer than any screen, and half of the page would be digits.
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    width, height = figure.get_size_inches() * 72
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)
    return start + Markup(body)
