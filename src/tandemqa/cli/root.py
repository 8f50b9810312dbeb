"""The command line itself: its group of commands, what they share, and how mistakes are told."""

import errno
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from tandemqa.errors import TandemError
from tandemqa.files import NO_ROOM, why_not_written


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
            message, code = f"Error: {_of_the_system(error)}", 2
        except KeyboardInterrupt as error:
            message, code = (
                str(error) or "Interrupted; nothing is left half-written. Give the same command again.",
                130,
            )
        # Told only here: with the exception gone, so are the progress bars, each at the end of a line of its own.
        typer.echo(" ".join(message.splitlines()), err=True)
        raise typer.Exit(code)


def _of_the_system(error: OSError) -> str:
    """A failure in one sentence; where it was not known that a file was being written, it shows from these alone."""
    if error.errno in (*NO_ROOM, errno.EROFS):
        return str(why_not_written(error, error.filename or "the output"))
    return f"{error.strerror or error}: {error.filename or 'reading or writing'}"


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

PRECISIONS = "What the models compute in: auto is bfloat16 where the processor has it; int8 is faster still on \
x86 CPUs with AVX2"
Precisely = Annotated[
    Literal["auto", "fp32", "int8"], typer.Option("--precision", metavar="KIND", help=f"{PRECISIONS}.")
]

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change one setting of the recipe; repeatable."),
]


def main() -> None:
    """Run the command line; warnings are told in one line, as mistakes are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a passage may hold what the terminal's encoding lacks
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {' '.join(str(message).split())}\n"
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


def print_json(value: Any) -> None:
    """Print one JSON document."""
    everything = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not everything))
