"""Commands that measure."""

from pathlib import Path
from typing import Annotated

import typer

from tandemqa.cli.root import AsJson, BundlePath, DataPath, Precisely, app, print_json


@app.command()
def evaluate(
    bundle: BundlePath,
    data: DataPath,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Questions to measure on: qrels/SPLIT.tsv.")] = "test",
    k: Annotated[int, typer.Option("-k", metavar="N", help="Candidates that are re-ranked.")] = 50,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each stage's ranking as DIR/STAGE.trec, and DIR/qrels.txt."),
    ] = None,
    precision: Precisely = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure every stage on the judged questions of a split.

    BM25, the retriever before and after training, both fused (hybrid), and the re-ranked candidates: the mean of
    MRR@10, R@1 and R@20 with a 95 % interval; --json adds nDCG@10 and R@50.

    \b
    Examples:
      tandemqa evaluate run data --split test
      tandemqa evaluate run data --split dev -k 100 --run-dir rankings --json
    """
    from tandemqa.evaluation.stages import evaluate as measure

    report = measure(bundle, data, split, k, run_dir, precision)
    if as_json:
        print_json(report.as_json())
    else:
        typer.echo(report.table())


@app.command()
def tune(
    bundle: BundlePath,
    data: DataPath,
    p95_ms: Annotated[
        float,
        typer.Option(metavar="MS", help="Milliseconds within which 95 % of the questions must be answered."),
    ],
    index: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="INDEX",
            help="An index to choose settings for, repeatable; indexes of DATA are made in the cache if not given.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Questions to measure on: qrels/SPLIT.tsv.")] = "dev",
    questions: Annotated[
        int, typer.Option(metavar="N", help="Questions that quality is measured on, drawn from the split.")
    ] = 200,
    k: Annotated[int, typer.Option("-k", metavar="N", help="Passages shown of each question.")] = 5,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw quality against latency: .svg or .png; needs the extra `report`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the settings of search: the best that are fast enough.

    Measures quality (MRR@10, nDCG@10) and latency (from a question to its answers, one at a time) over how many
    candidates are re-ranked, who finds them, when re-ranking stops early, and the structure and precision of the
    index. Prints the settings that none beats in both. The best within the limit goes into BUNDLE: `search` then uses
    it where it is not told otherwise, and `index` builds the structure and precision of it. A faster setting is
    preferred to the best only if it surely loses less than 0.005 of MRR@10. Measure on the machine that will search,
    with nothing else running.

    \b
    Examples:
      tandemqa tune run data --p95-ms 80
      tandemqa tune run data --p95-ms 200 --index my-index --plot front.svg
    """
    from tandemqa.evaluation.tuning import tune as run_tuning

    if plot is not None:
        from tandemqa.report import front

        front.check_place(plot)
    tuning = run_tuning(bundle, data, p95_ms, index or (), split, questions, k)
    if plot is not None:
        front.draw_front(tuning, plot)
    if as_json:
        print_json(tuning.as_json())
        return
    typer.echo(tuning.table())
    typer.echo()
    if index:
        typer.echo(f"`tandemqa search {tuning.chosen.searcher.index.folder}` now uses what was chosen.")
    else:
        typer.echo(
            f"`tandemqa search` now uses what was chosen, over the index ({tuning.tuned.vectors}, "
            f"{tuning.tuned.precision}) that this builds: tandemqa index {bundle} {data} --out INDEX"
        )


@app.command()
def compare(
    judgements: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="A folder in BEIR layout, or a file of judgements: TREC's or BEIR's."),
    ],
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="TREC run files; each is held against the first.")
    ],
    split: Annotated[
        str, typer.Option(metavar="SPLIT", help="Judgements of a folder to measure on: qrels/SPLIT.tsv.")
    ] = "test",
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="What to compare: mrr@K, recall@K, ndcg@K or map.")
    ] = "mrr@10",
    per_query: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the metrics of each question as JSON lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare rankings and test their differences.

    Each run's mean with a 95 % interval; then each against the first: the difference with its interval over the same
    questions, the p-value of a randomisation test, the same corrected for the number of runs (Holm), and the
    questions won, tied and lost. A question that a run does not rank counts 0.

    \b
    Examples:
      tandemqa compare data rankings/bm25.trec rankings/re-ranked.trec
      tandemqa compare qrels.txt mine.trec theirs.trec --metric ndcg@10 --per-query values.jsonl
    """
    from tandemqa.evaluation.compare import compare as run_comparison

    comparison = run_comparison(judgements, runs, split, metric)
    if per_query is not None:
        comparison.write_per_query(per_query)
    if as_json:
        print_json(comparison.as_json())
    else:
        typer.echo(comparison.table())
