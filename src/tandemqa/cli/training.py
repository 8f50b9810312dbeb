"""Commands that train, and that tell of training runs."""

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tandemqa import processes
from tandemqa.cli.root import AsJson, DataPath, Settings, app, print_json
from tandemqa.terminal import printable
from tandemqa.wording import counted


@app.command()
def train(
    data: DataPath,
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="Folder of the run: the bundle in RUN/bundle, work in RUN/stages.")
    ],
    recipe: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A ready recipe by name, or a YAML file of your own.")
    ] = "default",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train a retriever and a re-ranker together.

    On the questions of the split `train`: finds candidates, warms the re-ranker up, makes lists, trains both models
    on the same lists, and measures the pair. Stopped and started again with the same arguments, it goes on where it
    stopped; `plan` shows beforehand what would run.

    \b
    Examples:
      tandemqa train data --out run
      tandemqa train data --out run --set joint.epochs=2 --set data.questions=1000
      tandemqa train data --out run --recipe mine.yaml --set retriever.model=/models/my-encoder
      torchrun --nproc-per-node 4 -m tandemqa train data --out run      (one process a GPU)
    """
    from tandemqa.evaluation.report import Report
    from tandemqa.recipe.config import load_recipe
    from tandemqa.recipe.train import train as run_recipe

    bundle = run_recipe(data, out, load_recipe(recipe, settings or ()))
    if not processes.is_main():
        return
    if as_json:
        print_json({"bundle": str(bundle.folder), **bundle.about})
        return
    if "metrics" in bundle.about:
        typer.echo(Report.from_json(bundle.about["metrics"]).table())
        typer.echo()
    typer.echo(f"The bundle is {bundle.folder}. Next: tandemqa index {out} {data} --out INDEX")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A ready recipe or the path of a YAML file.")],
    data: DataPath,
    out: Annotated[Path, typer.Option(metavar="RUN", help="The run that it would continue.")] = Path("run"),
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show what `train` would run, and why, without running it.

    \b
    Examples:
      tandemqa plan default data --out run
      tandemqa plan rocketqa-v2 data --out run --set lists.low=0.2
    """
    from tandemqa.data.dataset import load_dataset
    from tandemqa.recipe.config import load_recipe
    from tandemqa.recipe.plan import plan as make_plan

    planned = make_plan(load_dataset(data), load_recipe(recipe, settings or ()), out)
    if as_json:
        print_json([asdict(stage) for stage in planned])
        return
    for stage in planned:
        typer.echo(f"{'run ' if stage.runs else 'keep'}  {stage.stage:18} {stage.why}")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List training runs: how far each is, and how good.

    \b
    Example:
      tandemqa runs runs
    """
    from tandemqa.recipe.plan import runs as find_runs

    found = find_runs(folder)
    if as_json:
        print_json(found)
        return
    if not found:
        typer.echo(f"There is no training run in {folder}.")
    for run in found:
        done = sum(state == "complete" for state in run["stages"].values())
        figures = ", ".join(f"{stage} {value:.3f}" for stage, value in run["mrr@10"].items())
        measured = f"; MRR@10 on {run['split']}: "
        typer.echo(f"{run['run']}  {counted(run['questions'], 'question')} of {run['data']}")
        typer.echo(f"  {done} of {counted(len(run['stages']), 'stage')}{measured + figures if figures else ''}")


@app.command()
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A training run.")],
    query_id: Annotated[str, typer.Argument(metavar="QUERY_ID", help="A question it was trained on, by its _id.")],
    round_number: Annotated[int, typer.Option("--round", metavar="N", min=1, help="Of a run with rounds.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what became of a training question's candidates, and why.

    Each with its rank and score of the retriever, its score of the re-ranker, and in how many lists it stands.

    \b
    Example:
      tandemqa explain run q17
    """
    from tandemqa.recipe.explain import explain as explain_lists

    explanation = explain_lists(run, query_id, round_number)
    if as_json:
        print_json(asdict(explanation))
        return
    how = " (pseudo-labelled)" if explanation.pseudo_labelled else ""
    typer.echo(printable(f"{explanation.question}{how}"))
    typer.echo("rank  retriever  re-ranker  lists  passage")
    for candidate in explanation.candidates:
        rank = "-" if candidate.rank is None else str(candidate.rank)
        retriever = "-" if candidate.retriever_score is None else f"{candidate.retriever_score:.3f}"
        reranker = "-" if candidate.reranker_score is None else f"{candidate.reranker_score:.2f}"
        name = printable(textwrap.shorten(candidate.title or candidate.id, 60, placeholder="…"))
        typer.echo(f"{rank:>4}  {retriever:>9}  {reranker:>9}  {candidate.lists:>5}  {name}")
        typer.echo(f"{'':35}{candidate.why}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A training run, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page to write; RUN/report.html if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about a training run: figures, curves, examples.

    One HTML file that needs no other: metrics of each stage with their intervals, the re-ranker's confidence of the
    candidates, suspected unlabelled positives to read, training curves, and the questions won and lost against the
    start. Needs pip install 'tandemqa[report]'.

    \b
    Examples:
      tandemqa report run
      tandemqa report run --out page.html
    """
    from tandemqa.report.page import write_report

    page = out or run / "report.html"
    write_report(run, page)
    if as_json:
        print_json({"report": str(page)})
    else:
        typer.echo(f"The report is {page}; open it in a browser.")
