"""Checkpoints: weights and optimiser in one safetensors file, without pickle."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tandemqa.errors import TandemError
from tandemqa.files import whole_file


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


def save_checkpoint(
    path: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state before step `step` (the number of steps made so far)."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    tensors |= {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    with whole_file(path) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote and return the number of steps made; 0 if there is no checkpoint."""
    if not path.exists():
        return 0
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise TandemError(f"The checkpoint {path} is damaged; remove it to train from the start.") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(tensors["step"])
