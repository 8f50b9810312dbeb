"""The retriever: a dual-encoder whose score is the similarity of a query vector and a passage vector."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from tqdm import tqdm

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
from tandemqa.encoders.inputs import Ids, InputFormat, TokenBatch, named, prompt_ids, tokenize
from tandemqa.encoders.quantised import Ranges
from tandemqa.errors import TandemError
from tandemqa.progress import bar

Tower = Literal["query", "passage"]

# Tokens of a batch, padding included.
TOKEN_BUDGET = 4096


class RetrieverConfig(BaseModel):
    """What the retriever is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(BASE_MODEL, description="Starting weights: a folder, a bundle's retriever/ or a hub id.")
    pooling: Pooling = Field("mean", description="The vector of a text: its [CLS] state, the mean of all, ...")
    similarity: Literal["dot", "cosine"] = Field("cosine", description="Inner product as it is, or normalised.")
    towers: Literal["shared", "untied"] = Field("shared", description="One encoder for both sides, or one each.")
    query_length: int = Field(
        64, ge=4, description="Tokens a query is cut at by a tower of its own; a shared one has one length for both."
    )
    passage_length: int = Field(128, ge=8, description="Tokens a passage is cut at, special tokens included.")
    query_prompt: str = Field("", description="Put before every query, as 'query: ' for models trained so.")
    passage_prompt: str = Field("", description="Put before every passage.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside the encoder; the paper uses 0.1.")
    lora_rank: int | None = Field(
        None, ge=1, description="Train adapters of this rank and leave the weights (needs the extra `lora`)."
    )


class DualEncoder(nn.Module):
    """Two towers (or one that serves as both) that map texts to vectors (RocketQAv2, section 3.1).

    Training reads the towers itself and makes vectors of their states with `pooled`; `encode` is for everything else.

    precision: what `encode` computes in if it is not told. ranges: of each tower's activations, once measured.
    """

    def __init__(
        self,
        config: RetrieverConfig,
        tokenizer: Any,
        query_tower: nn.Module,
        passage_tower: nn.Module,
        dense: Sequence[Dense] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.format = InputFormat(tokenizer)
        self.query_tower = query_tower
        self.passage_tower = passage_tower
        self.dense = nn.Sequential(*dense)
        self.precision: Precision = "auto"
        self.ranges: dict[Tower, Ranges] = {}
        hidden = int(query_tower.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.size = dense[-1].linear.out_features if dense else hidden
        self.prompts: dict[Tower, Ids] = {
            "query": prompt_ids(tokenizer, config.query_prompt),
            "passage": prompt_ids(tokenizer, config.passage_prompt),
        }

    @classmethod
    def load(cls, config: RetrieverConfig) -> "DualEncoder":
        """Load the weights that `config.model` names; a base model becomes both towers."""
        meaning = ("pooling", "similarity", "towers", "query_prompt", "passage_prompt")
        settings = {name: getattr(config, name) for name in meaning}
        layout.check_origin(config.model, "retriever", settings)
        sources = layout.tower_sources(config.model)
        query_tower = load_backbone(sources[0], config.dropout)
        passage_tower = query_tower
        if config.towers == "untied":
            passage_tower = (
                copy.deepcopy(query_tower) if sources[0] == sources[1] else load_backbone(sources[1], config.dropout)
            )
        check_length(query_tower, config.query_length if config.towers == "untied" else 0, "retriever.query_length")
        check_length(passage_tower, config.passage_length, "retriever.passage_length")
        dense = layout.load_dense(config.model)
        return cls(config, load_tokenizer(sources[0]), query_tower, passage_tower, dense).to(default_device())

    def save(self, folder: Path) -> None:
        """Write the folder that `sentence_transformers.SentenceTransformer` reads."""
        layout.save_retriever(
            folder,
            towers=(self.query_tower, self.passage_tower),
            tokenizer=self.tokenizer,
            dense=list(self.dense),  # type: ignore[arg-type]
            pooling=self.config.pooling,
            normalise=self.config.similarity == "cosine",
            lengths=(self.limit("query"), self.limit("passage")),
            prompts=(self.config.query_prompt, self.config.passage_prompt),
        )

    def at(self, precision: Precision) -> "DualEncoder":
        """The same model, weights shared, that computes in `precision` if it is not told."""
        model = copy.copy(self)
        model.precision = precision
        return model

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that identify the weights, the prompts and what follows the pooling."""
        activations = [layer.name for layer in self.dense if isinstance(layer, Dense)]
        return weights_fingerprint(self, *activations, self.config.query_prompt, self.config.passage_prompt)

    def tokenize(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of texts, without special tokens."""
        return tokenize(self.tokenizer, texts)

    def frame(self, ids: Ids, tower: Tower) -> Ids:
        """Add the prompt and the special tokens to a text's ids and cut it at its tower's length."""
        return self.format.single(np.concatenate([self.prompts[tower], ids]), self.limit(tower))

    def limit(self, tower: Tower) -> int:
        """Tokens that a tower reads of a text, special tokens included."""
        own = tower == "query" and self.config.towers == "untied"
        return self.config.query_length if own else self.config.passage_length

    def tower(self, side: Tower) -> nn.Module:
        """The encoder of one side."""
        return self.query_tower if side == "query" else self.passage_tower

    def pooled(self, states: Tensor, batch: TokenBatch) -> Tensor:
        """The vectors (N, d) that last hidden states (N, L, d) of either tower make."""
        vectors = pool(states, batch.attention_mask, self.config.pooling)
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = self.dense(vectors)
        return nn.functional.normalize(vectors, dim=-1) if self.config.similarity == "cosine" else vectors

    @torch.inference_mode()
    def encode(
        self,
        texts: TokenIds,
        tower: Tower,
        token_budget: int = TOKEN_BUDGET,
        show: "str | tqdm[Any] | None" = None,
        precision: Precision | None = None,
    ) -> npt.NDArray[np.float32]:
        """Vectors of tokenised texts (ids without special tokens), float32 of shape (N, d), in the order given.

        `texts` may be a token store. `show` names a progress bar, or is one to be moved on.
        `precision` "auto" computes in bfloat16 where the processor does, "int8" in bytes; None is the model's own.
        A vector that is not finite is a `TandemError` that names the model and the text.
        """
        vectors = np.empty((len(texts), self.size), dtype=np.float32)
        for rows, states, batch in self._read(texts, tower, token_budget, show, precision):
            vectors[rows] = self.pooled(states, batch).float().cpu().numpy()
        self._check_finite(vectors, texts, tower)
        return vectors

    @torch.inference_mode()
    def encode_tokens(self, texts: TokenIds, tower: Tower) -> list[npt.NDArray[np.float32]]:
        """The last state of every token of each text, scaled to unit length: float32 of shape (L, d) a text.

        The prompt and special tokens are left out, and so are tokens beyond the tower's length.
        """
        tokens: list[npt.NDArray[np.float32]] = [np.empty((0, 0), dtype=np.float32)] * len(texts)
        for rows, states, batch in self._read(texts, tower, TOKEN_BUDGET, None, None):
            for row, own in zip(rows.tolist(), self._tokens(states, batch, tower), strict=True):
                tokens[row] = own
        return tokens

    @torch.inference_mode()
    def encode_queries(self, queries: TokenIds) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
        """What `encode` and `encode_tokens` give for queries, which are read only once."""
        vectors = np.empty((len(queries), self.size), dtype=np.float32)
        tokens: list[npt.NDArray[np.float32]] = [np.empty((0, 0), dtype=np.float32)] * len(queries)
        for rows, states, batch in self._read(queries, "query", TOKEN_BUDGET, None, None):
            vectors[rows] = self.pooled(states, batch).float().cpu().numpy()
            for row, own in zip(rows.tolist(), self._tokens(states, batch, "query"), strict=True):
                tokens[row] = own
        self._check_finite(vectors, queries, "query")
        return vectors, tokens

    @torch.inference_mode()
    def look_up(self, ids: Ids) -> npt.NDArray[np.float32]:
        """The embedding of each token before any layer, scaled to unit length: float32 of shape (n, d)."""
        table: nn.Module = self.passage_tower.get_input_embeddings()  # type: ignore[operator]
        tokens = torch.from_numpy(ids.astype(np.int64)).to(device_of(self))
        unit: npt.NDArray[np.float32] = nn.functional.normalize(table(tokens).float(), dim=-1).cpu().numpy()
        return unit

    def _tokens(self, states: Tensor, batch: TokenBatch, tower: Tower) -> list[npt.NDArray[np.float32]]:
        """The states (N, L, d) of each text's own tokens, scaled to unit length."""
        before, after = len(self.format.prefix) + len(self.prompts[tower]), len(self.format.suffix)
        unit = nn.functional.normalize(states.float(), dim=-1).cpu().numpy()
        lengths = batch.attention_mask.sum(1).tolist()
        return [state[before : length - after] for state, length in zip(unit, lengths, strict=True)]

    def _check_finite(self, vectors: npt.NDArray[np.float32], texts: TokenIds, tower: Tower) -> None:
        if (row := not_finite(vectors)) is not None:
            text = named(self.tokenizer, texts[row])
            raise TandemError(
                f"The retriever {self.config.model} gives the {tower} {text} a vector that is not finite; "
                "train it again, or use another."
            )

    def _read(
        self,
        texts: TokenIds,
        tower: Tower,
        token_budget: int,
        show: "str | tqdm[Any] | None",
        precision: Precision | None,
    ) -> Iterator[tuple[npt.NDArray[np.int64], Tensor, TokenBatch]]:
        """The hidden states of the texts, a batch after the other: row numbers, states (N, L, d), the batch."""
        if self.training:  # telling a hundred modules takes time that a single question notices
            self.eval()
        device = device_of(self)
        lengths = np.fromiter((len(texts[row]) for row in range(len(texts))), dtype=np.int64, count=len(texts))
        special = len(self.format.prefix) + len(self.prompts[tower]) + len(self.format.suffix)
        lengths = np.minimum(lengths + special, self.limit(tower))
        states_of = for_inference(self.tower(tower), precision or self.precision, self.ranges.get(tower))
        progress = bar(show, len(texts), "text") if isinstance(show, str) else show

        def read(rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Tensor, TokenBatch]:
            batch = self.format.pad([self.frame(texts[int(row)], tower) for row in rows]).to(device)
            return rows, states_of(batch), batch

        batches = threads.batches(lengths, token_budget, device)
        for rows, states, batch in threads.without_gradient(read, batches, device):
            yield rows, states, batch
            if progress is not None:
                progress.update(len(rows))
        if progress is not None and isinstance(show, str):
            progress.close()
