"""The training loop: batches of lists in, updated models out, resumable at any step."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from tandemqa import processes
from tandemqa.errors import TandemError
from tandemqa.lists.build import NO_PASSAGE, TrainingLists
from tandemqa.progress import bar
from tandemqa.training.checkpoint import Checkpoints
from tandemqa.training.config import TrainingConfig
from tandemqa.training.interrupt import postponed
from tandemqa.training.joint import JointModel
from tandemqa.training.log import TrainingLog
from tandemqa.training.lora import adapted
from tandemqa.training.optimizer import clip_gradients, make_optimizer, rate_share
from tandemqa.training.validation import BestState, Validation

# What an interruption can cost at most; writing one takes about a second.
CHECKPOINT_SECONDS = 60.0


class Objective(Protocol):
    """What is learnt: the models, how many lists there are, and the gradient of some of them."""

    model: JointModel
    lists: TrainingLists

    def __len__(self) -> int: ...

    def backward(self, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Add this process's part of the gradient of the lists at `rows`, and return its part of what the log should
        say of them: both are summed over the processes.

        A loss that is not finite is a FloatingPointError whose argument is the list's number.
        """
        ...


class NotFiniteError(TandemError):
    """A loss or a gradient that is not finite, and the lists that it is of."""

    def __init__(self, what: str, step: int, lists: TrainingLists) -> None:
        self.what = what
        self.step = step
        self.lists = lists
        super().__init__(self.sentence(lambda row: f"row {row}", lambda row: f"row {row}"))

    def sentence(self, query_name: Callable[[int], str], passage_name: Callable[[int], str]) -> str:
        """What happened, with questions and passages by these names of their rows."""
        where = f"question {', '.join(query_name(row) for row in self.lists.query_rows.tolist())}"
        if len(self.lists) == 1:
            passages = [passage_name(row) for row in self.lists.passages[0].tolist() if row != NO_PASSAGE]
            where += f" with its passages {', '.join(passages)}"
        cure = "lower the learning rates" if self.step else "look at the weights that the training starts from"
        return f"The {self.what} of {where} is not finite at step {self.step}; {cure}."


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
    validation: Validation | None = None,
) -> None:
    """Train the objective's models in place; with `validation` they end in their best state, not in their last.

    Progress goes to `workspace/log.jsonl`, checkpoints stand beside it: called again after an interruption it goes on
    from there, in the same order of lists, to the same weights. Several processes (see `tandemqa.processes`) share
    the lists of each step; their weights stay equal, and without dropout equal to those of one process, up to
    rounding. Dropout depends on the seed, the step, the process and how a step is cut.
    """
    if config.epochs == 0:
        return
    workspace.mkdir(parents=True, exist_ok=True)
    model = objective.model
    steps = max(1, round(config.epochs * math.ceil(len(objective) / config.batch_lists)))
    every = refresh.every_steps if refresh else steps
    lists_read = partial(_lists_in, lists=len(objective), batch=config.batch_lists)
    with adapted(model, seed), postponed() as interrupted:
        optimizer = make_optimizer(model, config)
        checkpoints = Checkpoints(workspace, model, optimizer)
        first = checkpoints.load()
        log = TrainingLog(workspace, first, config.tensorboard) if processes.is_main() else None
        saved_at = time.monotonic()
        best = None if validation is None else BestState(validation, model, workspace, first)
        if log and best and best.measured(first):
            log.plot(first, best.lines[-1], "validation/")  # dropped with the steps from here on
        model.keep_activations(not config.gradient_checkpointing)
        model.train()
        with bar(name, lists_read(steps), "list", lists_read(first)) as progress:

            def validate(step: int) -> bool:
                """Measure the state after `step` steps if it is due; returns whether it was."""
                if best is None or not best.due(step, steps):
                    return False
                progress.set_postfix_str("validating")
                best.measure(step)
                if log:
                    log.plot(step, best.lines[-1], "validation/")
                return True

            def asked() -> bool:
                """Whether a process is asked to stop: all then do, at the same place."""
                return processes.anywhere(interrupted())

            def stop(made: int) -> NoReturn:
                """End here, where so many steps are made and saved."""
                processes.wait()  # the main process may be saving still
                what = f"{made} of {steps} steps of {name} are made and saved"
                raise KeyboardInterrupt(f"Interrupted: {what}; the same command goes on from there.")

            if validate(first) and asked():
                stop(first)
            for start in range(first - first % every, steps, every):
                if best and best.stops:
                    break
                if refresh and start:
                    # The models that the lists are made from, should this be interrupted.
                    if start > first and processes.is_main():
                        checkpoints.save(start)
                    objective = refresh.objective(workspace / f"refresh-{start}")
                    if asked():
                        stop(max(start, first))
                    model.train()
                orders = _steps(len(objective), config.batch_lists, min(every, steps - start), seed + start)
                for step, rows in enumerate(orders, start):
                    if step < first:
                        continue
                    if best and best.stops:
                        break
                    started = time.monotonic()
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak"] * rate_share(step, steps, config)
                    random = np.random.SeedSequence([seed, step, processes.rank()])
                    torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
                    record = _step(objective, optimizer, rows, config, step)
                    if log:
                        seconds = time.monotonic() - started
                        log.write(record | {"step": step, "seconds": round(seconds, 3)})
                        speed = f"{record['tokens'] / seconds:,.0f} tokens/s"
                        progress.set_postfix_str(f"loss {record['loss']:.3f}, {speed}", refresh=False)
                        progress.update(len(rows))
                    stopping = asked()
                    # A state that is due, but not measured now, is measured when the training goes on.
                    validated = not stopping and validate(step + 1)
                    stopping = stopping or (validated and asked())
                    if log and (stopping or validated or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                        checkpoints.save(step + 1)
                        saved_at = time.monotonic()
                    if stopping:
                        stop(step + 1)
            if best:
                best.restore()
                if log:
                    tqdm.write(f"{name}: {best.summary()}", file=sys.stderr)
        if log:
            log.close()
    model.keep_activations(True)
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
        raise NotFiniteError("loss", step, objective.lists.take(np.array(error.args))) from error
    _add_up(objective.model, record)
    norms = clip_gradients(objective.model, config)
    if not all(map(math.isfinite, norms.values())):
        raise NotFiniteError("gradient", step, objective.lists.take(rows))
    optimizer.step()
    return record | {f"{name}_gradient_norm": norm for name, norm in norms.items()}


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


def _lists_in(steps: int, lists: int, batch: int) -> int:
    """How many lists so many steps read; the last step of an epoch may be short."""
    epochs, rest = divmod(steps, math.ceil(lists / batch))
    return epochs * lists + rest * batch


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
