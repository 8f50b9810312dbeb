"""What a recipe would run, and what runs there are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemqa.data.dataset import Dataset
from tandemqa.encoders.bundle import MANIFEST
from tandemqa.errors import TandemError
from tandemqa.files import read_json
from tandemqa.recipe.chain import Chain
from tandemqa.recipe.config import Recipe
from tandemqa.recipe.run import RUN, read_run


@dataclass(frozen=True)
class Planned:
    """A stage of a recipe: its `state`, whether it `runs`, and `why`."""

    stage: str
    state: str
    runs: bool
    why: str


def plan(dataset: Dataset, recipe: Recipe, out: Path) -> list[Planned]:
    """What `train` would do with this recipe in the run `out`, stage by stage. Nothing is run and nothing written."""
    planned = []
    for step in Chain(dataset, recipe, out / "stages").steps:
        state = step.stage.state
        if state == "complete":
            why = "its result is there"
        elif state == "unfinished":
            why = f"it was interrupted and {'goes on where it stopped' if step.trains else 'begins again'}"
        elif state == "new":
            why = "it has no result yet"
        else:
            why = "; ".join(step.stage.changes())
        planned.append(Planned(step.name, state, state != "complete", why))
    return planned


def runs(folder: Path) -> list[dict[str, Any]]:
    """The training runs in `folder` and one level below it: where, on what data, how far, and how good."""
    if not folder.is_dir():
        raise TandemError(f"{folder} is not a folder; name one that holds training runs.")
    found = []
    for path in sorted({*folder.glob(RUN), *folder.glob(f"*/{RUN}")}):
        run = read_run(path.parent)
        bundle = run.folder / "bundle" / MANIFEST
        about = read_json(bundle) if bundle.exists() else {}
        current = about.get("recipe") == run.recipe  # else the bundle is of an earlier recipe
        metrics = about.get("metrics") if current else None
        found.append(
            {
                "run": str(run.folder),
                "data": str(run.data.path),
                "questions": run.data.questions,
                "stages": run.stages,
                "bundle": current,
                "split": metrics["split"] if metrics else None,
                "mrr@10": {name: figures["mrr@10"]["mean"] for name, figures in metrics["stages"].items()}
                if metrics
                else {},
            }
        )
    return found
