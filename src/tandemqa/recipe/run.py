"""A training run on disk: what it was told, how far it has come, and the data it was made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.errors import TandemError
from tandemqa.files import read_json
from tandemqa.recipe.stage import Progress, stage_states

RUN = "run.json"


class Data(NamedTuple):
    """The dataset that a run was trained on, and how many of its questions."""

    path: Path
    fingerprint: str
    questions: int


@dataclass(frozen=True)
class TrainingRun:
    """The folder given to `train --out`, as its `run.json` describes it; stages: how far each one is, in order."""

    folder: Path
    data: Data
    recipe: dict[str, Any]
    stages: dict[str, Progress]

    def stage(self, name: str) -> Path:
        return self.folder / "stages" / name


def read_run(folder: Path) -> TrainingRun:
    """The run in `folder`; a folder that holds none, or a damaged one, is a `TandemError`."""
    path = folder / RUN
    if not path.exists():
        raise TandemError(f"{folder} is no training run (it holds no {RUN}); name the folder given to `train --out`.")
    about = read_json(path)
    try:
        data = Data(Path(about["data"]["path"]), about["data"]["fingerprint"], about["data"]["questions"])
        recipe, names = dict(about["recipe"]), list(about["stages"])
    except (KeyError, TypeError, ValueError) as error:
        raise TandemError(f"{path} is not what `train` writes; run `tandemqa train` again.") from error
    return TrainingRun(folder, data, recipe, stage_states(folder / "stages", names))


def dataset_of(data: Data) -> Dataset | str:
    """The dataset of a run as it was then, or the sentence that says why it cannot be had."""
    if not data.path.is_dir():
        return f"This needs the data, which is no longer in {data.path}; put it back and give the command again."
    dataset = load_dataset(data.path)
    if dataset.fingerprint != data.fingerprint:
        return f"This needs the data, which has changed in {data.path} since the run."
    return dataset
