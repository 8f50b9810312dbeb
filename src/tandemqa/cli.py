"""Every command, thin: what it takes and what it prints; the work is done elsewhere.

Whatever is heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

import json
import os
import shutil
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from tandemqa import processes
from tandemqa.errors import TandemError
from tandemqa.terminal import answer_text, printable


class _Commands(TyperGroup):
    """The commands, with every mistake of a user told in one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TandemError as error:
            message, code = f"Error: {error}", 2
        except BrokenPipeError:
            raise  # Typer ends in silence
        except OSError as error:
            message, code = f"Error: {error.strerror or error}: {error.filename or 'reading or writing'}", 2
        except KeyboardInterrupt as error:
            message, code = (
                str(error) or "Interrupted; nothing is left half-written. Give the same command again.",
                130,
            )
        # Told only here: with the exception gone, so are the progress bars, each at the end of a line of its own.
        typer.echo(" ".join(message.splitlines()), err=True)
        raise typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
BundlePath = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="The trained models: a bundle folder, or the run that `train` wrote."),
]
DataPath = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="A folder in BEIR layout: corpus.jsonl, queries.jsonl and one qrels/SPLIT.tsv for each split.",
    ),
]

IndexPath = Annotated[Path, typer.Argument(metavar="INDEX", help="The folder that `tandemqa index` wrote.")]
MovedBundle = Annotated[
    Path | None,
    typer.Option("--bundle", metavar="BUNDLE", help="Where the models are, if they moved since `tandemqa index`."),
]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one setting of the recipe; repeatable."),
]


def main() -> None:
    """Run the command line."""
    app(prog_name="tandemqa")


def _show_version(wanted: bool) -> None:
    if wanted:
        from tandemqa import __version__

        typer.echo(f"tandemqa {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Question answering in two stages, a retriever and a re-ranker trained together.

    \b
    The way from your data to an answer:
      tandemqa convert SOURCE --out DATA     bring other data into its layout
      tandemqa train DATA --out RUN          train both models, measure them
      tandemqa index RUN DATA --out INDEX    make the passages searchable
      tandemqa search INDEX "a question"     ask

    `tandemqa demo` shows it all on the documentation of Python. Results go to standard output, progress to
    standard error; a mistake in the input ends a command with one line and exit code 2.
    """
    # Read when transformers is first imported: its own bars and warnings would break into ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A file or folder in one of the formats, hf:NAME or ir:ID.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder to write in BEIR layout; a dataset there is replaced.")
    ],
    format: Annotated[
        str, typer.Option(metavar="NAME", help="The format; auto tells it from file names and first lines.")
    ] = "auto",
    split: Annotated[
        str, typer.Option(metavar="SPLIT", help="The split where the source tells none; for hf, the one to read.")
    ] = "train",
    as_json: AsJson = False,
) -> None:
    """Convert data of other formats to BEIR layout.

    \b
    Formats:
      beir           folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv
      msmarco        folder with collection.tsv, queries*.tsv, qrels*.tsv and,
                     if there, qidpidtriples*.tsv; file names tell the splits
      dpr            JSON list of question, positive_ctxs, hard_negative_ctxs
                     and negative_ctxs
      dpr-wikipedia  psgs_w100.tsv, a corpus alone
      rocketqa       lines of query, title, passage, label; or of query, title,
                     positive, title, hard negative, 0; with tabs between
      pairs          CSV, TSV or JSONL with question and passage and, if there,
                     title, score, negatives (or negative, negative_1, ...)
      hf             hf:NAME, a Parquet file or a saved dataset, with the columns
                     of pairs; needs pip install 'tandemqa[data]'
      ir             ir:ID of the package ir_datasets; needs the same

    A hard negative of the source becomes a row of qrels with score 0: judged, not relevant. Passages without an id
    are identified by their content, so the same passage twice becomes one; a pair judged twice keeps its highest
    score. The folder is written whole or not at all.

    \b
    Examples:
      tandemqa convert msmarco --out data
      tandemqa convert faq.csv --out data --split test
      tandemqa convert nq-train.json --out data --format dpr
    """
    from tandemqa.data.formats.convert import convert as run_conversion

    about = run_conversion(source, out, format, split)
    if as_json:
        _print_json(about)
        return
    typer.echo(f"Converted {about['passages']:,} passages and {about['questions']:,} questions ({about['format']}).")
    for name, counts in about["splits"].items():
        typer.echo(f"  {name}: {counts['positives']:,} positives, {counts['negatives']:,} judged not relevant")
    if about["splits"]:
        typer.echo(f"The dataset is {out}. Next: tandemqa train {out} --out RUN")
    else:
        typer.echo(f"{out} is a corpus alone; put queries.jsonl and qrels/SPLIT.tsv beside it to use it.")


@app.command()
def train(
    data: DataPath,
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="Folder of the run: the bundle in RUN/bundle, work in RUN/stages.")
    ],
    recipe: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A ready recipe by name, or a YAML file of your own.")
    ] = "quick",
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
        _print_json({"bundle": str(bundle.folder), **bundle.about})
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
      tandemqa plan quick data --out run
      tandemqa plan rocketqa-v2 data --out run --set lists.low=0.2
    """
    from tandemqa.data.dataset import load_dataset
    from tandemqa.recipe.config import load_recipe
    from tandemqa.recipe.plan import plan as make_plan

    planned = make_plan(load_dataset(data), load_recipe(recipe, settings or ()), out)
    if as_json:
        _print_json([asdict(stage) for stage in planned])
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
        _print_json(found)
        return
    if not found:
        typer.echo(f"There is no training run in {folder}.")
    for run in found:
        done = sum(state == "complete" for state in run["stages"].values())
        figures = ", ".join(f"{stage} {value:.3f}" for stage, value in run["mrr@10"].items())
        typer.echo(f"{run['run']}  {run['questions']:,} questions of {run['data']}")
        typer.echo(f"  {done} of {len(run['stages'])} stages{'; MRR@10 ' + figures if figures else ''}")


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
        _print_json(asdict(explanation))
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
        _print_json({"report": str(page)})
    else:
        typer.echo(f"The report is {page}; open it in a browser.")


@app.command()
def bundle(
    retriever: Annotated[
        str, typer.Option(metavar="MODEL", help="A sentence-transformers model: a folder, a hub id, or a bundle.")
    ],
    reranker: Annotated[str, typer.Option(metavar="MODEL", help="A cross-encoder with one score, likewise.")],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Folder to write; a bundle already there is replaced.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DATA", help="A folder in BEIR layout, to measure on and learn how to search."),
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="The questions of DATA to learn on.")] = "dev",
    k: Annotated[int, typer.Option("-k", metavar="N", help="Candidates that are re-ranked on DATA.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Make a bundle of two models, wherever they were trained.

    The retriever's pooling, prompts ("query: "), layers and length are read from its files; what cannot be read
    exactly is refused. With DATA, the pair is measured and learns what a trained one does at its end: the weights of
    both scores, when no answer is good, and when re-ranking may stop.

    \b
    Examples:
      tandemqa bundle --retriever intfloat/e5-small-v2 --reranker BAAI/bge-reranker-base --out my-bundle
      tandemqa bundle --retriever run --reranker /models/my-cross-encoder --out my-bundle --data data
    """
    from tandemqa.evaluation.pair import make_bundle
    from tandemqa.evaluation.report import Report

    made = make_bundle(retriever, reranker, out, data, split, k)
    if as_json:
        _print_json({"bundle": str(made.folder), **made.about})
        return
    if "metrics" in made.about:
        typer.echo(Report.from_json(made.about["metrics"]).table())
        typer.echo()
    typer.echo(f"The bundle is {made.folder}. Next: tandemqa index {out} DATA --out INDEX")


@app.command()
def index(
    bundle: BundlePath,
    data: DataPath,
    out: Annotated[Path, typer.Option(metavar="INDEX", help="Folder to write; an index already there is replaced.")],
    vectors: Annotated[
        Literal["auto", "exact", "ivf", "hnsw"],
        typer.Option(
            metavar="KIND",
            help="exact compares all vectors, ivf or hnsw fewer; auto is exact up to a million passages, then ivf.",
        ),
    ] = "auto",
    storage: Annotated[
        Literal["auto", "fp16", "int8"],
        typer.Option(
            metavar="KIND",
            help="Vectors in fp16 or int8; auto is fp16 for exact search, int8 for the others.",
        ),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Make the passages of DATA searchable.

    With the models of BUNDLE. Of DATA only corpus.jsonl is needed; fields beside _id, title and text, or in an object
    `metadata`, can be searched by with --where. The folder holds vectors, a BM25 index, the texts and their tokens;
    it appears when it is complete, and an interrupted command goes on where it stopped. It remembers where the
    bundle lies; search needs both.

    \b
    Examples:
      tandemqa index run data --out my-index
      tandemqa index run data --out my-index --vectors hnsw --storage int8
    """
    from tandemqa.index.build import build
    from tandemqa.index.index import describe_index

    started = time.perf_counter()
    build(bundle, data, out, vectors, storage)
    about = describe_index(out)
    if as_json:
        _print_json({"index": str(out), **about})
        return
    size = sum(about["files"].values()) / 1e6
    seconds = time.perf_counter() - started
    typer.echo(f"Indexed {about['passages']:,} passages in {seconds:.1f} s, {size:,.1f} MB.")
    typer.echo(f'The index is {out}. Next: tandemqa search {out} "your question"')


@app.command()
def add(
    index: IndexPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Passages, a line each, as in corpus.jsonl.")],
    bundle: MovedBundle = None,
    as_json: AsJson = False,
) -> None:
    """Add passages to an index.

    One whose _id is in the index takes the place of the old one. The file is checked before the first passage is
    added; searches that begin afterwards see them. After many additions, `compact` makes search fast again.

    \b
    Example:
      tandemqa add my-index new.jsonl
    """
    from tandemqa.index.update import add_passages

    added = add_passages(index, file, bundle)
    if as_json:
        _print_json({"index": str(index), **asdict(added)})
    else:
        typer.echo(f"Added {added.passages:,} passages, {added.replaced:,} of them in the place of others.")


@app.command()
def delete(
    index: IndexPath,
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="The _id of a passage; several may be given.")],
    as_json: AsJson = False,
) -> None:
    """Delete passages from an index.

    Searches that begin afterwards no longer find them; `compact` gives their space back. An id that is not there is
    passed over.

    \b
    Example:
      tandemqa delete my-index p17 p18
    """
    from tandemqa.index.update import delete_passages

    count = delete_passages(index, ids)
    if as_json:
        _print_json({"index": str(index), "deleted": count})
    else:
        missing = len(set(ids)) - count
        typer.echo(f"Deleted {count:,} passages{f'; {missing:,} ids were not there' if missing else ''}.")


@app.command()
def compact(index: IndexPath, as_json: AsJson = False) -> None:
    """Tidy an index up after changes.

    Joins what was added into one part and removes what was deleted, without encoding anything again. Searches go on
    meanwhile.

    \b
    Example:
      tandemqa compact my-index
    """
    from tandemqa.index.update import compact as run_compaction

    changed = run_compaction(index)
    if as_json:
        _print_json({"index": str(index), "changed": changed})
    else:
        typer.echo(f"{index} is {'now in' if changed else 'already in'} one part.")


@app.command()
def search(
    index: IndexPath,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.")],
    k: Annotated[int, typer.Option("-k", metavar="N", help="Passages to show.")] = 5,
    depth: Annotated[int, typer.Option(metavar="N", help="Candidates that the re-ranker reads; at least k.")] = 50,
    mode: Annotated[
        str, typer.Option(metavar="MODE", help="Who finds the candidates: dense (the retriever), bm25, or hybrid.")
    ] = "dense",
    stopping: Annotated[
        float,
        typer.Option(metavar="X", help="From 0, which re-ranks all candidates, to 1: end re-ranking sooner."),
    ] = 0.0,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="Only passages with lang=en, year>=2001, ...; repeatable, all hold."),
    ] = None,
    bundle: MovedBundle = None,
    as_json: AsJson = False,
) -> None:
    """Answer a question from an index.

    The retriever (or BM25, or both) finds candidates, the re-ranker puts the best of them first; the sentence of each
    that answers best is in bold. A bundle that was measured on dev questions tells when no answer is good, and what a
    stopping of 0.01, 0.02, ... loses (`tandemqa inspect BUNDLE`).

    \b
    Examples:
      tandemqa search my-index "how long does the flu last" -k 3
      tandemqa search my-index "ICD-10 J11" --mode hybrid
      tandemqa search my-index "how long does the flu last" --json | jq '.hits[0].text'
      tandemqa search my-index "flu vaccines" --where "year>=2001" --where lang=en
    """
    from tandemqa.evaluation.report import Report
    from tandemqa.search.searcher import Searcher

    searcher = Searcher(index, bundle)
    metrics = searcher.bundle.about.get("metrics")
    if metrics is not None and Report.from_json(metrics).reranking_hurts:
        typer.echo("Warning: on the dev questions re-ranking made this bundle's ranking worse.", err=True)
    answer = searcher.search(question, k, depth, mode, stopping, where or ())  # type: ignore[arg-type]
    if as_json:
        _print_json(asdict(answer))
    else:
        typer.echo(answer_text(answer, min(shutil.get_terminal_size().columns, 100)))


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

    report = measure(bundle, data, split, k, run_dir)
    if as_json:
        _print_json(report.as_json())
    else:
        typer.echo(report.table())


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
        _print_json(comparison.as_json())
    else:
        typer.echo(comparison.table())


@app.command()
def leaks(
    data: DataPath,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Questions to check: qrels/SPLIT.tsv.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Find what makes the figures of a dataset too good, or too bad.

    Questions of the split that are training questions too, word for word or nearly; titles that give the answer
    away; copies of a positive that are not judged. Text shows a few of each, --json all of them.

    \b
    Examples:
      tandemqa leaks data
      tandemqa leaks data --split dev --json
    """
    from tandemqa.data.dataset import load_dataset
    from tandemqa.data.leaks import find_leaks

    found = find_leaks(load_dataset(data), split)
    if as_json:
        _print_json(found.as_json())
    else:
        typer.echo("\n".join(printable(line) for line in found.text().split("\n")))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A dataset, a bundle, a training run or an index.")],
    as_json: AsJson = False,
) -> None:
    """Say what a folder holds.

    Checks on the way that nothing in it is missing or cut short.

    \b
    Examples:
      tandemqa inspect data
      tandemqa inspect run --json
    """
    from tandemqa.describe import as_text, describe

    description = describe(path)
    if as_json:
        _print_json(description)
    else:
        typer.echo(as_text(description))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the data, the models and the index.")] = Path(
        "runs/demo"
    ),
    as_json: AsJson = False,
) -> None:
    """Ask Python: the whole way, on the documentation of Python.

    Trains on what every Python ships, measures, and answers three questions. Takes a few minutes on
    two cores and needs no download.

    \b
    Example:
      tandemqa demo
    """
    from tandemqa.demo.run import run_demo

    run_demo(out, as_json)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
