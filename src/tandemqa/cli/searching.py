"""Commands that make passages searchable, change them, and search."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from tandemqa.cli.root import PRECISIONS, AsJson, BundlePath, DataPath, IndexPath, MovedBundle, app, print_json
from tandemqa.terminal import answer_text
from tandemqa.wording import counted


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
    query_prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the retriever reads before a question, if its files do not tell."),
    ] = None,
    passage_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What it reads before a passage, likewise.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a bundle of two models, wherever they were trained.

    The retriever's pooling, prompts, layers and length are read from its files, and what cannot be read exactly is
    refused; some models, such as E5, tell of their prompts on their page alone. Weights are read from safetensors,
    or else from a folder's ONNX graph. With DATA, the pair is measured and learns what a trained one does at its
    end: the weights of both scores, when no answer is good, and when re-ranking may stop.

    \b
    Examples:
      tandemqa bundle --retriever intfloat/e5-small-v2 --query-prompt "query: " --passage-prompt "passage: " \\
        --reranker BAAI/bge-reranker-base --out my-bundle
      tandemqa bundle --retriever run --reranker /models/my-cross-encoder --out my-bundle --data data
    """
    from tandemqa.evaluation.pair import make_bundle
    from tandemqa.evaluation.report import Report

    made = make_bundle(retriever, reranker, out, data, split, k, query_prompt, passage_prompt)
    if as_json:
        print_json({"bundle": str(made.folder), **made.about})
        return
    if "metrics" in made.about:
        typer.echo(Report.from_json(made.about["metrics"]).table())
        typer.echo()
    else:
        typer.echo(
            "Nothing is learnt of how to search, not even what a bundle of these models had; --data learns it."
        )
    typer.echo(f"The bundle is {made.folder}. Next: tandemqa index {out} DATA --out INDEX")


@app.command()
def export(
    bundle: BundlePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; an earlier export is replaced.")],
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Also graphs in int8, for CPUs with AVX512-VNNI: model_qint8_avx512_vnni.onnx."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write both models as ONNX.

    OUT/retriever and OUT/reranker are folders for sentence-transformers with backend="onnx", or for whatever else
    reads onnx/model.onnx. Each graph is compared with torch on padded batches; one that differs is refused. --int8 is
    nearer to float32 once `index --precision int8` has calibrated the bundle. Needs pip install 'tandemqa[onnx]'.

    \b
    Examples:
      tandemqa export run my-onnx
      tandemqa export run my-onnx --int8
    """
    from tandemqa.encoders.onnx_export import export as run_export

    exported = run_export(bundle, out, int8)
    if as_json:
        print_json(asdict(exported) | {"folder": str(exported.folder)})
        return
    typer.echo(f"Exported to {exported.folder}; states differ from torch's by {exported.difference:.1e} at most.")
    if exported.cosine is not None:
        typer.echo(f"In int8 their mean cosine to torch's is {exported.cosine:.4f}.")


@app.command()
def index(
    bundle: BundlePath,
    data: DataPath,
    out: Annotated[Path, typer.Option(metavar="INDEX", help="Folder to write; an index already there is replaced.")],
    vectors: Annotated[
        Literal["auto", "exact", "ivf", "hnsw"] | None,
        typer.Option(
            metavar="KIND",
            help="exact compares all vectors, ivf or hnsw fewer; auto is exact up to a million passages, then ivf. "
            "Usually what `tune` chose, else auto.",
        ),
    ] = None,
    storage: Annotated[
        Literal["auto", "fp16", "int8"],
        typer.Option(
            metavar="KIND",
            help="Vectors in fp16 or int8; auto is fp16 for exact search, int8 for the others.",
        ),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "int8"] | None,
        typer.Option(metavar="KIND", help=f"{PRECISIONS}. Usually what `tune` chose, else auto."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the passages of DATA searchable.

    With the models of BUNDLE. Of DATA only corpus.jsonl is needed; fields beside _id, title and text, or in an object
    `metadata`, can be searched by with --where. The folder holds vectors, a BM25 index, the texts and their tokens;
    it appears when it is complete, and an interrupted command goes on where it stopped. It remembers where the
    bundle lies; search needs both. For int8, which it remembers too, the bundle is first calibrated on texts of DATA.

    \b
    Examples:
      tandemqa index run data --out my-index
      tandemqa index run data --out my-index --vectors hnsw --storage int8
    """
    from tandemqa.index.build import build
    from tandemqa.index.index import describe_index

    started = time.perf_counter()
    build(bundle, data, out, vectors, storage, precision)
    about = describe_index(out)
    if as_json:
        print_json({"index": str(out), **about})
        return
    size = sum(about["files"].values()) / 1e6
    seconds = time.perf_counter() - started
    typer.echo(f"Indexed {counted(about['passages'], 'passage')} in {seconds:.1f} s, {size:,.1f} MB.")
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
        print_json({"index": str(index), **asdict(added)})
    else:
        earlier = counted(added.replaced, "earlier version")
        typer.echo(f"Added {counted(added.passages, 'passage')}; {earlier} replaced.")


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
        print_json({"index": str(index), "deleted": count})
    else:
        missing = len(set(ids)) - count
        unknown = f"; {counted(missing, 'id')} not found" if missing else ""
        typer.echo(f"Deleted {counted(count, 'passage')}{unknown}.")


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
        print_json({"index": str(index), "changed": changed})
    else:
        typer.echo(f"{index} is {'now in' if changed else 'already in'} one part.")


@app.command()
def search(
    index: IndexPath,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.")],
    k: Annotated[int, typer.Option("-k", metavar="N", help="Passages to show.")] = 5,
    depth: Annotated[
        int | None,
        typer.Option(metavar="N", help="Candidates that the re-ranker reads; 0 for none; usually 50."),
    ] = None,
    mode: Annotated[
        Literal["dense", "bm25", "hybrid"] | None,
        typer.Option(
            metavar="MODE", help="Who finds the candidates: dense (the retriever, as usual), bm25, or hybrid."
        ),
    ] = None,
    stopping: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="From 0, which re-ranks all candidates, to 1: end re-ranking sooner, judged by the first hit only.",
        ),
    ] = None,
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
    stopping of 0.01, 0.02, ... loses (`tandemqa inspect BUNDLE`). After `tandemqa tune`, depth, mode and stopping are
    what it chose, where they are not given.

    \b
    Examples:
      tandemqa search my-index "how long does the flu last" -k 3
      tandemqa search my-index "ICD-10 J11" --mode hybrid
      tandemqa search my-index "how long does the flu last" --json | jq '.hits[0].text'
      tandemqa search my-index "flu vaccines" --where "year>=2001" --where lang=en
    """
    from tandemqa.search.searcher import Searcher

    answer = Searcher(index, bundle).search(question, k, depth, mode, stopping, where or ())
    if as_json:
        print_json(asdict(answer))
    else:
        typer.echo(answer_text(answer, min(shutil.get_terminal_size().columns, 100)))
