"""DPR's Wikipedia: `psgs_w100.tsv`, a table of id, text and title with CSV quoting."""

from pathlib import Path

from tandemqa.data.formats.source import first_line, rows
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import fault
from tandemqa.wording import counted

_HEADER = ["id", "text", "title"]


def fits(source: Path) -> bool:
    return first_line(source).split("\t") == _HEADER


def read(source: Path, split: str, out: Target) -> None:
    """The passages: a corpus alone, to be joined by queries and judgements. `split` is not used."""
    for line, row in rows(source, "\t"):
        if len(row) != 3:
            raise fault(*line, f"{counted(len(row), 'column')}; write id, text and title, with tabs between.")
        name, text, title = row
        if row != _HEADER:
            out.passage(line, title, text, name)
