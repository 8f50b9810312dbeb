"""The training loop: batches of lists in, updated models out, resumable at any step."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.lists.build import TrainingLists
from tandemqa.progress import bar
from tandemqa.training.batch import Sides, Texts, make_batch, split_rows
from tandemqa.training.checkpoint import load_checkpoint, save_checkpoint
from tandemqa.training.joint import JointModel, LossConfig, joint_loss, loss_terms

# What an interruption can cost at most; writing one takes about a second.
CHECKPOINT_SECONDS = 60.0


class TrainingConfig(BaseModel):
    """How lists become updates, in the re-ranker's warm-up and in the joint training alike."""

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


def fit(
    retriever: DualEncoder,
    reranker: CrossEncoder,
    lists: TrainingLists,
    retriever_texts: Texts,
    reranker_texts: Texts,
    config: TrainingConfig,
    loss_config: LossConfig,
    seed: int,
    workspace: Path,
    name: str,
) -> None:
    """Train the models in place on the lists; a model that no term of the loss needs is left alone.

    The lists' rows refer to each model's texts. Progress goes to
    `workspace/log.jsonl`, checkpoints to `workspace/checkpoint.safetensors`: called again after an interruption it
    goes on from there, in the same order of lists, to the same weights.
    """
    if config.epochs == 0:
        return
    steps = max(1, round(config.epochs * math.ceil(len(lists) / config.batch_lists)))
    sides: Sides = (
        (retriever, retriever_texts) if loss_config.retriever_learns else None,
        (reranker, reranker_texts) if loss_config.needs_reranker else None,
    )
    model = JointModel(
        sides[0] and retriever, sides[1] and reranker, loss_config.retriever_learns, loss_config.reranker_learns
    )
    optimizer = _optimizer(model, config)
    torch.manual_seed(seed)
    checkpoint = workspace / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, model, optimizer)
    model.train()
    log = workspace / "log.jsonl"
    workspace.mkdir(parents=True, exist_ok=True)
    _cut_log(log, first)
    saved_at = time.monotonic()
    with bar(name, steps * config.batch_lists, "list") as progress:
        progress.update(first * config.batch_lists)
        for step, rows in enumerate(_steps(len(lists), config.batch_lists, steps, seed)):
            if step < first:
                continue
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _rate_share(step, steps, config)
            record = _step(model, optimizer, lists, rows, sides, config, loss_config, step)
            record |= {"step": step, "seconds": round(time.monotonic() - started, 3)}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            progress.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            progress.update(len(rows))
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, step + 1, model, optimizer)
                saved_at = time.monotonic()
    model.eval()


def _step(
    model: JointModel,
    optimizer: torch.optim.Optimizer,
    lists: TrainingLists,
    rows: npt.NDArray[np.int64],
    sides: Sides,
    config: TrainingConfig,
    loss_config: LossConfig,
    step: int,
) -> dict[str, float]:
    """One optimiser step on the lists at `rows`; returns the mean of each term, the gradient norm and tokens."""
    sums = dict.fromkeys(("loss", "kl", "reranker", "retriever"), 0.0)
    tokens = padded = 0
    optimizer.zero_grad(set_to_none=True)
    for part in split_rows(lists, rows, sides, config.micro_tokens):
        batch = make_batch(lists, part, *sides)
        scores = model(batch)
        terms = loss_terms(scores[0], scores[1], batch.mask.to(scores[0].device), loss_config)
        loss = joint_loss(terms, loss_config)
        if not torch.isfinite(loss).all():
            bad = part[int(torch.argmin(torch.isfinite(loss).int()))]
            raise TandemError(
                f"The loss of training list {bad} is not finite at step {step}; lower the learning rates."
            )
        # Every list of a step counts the same, however the step is cut.
        (loss.sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
        sums["loss"] += float(loss.detach().sum())
        for term, values in terms._asdict().items():
            sums[term] += float(values.detach().sum())
        real, with_padding = batch.tokens()
        tokens, padded = tokens + real, padded + with_padding
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    optimizer.step()
    means = {term: value / len(rows) for term, value in sums.items()}
    return {**means, "gradient_norm": float(norm), "tokens": tokens, "padded_tokens": padded}


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
