"""Weights, and checkpoints of weights and optimiser, as safetensors files, without pickle.

Each file holds a checksum of its tensors among its metadata, for safetensors itself only notices one that is cut off.
"""

import sys
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tandemqa import processes
from tandemqa.files import whole_file

KEPT = 2


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters, each once, so that equal weights are equal files."""
    _save(path, dict(model.named_parameters()))


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what `save_weights` wrote; a damaged file is a SafetensorError, one of another model a KeyError."""
    tensors = _load(path)
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
        """Write the state after `step` steps, whole or not at all, and drop all but the one before.

        So are the best states dropped that neither of the two goes back to.
        """
        tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in self.model.named_parameters()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        _save(self.folder / f"checkpoint-{step:08}.safetensors", tensors)
        for path in [*_checkpoints(self.folder)[KEPT:], *best_weights(self.folder)[KEPT:]]:
            path.unlink()

    def load(self) -> int:
        """Restore the last whole checkpoint and return the number of steps made; 0 if there is none.

        One that is damaged is told of and passed over.
        """
        for path in _checkpoints(self.folder):
            try:
                tensors = _load(path)
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


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: value.detach().contiguous() for name, value in tensors.items()}
    with whole_file(path) as partial:
        save_file(whole, partial, metadata={"checksum": _checksum(whole)})


def _load(path: Path) -> dict[str, Tensor]:
    """What `_save` wrote; anything else is a SafetensorError."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        known = (file.metadata() or {}).get("checksum")
    if known != _checksum(tensors):
        raise SafetensorError("the tensors are not those that were written")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over names, shapes and values: eight hexadecimal digits."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
