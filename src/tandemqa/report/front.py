"""Quality against latency of the settings that `tune` measured, drawn into a file."""

from itertools import groupby
from pathlib import Path

from tandemqa.errors import TandemError
from tandemqa.evaluation.tuning import Point, Tuning
from tandemqa.files import whole_file

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tandemqa.report.plots import STYLE, WIDTH
except ModuleNotFoundError as error:
    raise TandemError(
        f"A plot needs the package {error.name}, which is not installed; run: pip install 'tandemqa[report]'"
    ) from error

FORMATS = {".svg": "svg", ".png": "png"}
# Of Okabe and Ito (2008), told apart with any colour vision: one for each index.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = {"dense": "o", "hybrid": "s"}


def check_place(path: Path) -> None:
    """Refuse a name whose ending is no format that is drawn."""
    if path.suffix not in FORMATS:
        raise TandemError(f"{path} is no name of a plot; end it with {' or '.join(FORMATS)}.")


@matplotlib.rc_context(STYLE)
def draw_front(tuning: Tuning, path: Path) -> None:
    """MRR@10 against the 95th percentile of latency: a line over the depths for each index and mode, with the
    number of each depth; the settings that none beats are joined in grey. Small marks are values of the dial, those
    that none beats with depth and value."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    front = [(point.milliseconds(95), point.mean("mrr@10")) for point in tuning.front]
    axes.step(
        *zip(*front, strict=True), where="post", color="#999999", linewidth=6, alpha=0.3, label="none is better"
    )
    indexes = list(dict.fromkeys(point.searcher for point in tuning.points))
    for (searcher, _), points in groupby(tuning.points, key=lambda point: (point.searcher, point.setting.mode)):
        _series(axes, list(points), COLOURS[indexes.index(searcher) % len(COLOURS)], tuning.front)
    tuned = tuning.tuned
    axes.plot(tuned.p95_ms, tuned.mrr, "o", color="#222222", fillstyle="none", markersize=15, label="chosen")
    axes.axvline(
        tuned.limit_ms, color="#222222", linestyle="--", linewidth=1.2, label=f"limit, {tuned.limit_ms:g} ms"
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("p95 of one question, end to end, in milliseconds")
    axes.set_ylabel(f"MRR@10 over {tuned.questions:,} {tuned.split} questions")
    axes.set_title("Quality against latency, by the number of candidates re-ranked (small marks: stopped early)")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    with whole_file(path) as partial:
        figure.savefig(partial, format=FORMATS[path.suffix], dpi=150)


def _series(axes: Axes, points: list[Point], colour: str, front: list[Point]) -> None:
    """The settings over one index in one mode."""
    mode = points[0].setting.mode
    whole = [point for point in points if point.setting.stopping == 0]
    early = [point for point in points if point.setting.stopping > 0]
    places = [(point.milliseconds(95), point.mean("mrr@10")) for point in whole]
    axes.plot(
        *zip(*places, strict=True),
        color=colour,
        marker=MARKERS[mode],
        linestyle="-" if mode == "dense" else "--",
        label=f"{points[0].kind}, {points[0].precision}, {mode}",
    )
    for point, place in zip(whole, places, strict=True):
        _name(axes, str(point.setting.depth), place, colour)
    for point in early:
        place = point.milliseconds(95), point.mean("mrr@10")
        axes.plot(*place, MARKERS[mode], color=colour, markersize=3.5, alpha=0.7)
        if point in front:
            _name(axes, f"{point.setting.depth}, {point.setting.stopping:g}", place, colour)


def _name(axes: Axes, name: str, place: tuple[float, float], colour: str) -> None:
    axes.annotate(name, place, (4, 4), textcoords="offset points", color=colour, fontsize=9)
