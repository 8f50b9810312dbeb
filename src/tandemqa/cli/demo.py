"""The command that shows it all."""

from pathlib import Path
from typing import Annotated

import typer

from tandemqa.cli.root import AsJson, app


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
