"""Datasets in Hugging Face's library: `hf:NAME`, a hub name or a path, or a local folder or Parquet file itself."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tandemqa.data.formats import pairs
from tandemqa.data.formats.target import Target
from tandemqa.data.lines import Line
from tandemqa.errors import TandemError
from tandemqa.extras import needed
from tandemqa.progress import track

_PREFIX = "hf:"
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave.
_SAVED = ("state.json", "dataset_dict.json")


def fits(source: Path) -> bool:
    if str(source).startswith(_PREFIX) or (source.suffix == ".parquet" and source.is_file()):
        return True
    return any((source / name).is_file() for name in _SAVED) or any(source.glob("*.parquet"))


def read(source: Path, split: str, out: Target) -> None:
    """The rows of `split`, with the columns of `pairs`."""
    name = str(source).removeprefix(_PREFIX)
    for line, row in _numbered(source, _rows(name, split)):
        pairs.take(line, row, split, out)


def _rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    datasets = needed("datasets", "data", "This format")
    try:
        if any((Path(name) / file).is_file() for file in _SAVED):
            found = datasets.load_from_disk(name)
            yield from found[split] if isinstance(found, dict) else found
        elif name.endswith(".parquet"):
            # A file has no splits, but the library gives it one of this name.
            yield from datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
        else:
            yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # whatever the library and what it reads from may raise
        reason = " ".join(str(error).split())[:200]
        raise TandemError(f"{name}, split {split!r}, could not be read by the package datasets: {reason}") from error


def _numbered(source: Path, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[Line, dict[str, Any]]]:
    for number, row in enumerate(track(rows, f"read {source.name}", 0, "row"), start=1):
        yield (source, number), row
