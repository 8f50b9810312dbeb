"""Measurements in the midst of training: the best state so far, and when to stop."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from tandemqa import processes
from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.training.checkpoint import best_weights, load_weights, save_weights
from tandemqa.training.joint import JointModel
from tandemqa.wording import counted

Figures = dict[str, float]


class Validation(NamedTuple):
    """How models are measured in the midst of their training: `figures()` gives what there is to know of them as they
    stand, by name; `best_by` is the one that decides, the higher the better. After `patience` measurements without a
    gain the training stops.
    """

    every_steps: int
    patience: int
    figures: Callable[[], Figures]
    best_by: str


class BestState:
    """The measurements of one training, `validation.jsonl` in `folder`, and the weights at the best one.

    The file is the state: what is best and when to stop follows from its lines, in every process alike. Lines beyond
    `first` steps were lost with an interruption and will be made again. As a checkpoint may fall back to the one
    before it, so the weights of the best measurement before this one are kept, too, until the next is written.
    """

    def __init__(self, validation: Validation, model: JointModel, folder: Path, first: int) -> None:
        self.validation = validation
        self.model = model
        self.folder = folder
        self.path = folder / "validation.jsonl"
        if processes.is_main():
            self._write([line for line in self._read() if line["step"] <= first])
            for path in best_weights(folder):
                if _step(path) > first:
                    path.unlink()
        processes.wait()
        self.lines = self._read()

    @property
    def best(self) -> Figures:
        """The first of the best measurements."""
        return max(self.lines, key=lambda line: line[self.validation.best_by])

    @property
    def stops(self) -> bool:
        """Whether the training should stop here."""
        since = len(self.lines) - 1 - self.lines.index(self.best) if self.lines else 0
        return since >= self.validation.patience

    def due(self, step: int, steps: int) -> bool:
        """Whether the state after `step` of `steps` steps is to be measured still; the first and the last are."""
        return not self.measured(step) and (step % self.validation.every_steps == 0 or step == steps)

    def measured(self, step: int) -> bool:
        """Whether the state after `step` steps, and no later one, was the last to be measured."""
        return bool(self.lines) and self.lines[-1]["step"] == step

    def measure(self, step: int) -> None:
        """Measure the state after `step` steps, in the main process; leaves the models in training mode.

        A checkpoint must follow where a step has been made.
        """
        if processes.is_main():
            started = time.monotonic()
            figures = {"step": step, **self.validation.figures()}
            self.lines.append(figures | {"seconds": round(time.monotonic() - started, 3)})
            if self.best["step"] == step:
                save_weights(self.folder / f"best-{step:08}.safetensors", self.model)
            self._write(self.lines)
        processes.wait()
        self.lines = self._read()
        self.model.train()

    def restore(self) -> None:
        """Give the models the weights of the best measurement."""
        path = self.folder / f"best-{self.best['step']:08}.safetensors"
        try:
            load_weights(path, self.model)
        except (OSError, SafetensorError) as error:
            raise TandemError(f"{path} is damaged; remove the folder {self.folder}, it is trained again.") from error

    def summary(self) -> str:
        """What was found, in one sentence."""
        name, last = self.validation.best_by, int(self.lines[-1]["step"])
        parts = counted(len(self.lines) - 1, "part")
        ended = f"stopped after {counted(last, 'step')}" if self.stops else f"measured after each of {parts}"
        return f"{ended}; the best state, kept, is that after {self.best['step']} ({name} {self.best[name]:.3f})"

    def _read(self) -> list[Figures]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def _write(self, lines: list[Figures]) -> None:
        with whole_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("best-"))
