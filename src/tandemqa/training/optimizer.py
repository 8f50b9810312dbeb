"""AdamW with a rate for each model, the schedule of the rates, and the limit of the gradient."""

import math

import torch

from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import JointModel


def make_optimizer(model: JointModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with a rate per model, and no decay on biases and LayerNorm weights (the one-dimensional ones)."""
    rates: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.learning_parameters():
        if name.startswith("reranker.head"):
            rate = config.head_rate
        else:
            rate = config.retriever_rate if name.startswith("retriever") else config.reranker_rate
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        rates.setdefault((rate, decay), []).append(parameter)
    groups = [{"params": p, "peak": rate, "lr": rate, "weight_decay": decay} for (rate, decay), p in rates.items()]
    return torch.optim.AdamW(groups, fused=True)


def rate_share(step: int, steps: int, config: TrainingConfig) -> float:
    """The share of the peak rate at a step: linear from 0, then constant, or linear or half a cosine to 0."""
    rising = round(config.warmup_share * steps)
    if step < rising:
        return (step + 1) / rising
    if config.schedule == "constant":
        return 1.0
    left = max(0.0, (steps - step) / max(1, steps - rising))
    return left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def clip_gradients(model: JointModel, config: TrainingConfig) -> dict[str, float]:
    """Scale the gradient down to `clip_norm` where it is longer; returns each model's norm before that."""
    parts = _by_model(model)
    norms = {
        name: torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for name, parameters in parts.items()
    }
    total = torch.stack(list(norms.values())).square().sum().sqrt()
    for name, parameters in parts.items():
        norm = total if config.clip == "global" else norms[name]
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
    return {name: float(norm) for name, norm in norms.items()}


def _by_model(model: JointModel) -> dict[str, list[torch.nn.Parameter]]:
    """The learning parameters of the retriever and of the re-ranker."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.learning_parameters():
        parts.setdefault(name.split(".")[0], []).append(parameter)
    return parts
