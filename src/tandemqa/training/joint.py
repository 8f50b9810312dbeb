"""The joint step: both models score the same lists, and one loss on the two score matrices trains them both."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from tandemqa.encoders.backbone import (
    Precision,
    autocast,
    device_of,
    product_dtype,
    use_fast_attention,
)
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder, Tower
from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.lean import LeanEncoder, for_step
from tandemqa.encoders.step import StepEncoder, draws
from tandemqa.training.batch import ListBatch, Part
from tandemqa.training.losses import (
    Direction,
    Reduction,
    listwise_divergence,
    supervised_listwise,
    supervised_pointwise,
)


class LossConfig(BaseModel):
    """The three terms of the joint loss. The defaults are the paper's form, at a temperature that suits cosines."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kl_weight: float = Field(1.0, ge=0, description="Weight of the divergence between the two distributions.")
    reranker_weight: float = Field(1.0, ge=0, description="Weight of the re-ranker's supervised loss.")
    retriever_weight: float = Field(0.0, ge=0, description="Weight of the retriever's supervised loss (paper: 0).")
    reranker_loss: Literal["listwise", "pointwise"] = Field(
        "listwise", description="The re-ranker's supervised loss: over the list, or of each candidate by itself."
    )
    kl_direction: Direction = Field("retriever_reranker", description="KL(retriever ‖ re-ranker) or its reverse.")
    kl_reduction: Reduction = Field("sum", description="Sum over the list (paper), or mean (reference code).")
    kl_reranker_gradient: bool = Field(True, description="Whether the re-ranker learns from the divergence too.")
    retriever_temperature: float = Field(
        0.05,
        gt=0,
        description="Divides the retriever's scores: 0.05 suits cosine, 1 the paper's inner product.",
    )
    reranker_temperature: float = Field(1.0, gt=0, description="Divides the re-ranker's scores.")

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if not (self.retriever_learns or self.reranker_learns):
            raise ValueError("kl_weight, reranker_weight and retriever_weight are all 0: nothing would learn")
        return self

    def reranker_alone(self) -> "LossConfig":
        """The loss of the re-ranker's warm-up: its supervised term alone."""
        return LossConfig(
            kl_weight=0,
            reranker_weight=1,
            retriever_weight=0,
            reranker_temperature=self.reranker_temperature,
            reranker_loss=self.reranker_loss,
        )

    @property
    def retriever_learns(self) -> bool:
        return self.kl_weight > 0 or self.retriever_weight > 0

    @property
    def reranker_learns(self) -> bool:
        return self.reranker_weight > 0 or (self.kl_weight > 0 and self.kl_reranker_gradient)

    @property
    def needs_reranker(self) -> bool:
        return self.kl_weight > 0 or self.reranker_weight > 0


class Terms(NamedTuple):
    """Each term of the loss, unweighted, per list: float32 of shape (B,)."""

    kl: Tensor
    reranker: Tensor
    retriever: Tensor


class Outputs(NamedTuple):
    """What the encoders give for a batch of B lists of n candidates, vectors, float32: those of the distinct queries
    (Q, d) and passages (P, d), and the re-ranker's of all pairs (B·n, d), 0 where there is none.

    Without rows for a model that takes no part.
    """

    queries: Tensor = torch.empty(0)
    passages: Tensor = torch.empty(0)
    pairs: Tensor = torch.empty(0)


class Task(NamedTuple):
    """One encoder's work on a batch: its parts, the shape of the vectors that it gives for all of them, how states
    become vectors, whether it learns, and those parameters behind it that do."""

    parts: list[Part]
    shape: tuple[int, int]
    encoder: nn.Module
    pooled: Callable[[Tensor, TokenBatch], Tensor]
    learns: bool
    behind: list[nn.Parameter]


class JointModel(nn.Module):
    """Retriever and re-ranker as one module, so that one optimiser and one loss serve both.

    `tasks` is its work on a batch, which `Passes` computes part by part; `scores` makes of the vectors what losses
    see. A model that is None takes no part; one that does not learn is scored without gradient.
    """

    def __init__(
        self,
        retriever: DualEncoder | None,
        reranker: CrossEncoder | None,
        retriever_learns: bool = True,
        reranker_learns: bool = True,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self.retriever = retriever
        self.reranker = reranker
        self.retriever_learns = retriever_learns
        self.reranker_learns = reranker_learns
        self.precision = precision

    def learning_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that an optimiser should have, by name."""
        for name, parameter in self.named_parameters():
            learns = self.retriever_learns if name.startswith("retriever") else self.reranker_learns
            if learns and parameter.requires_grad:
                yield name, parameter

    @property
    def device(self) -> torch.device:
        return device_of(self)

    def autocast(self, remember: bool = False) -> Any:
        """bfloat16 where the precision says so and the processor computes in it."""
        return autocast(self.device, self.precision == "auto", remember)

    def tasks(self, batch: ListBatch) -> dict[str, Task]:
        """The encoders' work on a batch, by the name of what it gives in `Outputs`."""
        tasks = {}
        if self.retriever is not None:
            size, learns = self.retriever.size, self.retriever_learns
            behind = list(self.retriever.dense.parameters()) if learns else []
            distinct_queries, distinct_passages = batch.distinct
            sides: dict[Tower, tuple[str, list[Part], int]] = {
                "query": ("queries", batch.queries, distinct_queries),
                "passage": ("passages", batch.passages, distinct_passages),
            }
            for side, (name, parts, count) in sides.items():
                tower = self.retriever.tower(side)
                tasks[name] = Task(parts, (count, size), tower, self.retriever.pooled, learns, behind)
        if self.reranker is not None:
            encoder = self.reranker.encoder
            shape = (batch.mask.numel(), int(encoder.config.hidden_size))  # type: ignore[union-attr, arg-type]
            tasks["pairs"] = Task(batch.pairs, shape, encoder, self.reranker.pooled, self.reranker_learns, [])
        return tasks

    def step_encoders(self, tasks: Collection[Task]) -> dict[nn.Module, StepEncoder | LeanEncoder]:
        """The encoders of these tasks for the time of a step, by the encoder itself; a shared tower is one."""
        batches: dict[nn.Module, list[TokenBatch]] = {}
        for task in tasks:
            batches.setdefault(task.encoder, []).extend(part for _, part in task.parts)
        learns = {task.encoder: task.learns for task in tasks}
        dtype = product_dtype(self, self.precision)
        return {encoder: for_step(encoder, read, learns[encoder], dtype) for encoder, read in batches.items()}

    def scores(self, outputs: Outputs, batch: ListBatch) -> tuple[Tensor, Tensor]:
        """The score matrices (B, n) that the encoders' outputs make."""
        mask = batch.mask.to(self.device)
        retriever = reranker = torch.zeros(mask.shape, device=self.device)
        if self.retriever is not None:
            queries = outputs.queries[batch.query_index.to(self.device)]
            passages = outputs.passages[batch.passage_index.to(self.device)]
            # Products in float32: bfloat16 keeps three digits, fewer than neighbouring cosines differ in.
            retriever = torch.einsum("bd,bnd->bn", queries, passages).masked_fill(~mask, 0.0)
        if self.reranker is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.reranker_learns):
                reranker = self.reranker.scores(outputs.pairs).view(mask.shape).masked_fill(~mask, 0.0)
        return retriever, reranker

    def draws(self) -> bool:
        """Whether an encoder draws random numbers."""
        return any(map(draws, self._backbones()))

    def train(self, mode: bool = True) -> "JointModel":
        """Set the mode; a model that does not learn stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.retriever is not None:
            self.retriever.train(mode and self.retriever_learns)
        if self.reranker is not None:
            self.reranker.train(mode and self.reranker_learns)
        for model in self._backbones():
            use_fast_attention(model)
        return self

    def keep_activations(self, keep: bool) -> None:
        """Whether the backward pass finds all activations of the forward pass, or computes each layer's again."""
        for encoder in self._backbones():
            if keep:
                encoder.activation_checkpointing_disable()  # type: ignore[operator]
            else:
                encoder.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def _backbones(self) -> list[nn.Module]:
        towers = [] if self.retriever is None else [self.retriever.query_tower, self.retriever.passage_tower]
        return towers if self.reranker is None else [*towers, self.reranker.encoder]


def loss_terms(retriever: Tensor, reranker: Tensor, mask: Tensor, config: LossConfig) -> Terms:
    """The terms of the joint loss, per list, from two score matrices (B, n) (RocketQAv2, equation 6)."""
    supervised = supervised_listwise if config.reranker_loss == "listwise" else supervised_pointwise
    return Terms(
        kl=listwise_divergence(
            retriever,
            reranker,
            mask,
            config.kl_direction,
            config.kl_reduction,
            config.kl_reranker_gradient,
            config.retriever_temperature,
            config.reranker_temperature,
        ),
        reranker=supervised(reranker, mask, config.reranker_temperature),
        retriever=supervised_listwise(retriever, mask, config.retriever_temperature),
    )


def joint_loss(terms: Terms, config: LossConfig) -> Tensor:
    """The weighted sum of the terms, per list: float32 of shape (B,)."""
    loss: Tensor = (
        config.kl_weight * terms.kl
        + config.reranker_weight * terms.reranker
        + config.retriever_weight * terms.retriever
    )
    return loss
