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
from tandemqa.recipe.train import RUN


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
            why = "it was interrupted and goes on where it stopped"
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
        run = path.parent
        about = read_json(path)
        states = {name: _state(run / "stages" / name / "stage.json") for name in about["stages"]}
        bundle = run / "bundle" / MANIFEST
        metrics = read_json(bundle).get("metrics") if bundle.exists() else None
        found.append(
            {
                "run": str(run),
                "data": about["data"]["path"],
                "questions": about["data"]["questions"],
                "stages": states,
                "bundle": bundle.exists(),
                "mrr@10": {name: figures["mrr@10"]["mean"] for name, figures in metrics["stages"].items()}
                if metrics
                else {},
            }
        )
    return found


def _state(path: Path) -> str:
    if not path.exists():
        return "to do"
    return "complete" if read_json(path).get("complete") else "unfinished"
