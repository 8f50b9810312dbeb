"""The page: the numbers and plots of a run in one HTML file that needs no other."""

from pathlib import Path

from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.lists.build import Verdict
from tandemqa.report.gather import Missing, gather

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from tandemqa.report import plots
except ModuleNotFoundError as error:
    raise TandemError(
        f"A report needs the package {error.name}, which is not installed; run: pip install 'tandemqa[report]'"
    ) from error

WORDS = {
    Verdict.NEGATIVE: "negative: confidence below the low threshold",
    Verdict.DROPPED: "dropped from denoised lists: confidence between the thresholds",
    Verdict.POSITIVE: "further positive: confidence above the high threshold",
    Verdict.UNSCORED: "negative: unlabelled, no score was asked for",
    Verdict.LABELLED: "labelled or pseudo-labelled positive",
    Verdict.SAME_TEXT: "reads like a positive or like a candidate above it",
}


def write_report(run: Path, out: Path) -> None:
    """Write the page about the training run in `run` to `out`; see `gather` for what is refused."""
    facts = gather(run)
    drawn = {
        "stages": None if isinstance(facts.evaluation, Missing) else plots.stages_plot(facts.evaluation),
        "scores": [None if isinstance(each, Missing) else plots.scores_plot(each) for each in facts.confidences],
        "curves": [None if isinstance(curve, Missing) else plots.curve_plot(curve) for curve in facts.curves],
        "changes": None if isinstance(facts.changes, Missing) else plots.changes_plot(facts.changes),
    }
    environment = Environment(
        loader=PackageLoader("tandemqa", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(facts=facts, plots=drawn, words=WORDS, metrics=plots.METRICS)
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")
