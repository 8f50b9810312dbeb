"""Which format a source is in, told from its name, the files in it and its first line."""

from pathlib import Path
from typing import Protocol

from tandemqa.data.formats import beir, dpr, hf, ir, msmarco, pairs, passages, rocketqa, wikipedia
from tandemqa.data.formats.target import Target


class Format(Protocol):
    """What the module of a format holds."""

    def fits(self, source: Path) -> bool:
        """Whether `source` looks like it; only names and a first line are read."""

    def read(self, source: Path, split: str, out: Target) -> None:
        """Write all of `source` to `out`; judgements that name no split go to `split`."""


FORMATS: dict[str, Format] = {
    "beir": beir,
    "msmarco": msmarco,
    "dpr": dpr,
    "dpr-wikipedia": wikipedia,
    "rocketqa": rocketqa,
    "pairs": pairs,
    "passages": passages,
    "hf": hf,
    "ir": ir,
}


def recognise(source: Path) -> list[str]:
    """The names of the formats that `source` looks like."""
    return [name for name, form in FORMATS.items() if form.fits(source)]
