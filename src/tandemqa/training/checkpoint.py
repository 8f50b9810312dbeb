"""Weights, and checkpoints of weights and optimiser, as safetensors files, without pickle."""

import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tandemqa import processes
from tandemqa.files import whole_file

KEPT = 2


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters, each once, so that equal weights are equal files."""
    with whole_file(path) as partial:
        save_file({name: value.detach().contiguous() for name, value in model.named_parameters()}, partial)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what `save_weights` wrote; a damaged file is a SafetensorError, one of another model a KeyError."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


class Checkpoints:
    """The checkpoints of one training, `checkpoint-STEP.safetensors` in `folder`: the last two are kept.

    STEP is the number of steps made. The processes of a training share the folder; the main one writes.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder = folder
        self.model = model
        self.optimizer = optimizer

    def save(self, step: int) -> None:
        """Write the state after `step` steps, whole or not at all, and drop all but the one before."""
        tensors: dict[str, Tensor] = {
            f"model.{name}": value.detach() for name, value in self.model.named_parameters()
        }
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        with whole_file(self.folder / f"checkpoint-{step:08}.safetensors") as partial:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        for path in _checkpoints(self.folder)[KEPT:]:
            path.unlink()

    def load(self) -> int:
        """Restore the last whole checkpoint and return the number of steps made; 0 if there is none.

        One that is damaged is told of and passed over.
        """
        for path in _checkpoints(self.folder):
            try:
                tensors = load_file(path)
            except SafetensorError:
                if processes.is_main():
                    what = "training goes on from the one before it, or from the start if there is none"
                    print(f"The checkpoint {path} is damaged; {what}.", file=sys.stderr)
                continue
            self._restore(tensors)
            return int(path.stem.removeprefix("checkpoint-"))
        return 0

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def remove_checkpoints(folder: Path) -> None:
    """Drop what a finished training no longer needs: its checkpoints, and the weights of its best state."""
    for path in [*_checkpoints(folder), *best_weights(folder)]:
        path.unlink()


def best_weights(folder: Path) -> list[Path]:
    """The weights of the best states so far, `best-STEP.safetensors`, the newest first."""
    return sorted(folder.glob("best-*.safetensors"), reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)
