"""What a folder of ours holds: a dataset, a bundle (or the training run around it), or an index."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandemqa.data.dataset import Passages, load_dataset
from tandemqa.encoders import bundle
from tandemqa.errors import TandemError
from tandemqa.evaluation.report import Report
from tandemqa.index import index
from tandemqa.recipe.run import RUN, read_run


def describe(path: str | Path) -> dict[str, Any]:
    """What `path` holds, ready for JSON: its `kind`, its `path`, and what belongs to the kind.

    Every file is checked as it would be for use. A folder that is none of ours is a `TandemError`.
    """
    folder = Path(path)
    if (folder / "corpus.jsonl").exists() and not (folder / "queries.jsonl").exists():
        return {"kind": "corpus", "path": str(folder), "passages": len(Passages(folder / "corpus.jsonl"))}
    if (folder / "corpus.jsonl").exists():
        return {"kind": "dataset", "path": str(folder), **_dataset(folder)}
    if (folder / index.MANIFEST).exists():
        return {"kind": "index", "path": str(folder), **index.describe_index(folder)}
    if (folder / bundle.MANIFEST).exists() or (folder / "bundle" / bundle.MANIFEST).exists():
        place, about = bundle.check_bundle(folder)
        return {"kind": "bundle", "path": str(place), **about}
    if (folder / RUN).exists():
        return {"kind": "unfinished training run", "path": str(folder), "stages": read_run(folder).stages}
    if not folder.exists():
        raise TandemError(f"{folder} does not exist; name a dataset, a bundle, a training run or an index.")
    raise TandemError(
        f"{folder} is no dataset (corpus.jsonl), bundle ({bundle.MANIFEST}), training run ({RUN}) or index "
        f"({index.MANIFEST}); name one of these."
    )


def as_text(description: dict[str, Any]) -> str:
    """A description as indented lines, with the files as one size and the metrics as their table."""
    shown = dict(description)
    if "files" in shown:
        shown["size"] = f"{sum(shown.pop('files').values()) / 1e6:,.1f} MB"
    metrics = shown.pop("metrics", None)
    lines = list(_lines(shown, ""))
    if metrics is not None:
        lines += ["", Report.from_json(metrics).table()]
    return "\n".join(lines)


def _dataset(folder: Path) -> dict[str, Any]:
    dataset = load_dataset(folder)
    splits = {
        split: {
            "questions": len(qrels),
            "positives": sum(grade > 0 for grades in qrels.values() for grade in grades.values()),
        }
        for split, qrels in dataset.qrels.items()
    }
    return {
        "fingerprint": dataset.fingerprint,
        "passages": len(dataset.passages),
        "questions": len(dataset.queries),
        "splits": splits,
    }


def _lines(values: dict[str, Any], indent: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{key}:"
            for entry in value:
                yield f"{indent}  " + ", ".join(f"{name} {number:.4g}" for name, number in entry.items())
        else:
            yield f"{indent}{key}: {value:,}" if type(value) is int else f"{indent}{key}: {value}"
