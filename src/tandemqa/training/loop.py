"""The training loop: batches of lists in, updated models out, resumable at any step."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from tandemqa import processes
from tandemqa.encoders.backbone import Precision
from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.progress import bar
from tandemqa.training.checkpoint import load_checkpoint, save_checkpoint
from tandemqa.training.interrupt import postponed
from tandemqa.training.joint import JointModel

# What an interruption can cost at most; writing one takes about a second.
CHECKPOINT_SECONDS = 60.0


class TrainingConfig(BaseModel):
    """How lists become updates, in every training stage alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: float = Field(1.0, ge=0, description="Passes over the lists; a fraction stops early, 0 skips the stage.")
    batch_lists: int = Field(16, ge=1, description="Lists per optimiser step.")
    micro_tokens: int = Field(
        16384, ge=1, description="Tokens in memory at once (about 4 GB for 6 layers of 384); same gradient for any."
    )
    retriever_rate: float = Field(5e-5, ge=0, description="Peak learning rate of the retriever.")
    reranker_rate: float = Field(1e-4, ge=0, description="Peak learning rate of the re-ranker's encoder.")
    head_rate: float = Field(1e-3, ge=0, description="Peak learning rate of the re-ranker's linear layer.")
    schedule: Literal["constant", "linear"] = Field("linear", description="Rate after its warm-up.")
    warmup_share: float = Field(0.1, ge=0, le=1, description="Share of the steps in which the rate rises from 0.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay, on matrices only.")
    clip_norm: float = Field(1.0, gt=0, description="Limit of the global gradient norm.")
    precision: Precision = Field(
        "auto", description='"auto": bfloat16 products where the processor has them, weights and losses in float32.'
    )


class Objective(Protocol):
    """What is learnt: the models, how many lists there are, and the gradient of some of them."""

    model: JointModel

    def __len__(self) -> int: ...

    def backward(self, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Add this process's part of the gradient of the lists at `rows`, and return its part of what the log should
        say of them: both are summed over the processes.

        A loss that is not finite is a FloatingPointError whose argument is the list's number.
        """
        ...


class Refresh(NamedTuple):
    """New lists in the midst of training: `objective(folder)` makes them from the models as they stand, or finds
    those it made in `folder` before an interruption."""

    every_steps: int
    objective: Callable[[Path], Objective]


def fit(
    objective: Objective,
    config: TrainingConfig,
    seed: int,
    workspace: Path,
    name: str,
    refresh: Refresh | None = None,
) -> None:
    """Train the objective's models in place.

    Progress goes to `workspace/log.jsonl`, checkpoints to `workspace/checkpoint.safetensors`: called again after an
    interruption it goes on from there, in the same order of lists, to the same weights. Dropout depends on the seed,
    the step and the process alone. Several processes (see `tandemqa.processes`) share the lists of each step; their
    weights stay equal, and equal to those of one process alone, up to rounding.
    """
    if config.epochs == 0:
        return
    model = objective.model
    steps = max(1, round(config.epochs * math.ceil(len(objective) / config.batch_lists)))
    every = refresh.every_steps if refresh else steps
    optimizer = _optimizer(model, config)
    checkpoint = workspace / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, model, optimizer)
    log = workspace / "log.jsonl"
    workspace.mkdir(parents=True, exist_ok=True)
    if processes.is_main():
        _cut_log(log, first)
    saved_at = time.monotonic()
    lists_to_read = max(1, round(config.epochs * len(objective)))
    with postponed() as interrupted, bar(name, lists_to_read, "list") as progress:
        progress.update(round(lists_to_read * first / steps))
        for start in range(first - first % every, steps, every):
            if refresh and start:
                # The models that the lists are made from, should this be interrupted.
                if start > first and processes.is_main():
                    save_checkpoint(checkpoint, start, model, optimizer)
                objective = refresh.objective(workspace / f"refresh-{start}")
            model.train()
            orders = _steps(len(objective), config.batch_lists, min(every, steps - start), seed + start)
            for step, rows in enumerate(orders, start):
                if step < first:
                    continue
                started = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * _rate_share(step, steps, config)
                random = np.random.SeedSequence([seed, step, processes.rank()])
                torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
                record = _step(objective, optimizer, rows, config, step)
                if processes.is_main():
                    seconds = time.monotonic() - started
                    record |= {"step": step, "seconds": round(seconds, 3)}
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    speed = f"{record['tokens'] / seconds:,.0f} tokens/s"
                    progress.set_postfix_str(f"loss {record['loss']:.3f}, {speed}", refresh=False)
                    progress.update(len(rows))
                    if interrupted() or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                        save_checkpoint(checkpoint, step + 1, model, optimizer)
                        saved_at = time.monotonic()
                if interrupted():
                    made = f"{step + 1} of {steps} steps of {name} are made and saved"
                    raise KeyboardInterrupt(f"Interrupted: {made}; the same command goes on from there.")
    model.eval()


def _step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    rows: npt.NDArray[np.int64],
    config: TrainingConfig,
    step: int,
) -> dict[str, float]:
    """One optimiser step on the lists at `rows`; returns what the objective says of it, and gradient norms."""
    optimizer.zero_grad(set_to_none=True)
    try:
        record = objective.backward(rows)
    except FloatingPointError as error:
        raise TandemError(
            f"The loss of training list {error} is not finite at step {step}; lower the learning rates."
        ) from error
    _add_up(objective.model, record)
    norms = {
        part: torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        for part, parameters in _by_model(objective.model).items()
    }
    total = torch.stack(list(norms.values())).square().sum().sqrt()
    for parameters in _by_model(objective.model).values():
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, total)
    optimizer.step()
    return record | {f"{part}_gradient_norm": float(norm) for part, norm in norms.items()}


def _add_up(model: JointModel, record: dict[str, float]) -> None:
    """Sum the processes' gradients, and what they say of their lists."""
    if processes.count() == 1:
        return
    parameters = [p for _, p in model.learning_parameters()]
    device = parameters[0].device
    values = torch.tensor([float(value) for value in record.values()], dtype=torch.float64, device=device)
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    processes.add_up([values, reached])
    record.update(zip(record, values.tolist(), strict=True))
    # A process whose part held no list, or a tower that no process reached, has no gradient of its own.
    for parameter, somewhere in zip(parameters, reached.tolist(), strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    processes.add_up([p.grad for p in parameters if p.grad is not None])


def _by_model(model: JointModel) -> dict[str, list[torch.nn.Parameter]]:
    """The learning parameters of the retriever and of the re-ranker."""
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.learning_parameters():
        parts.setdefault(name.split(".")[0], []).append(parameter)
    return parts


def _optimizer(model: JointModel, config: TrainingConfig) -> torch.optim.Optimizer:
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


def _rate_share(step: int, steps: int, config: TrainingConfig) -> float:
    """The share of the peak rate at a step: linear from 0, then constant or linear to 0."""
    rising = round(config.warmup_share * steps)
    if step < rising:
        return (step + 1) / rising
    return 1.0 if config.schedule == "constant" else max(0.0, (steps - step) / max(1, steps - rising))


def _steps(lists: int, batch: int, steps: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """List numbers of each step: every epoch a new order, which depends on the seed and the epoch alone."""
    done = epoch = 0
    while done < steps:
        order = np.random.default_rng([seed, epoch]).permutation(lists)
        for start in range(0, lists, batch):
            if done == steps:
                return
            yield order[start : start + batch]
            done += 1
        epoch += 1


def _cut_log(log: Path, steps: int) -> None:
    """Drop the log lines of steps that were lost with an interruption and will be made again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
        with whole_file(log) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
