"""Commands on datasets, and on what a folder holds."""

from pathlib import Path
from typing import Annotated

import typer

from tandemqa.cli.root import AsJson, DataPath, app, print_json
from tandemqa.terminal import printable
from tandemqa.wording import counted


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A file or folder in one of the formats, hf:NAME or ir:ID.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder to write in BEIR layout; a dataset there is replaced, its questions only by others.",
        ),
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
      passages       CSV, TSV or JSONL with text (or passage) and, if there, id
                     and title: a corpus alone; other columns become metadata
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
      tandemqa convert documents.csv --out data
      tandemqa convert nq-train.json --out data --format dpr
    """
    from tandemqa.data.formats.convert import convert as run_conversion

    about = run_conversion(source, out, format, split)
    if as_json:
        print_json(about)
        return
    passages, questions = counted(about["passages"], "passage"), counted(about["questions"], "question")
    typer.echo(f"Converted {passages} and {questions} ({about['format']}).")
    for name, counts in about["splits"].items():
        positives = counted(counts["positives"], "positive")
        typer.echo(f"  {name}: {positives}, {counts['negatives']:,} judged not relevant")
    if about["splits"]:
        typer.echo(f"The dataset is {out}. Next: tandemqa train {out} --out RUN")
    else:
        typer.echo(f"{out} is a corpus alone. Next: tandemqa index BUNDLE {out} --out INDEX")
        typer.echo("To train or measure on it, put queries.jsonl and qrels/SPLIT.tsv beside it.")


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
        print_json(found.as_json())
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
        print_json(description)
    else:
        typer.echo(as_text(description))
