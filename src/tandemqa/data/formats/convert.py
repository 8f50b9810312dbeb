"""From any known format to a dataset in BEIR layout."""

import shutil
from pathlib import Path
from typing import Any

from tandemqa.data.formats.recognise import FORMATS, recognise
from tandemqa.data.formats.splits import checked_split
from tandemqa.data.formats.target import Target
from tandemqa.errors import TandemError
from tandemqa.files import whole_folder


def convert(source: Path | str, out: Path | str, format: str = "auto", split: str = "train") -> dict[str, Any]:
    """Write `source` as a dataset in BEIR layout into the folder `out`, whole or not at all; what was written.

    format: a name of `FORMATS`, or "auto" to tell it from the source. split: where judgements go whose split the
    source does not tell. Passages without an id get a hash of their content as id, so that the same passage twice
    becomes one. Hard negatives of the source become rows with score 0 (judged, not relevant); a pair judged more than
    once keeps its highest score. The source is streamed: in memory, a passage, a query or a judgement takes 16 to 32
    bytes.

    A dataset that stands at `out` is replaced, but for its queries and judgements where the source has none. A fault
    in the source is a `TandemError` that names file, line and field; so is a format that cannot be told, and an `out`
    with anything but a dataset in it.
    """
    source, out = Path(source), Path(out)
    split = checked_split(split)
    name = _format(source, format)
    place = _free_place(out, source)
    with whole_folder(place) as partial:
        with Target(partial) as target:
            FORMATS[name].read(source, split, target)
            about = target.summary()
            if not about["passages"]:
                raise TandemError(f"{source} has no passages; there is nothing to convert.")
        if not about["questions"] and (place / "queries.jsonl").exists():
            shutil.copy(place / "queries.jsonl", partial)
        if not about["questions"] and (place / "qrels").exists():
            shutil.copytree(place / "qrels", partial / "qrels")
    return {"dataset": str(out), "format": name, **about}


def _format(source: Path, wanted: str) -> str:
    choices = ", ".join(FORMATS)
    if wanted in FORMATS:
        return wanted
    if wanted != "auto":
        raise TandemError(f"There is no format {wanted!r}; choose auto, {choices}.")
    found = recognise(source)
    if len(found) == 1:
        return found[0]
    if not found and not source.exists():
        raise TandemError(f"{source} does not exist; name a file, a folder, hf:NAME or ir:ID.")
    fits = f"could be {' or '.join(found)}" if found else "is in no known format"
    seen = "the files in it" if source.is_dir() else "its name and its first line"
    raise TandemError(f"{source} {fits}, to judge by {seen}; choose with --format: {choices}.")


def _free_place(out: Path, source: Path) -> Path:
    """`out` without symbolic links, once it is sure that nothing but a dataset would be replaced."""
    place = out.resolve()
    if source.resolve().is_relative_to(place):
        raise TandemError(f"{out} holds the source; choose another place for --out.")
    own = {"corpus.jsonl", "queries.jsonl", "qrels"}
    if place.exists() and not (place.is_dir() and {path.name for path in place.iterdir()} <= own):
        raise TandemError(f"{out} exists and is not a dataset; choose another place for --out.")
    return place
