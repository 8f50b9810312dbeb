"""A stage's folder: its result, kept for as long as what it depends on is the same."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

from safetensors import SafetensorError

from tandemqa.code import code_version
from tandemqa.errors import TandemError
from tandemqa.files import read_json, remove_partial, write_json

State = Literal["complete", "unfinished", "changed", "new"]
Progress = Literal["complete", "unfinished", "outdated", "to do"]

# The code that decides a stage's result, besides that of the stages themselves; stages without their round.
_TRAINS = ("data", "encoders", "lists", "training")
CODE = {
    "warm_retriever": (*_TRAINS, "index"),
    "mine": ("data", "encoders", "index", "search"),
    "warm_reranker": _TRAINS,
    "score": ("data", "encoders", "search"),
    "lists": ("data", "lists"),
    "joint": (*_TRAINS, "index", "search", "evaluation/metrics.py", "recipe/sample.py"),
    "evaluate": ("data", "encoders", "index", "search", "evaluation", "lists/confidence.py", "lists/logistic.py"),
}


class Stage:
    """`folder` holds a stage's result, `stage.json` what it depends on and whether it is complete.

    `key` identifies everything that the result depends on: settings, inputs (by their own keys or fingerprints) and
    the source code that makes it. Making a `Stage` changes nothing on disk.
    """

    def __init__(self, folder: Path, depends_on: dict[str, Any]) -> None:
        self.folder = folder
        # As JSON gives it back, so that what was stored compares equal.
        code = code_version("recipe/stages.py", "recipe/materials.py", *CODE[folder.name.partition("-")[0]])
        self.depends_on: dict[str, Any] = json.loads(json.dumps({"code": code, **depends_on}))
        text = json.dumps(self.depends_on, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def state(self) -> State:
        """Whether there is a result, part of one, one that depends on something else, or nothing."""
        path = self.folder / "stage.json"
        if not path.exists():
            return "new"
        known = read_json(path)
        if known.get("key") != self.key:
            return "changed"
        return "complete" if known.get("complete") else "unfinished"

    def changes(self) -> list[str]:
        """What a result in the folder depends on that is different now, a phrase each."""
        path = self.folder / "stage.json"
        before = dict(leaves(read_json(path).get("depends_on", {}))) if path.exists() else {}
        now = dict(leaves(self.depends_on))
        phrases = []
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                if name == "code":
                    phrases.append("this version of the program computes it with other code")
                elif name.startswith("input "):
                    phrases.append(f"its {name} changes")
                else:
                    phrases.append(f"{name} was {before.get(name, 'not set')}, is {now.get(name, 'not set')}")
        return phrases

    def begin(self) -> None:
        """Make the folder ready: one that depends on something else is emptied, an unfinished one left as it is, so
        that a training stage finds its checkpoint again."""
        if self.state in ("changed", "new"):
            shutil.rmtree(self.folder, ignore_errors=True)
            self._write(complete=False)
        remove_partial(self.folder)  # what a killed process left

    def finish(self) -> None:
        """Declare the result whole."""
        self._write(complete=True)

    def _write(self, complete: bool) -> None:
        about = {"key": self.key, "complete": complete, "depends_on": self.depends_on}
        write_json(self.folder / "stage.json", about)


def stage_states(folder: Path, names: Sequence[str]) -> dict[str, Progress]:
    """How far each stage in `folder` is. One is outdated if it was made from a stage that has been replaced since, as
    those at the end of a chain are while a changed recipe is being run."""
    states: dict[str, Progress] = {}
    keys: set[str] = set()
    for name in names:
        path = folder / name / "stage.json"
        if not path.exists():
            states[name] = "to do"
            continue
        with reading(folder / name):
            about = read_json(path)
            inputs = {on: key for on, key in about["depends_on"].items() if on.startswith("input ")}
            if not {inputs[on] for on in inputs.keys() - {"input data", "input questions"}} <= keys:
                states[name] = "outdated"
                continue
            keys.add(about["key"])
            states[name] = "complete" if about["complete"] else "unfinished"
    return states


def why_not_complete(states: dict[str, Progress], name: str) -> str | None:
    """Why there is no result of a stage to show, if there is none."""
    if states[name] == "complete":
        return None
    how = {
        "unfinished": "is not finished yet",
        "outdated": "was last run with another recipe and is still to be run with this one",
        "to do": "has not been run yet",
    }
    return f"The stage {name} {how[states[name]]}; run tandemqa train to its end to see this."


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Read a stage's result in this block; what is missing or damaged is a `TandemError` that names the folder."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, SafetensorError, BadZipFile) as error:
        raise TandemError(
            f"The stage in {folder} is damaged ({error}); remove that folder, the stage is run again."
        ) from error


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dictionaries, each with the names that lead to it, joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
