"""The re-ranker: a cross-encoder that reads query and passage together and gives one score."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tandemqa.data.tokens import TokenIds
from tandemqa.encoders import layout, threads
from tandemqa.encoders.backbone import (
    BASE_MODEL,
    Pooling,
    Precision,
    check_length,
    default_device,
    device_of,
    for_inference,
    load_backbone,
    load_tokenizer,
    not_finite,
    pool,
    weights_fingerprint,
)
from tandemqa.encoders.dense import Dense
from tandemqa.encoders.inputs import Ids, InputFormat, TokenBatch, named, tokenize
from tandemqa.encoders.quantised import Ranges
from tandemqa.errors import TandemError
from tandemqa.progress import bar


class RerankerConfig(BaseModel):
    """What the re-ranker is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(BASE_MODEL, description="Starting weights: a folder, a bundle's reranker/ or a hub id.")
    pooling: Pooling = Field("cls", description="What the linear layer reads: the [CLS] state, or the mean.")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout before the linear layer.")
    pair_length: int = Field(160, ge=8, description="Tokens of query and passage together, special ones included.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside the encoder; the paper uses 0.1.")
    lora_rank: int | None = Field(
        None, ge=1, description="Train the head and adapters of this rank, not the encoder (needs the extra `lora`)."
    )


class CrossEncoder(nn.Module):
    """`w · h + b` over the pooled state of `[CLS] query [SEP] passage [SEP]` (RocketQAv2, section 3.1).

    Models trained elsewhere may have layers between the pooled state and the head.

    precision: what `score` computes in if it is not told. ranges: of the encoder's activations, once measured.
    """

    def __init__(
        self,
        config: RerankerConfig,
        tokenizer: Any,
        encoder: nn.Module,
        head: nn.Linear,
        dense: Sequence[Dense] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.format = InputFormat(tokenizer)
        self.encoder = encoder
        self.dropout = nn.Dropout(config.head_dropout)
        self.dense = nn.Sequential(*dense)
        self.head = head
        self.precision: Precision = "auto"
        self.ranges: Ranges | None = None

    @classmethod
    def load(cls, config: RerankerConfig) -> "CrossEncoder":
        """Load the weights that `config.model` names; a model without a scoring head gets a fresh one."""
        layout.check_origin(config.model, "reranker", {"pooling": config.pooling})
        encoder = load_backbone(config.model, config.dropout)
        head = nn.Linear(int(encoder.config.hidden_size), 1)  # type: ignore[union-attr, arg-type]
        saved = layout.load_head(config.model)
        dense: list[Dense] = []
        if saved is not None:
            dense = layout.load_dense(config.model)
            head = saved
        else:
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        check_length(encoder, config.pair_length, "reranker.pair_length")
        return cls(config, load_tokenizer(config.model), encoder, head, dense).to(default_device())

    def save(self, folder: Path) -> None:
        """Write the folder that `sentence_transformers.CrossEncoder` reads."""
        layout.save_reranker(
            folder,
            encoder=self.encoder,
            dense=list(self.dense),  # type: ignore[arg-type]
            head=self.head,
            tokenizer=self.tokenizer,
            pooling=self.config.pooling,
            max_length=self.config.pair_length,
        )

    def at(self, precision: Precision) -> "CrossEncoder":
        """The same model, weights shared, that computes in `precision` if it is not told."""
        model = copy.copy(self)
        model.precision = precision
        return model

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the weights."""
        return weights_fingerprint(self, *(layer.name for layer in self.dense if isinstance(layer, Dense)))

    def tokenize(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of texts, without special tokens."""
        return tokenize(self.tokenizer, texts)

    def frame(self, query: Ids, passage: Ids) -> tuple[Ids, int]:
        """Glue a query's and a passage's ids together; also where the second segment begins."""
        return self.format.pair(query, passage, self.config.pair_length)

    def pooled(self, states: Tensor, batch: TokenBatch) -> Tensor:
        """The vectors (N, d), float32, that last hidden states (N, L, d) of pairs make; `scores` reads them."""
        return pool(states, batch.attention_mask, self.config.pooling)

    def scores(self, vectors: Tensor) -> Tensor:
        """Scores, float32 of shape (N,), of pooled states (N, d)."""
        # The head is too small to gain from bfloat16, and its rounding would tie neighbouring scores.
        with torch.autocast(vectors.device.type, enabled=False):
            scores: Tensor = self.head(self.dropout(self.dense(vectors))).squeeze(-1)
        return scores

    @torch.inference_mode()
    def score(
        self,
        queries: TokenIds,
        passages: TokenIds,
        pairs: npt.NDArray[np.int64],
        token_budget: int = 4096,
        show: str | None = None,
        precision: Precision | None = None,
    ) -> npt.NDArray[np.float32]:
        """Scores of (query row, passage row) pairs, float32 of shape (P,), from pairs int64 of shape (P, 2).

        Pairs of many queries share a batch: they are cut by length alone. `precision` is as in `DualEncoder.encode`,
        and so is what becomes of a score that is not finite.
        """
        if self.training:  # telling a hundred modules takes time that a single question notices
            self.eval()
        device = device_of(self)
        special = len(self.format.pair_prefix) + len(self.format.pair_middle) + len(self.format.pair_suffix)
        query_lengths = np.fromiter(
            (len(queries[row]) for row in range(len(queries))), dtype=np.int64, count=len(queries)
        )
        passage_lengths = np.fromiter(
            (len(passages[int(row)]) for row in pairs[:, 1]), dtype=np.int64, count=len(pairs)
        )
        lengths = np.minimum(query_lengths[pairs[:, 0]] + passage_lengths + special, self.config.pair_length)
        states_of = for_inference(self.encoder, precision or self.precision, self.ranges)
        scores = np.empty(len(pairs), dtype=np.float32)
        progress = bar(show, len(pairs), "pair") if show else None

        def read(rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Tensor]:
            framed = [self.frame(queries[int(q)], passages[int(p)]) for q, p in pairs[rows]]
            batch = self.format.pad([ids for ids, _ in framed], [start for _, start in framed]).to(device)
            return rows, self.pooled(states_of(batch), batch)

        batches = threads.batches(lengths, token_budget, device)
        for rows, vectors in threads.without_gradient(read, batches, device):
            scores[rows] = self.scores(vectors).cpu().numpy()
            if progress:
                progress.update(len(rows))
        if progress:
            progress.close()
        if (row := not_finite(scores)) is not None:
            question, passage = (
                named(self.tokenizer, texts[int(text)])
                for texts, text in zip((queries, passages), pairs[row], strict=True)
            )
            raise TandemError(
                f"The re-ranker {self.config.model} gives the question {question} with the passage {passage} a score "
                "that is not finite; train it again, or use another."
            )
        return scores
