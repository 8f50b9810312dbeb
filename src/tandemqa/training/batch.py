"""A batch of training lists, as padded tensors cut by token budget."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandemqa.data.tokens import TokenIds
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder, Tower
from tandemqa.encoders.inputs import Ids, TokenBatch, token_budget_batches
from tandemqa.lists.build import NO_PASSAGE, TrainingLists

# Smaller cuts pad less and keep activations in cache; larger ones make better matrix products.
TOKEN_BUDGET = 4096

Part = tuple[Tensor, TokenBatch]


class Texts(NamedTuple):
    """The token ids that lists refer to, without special tokens: of one model, for tokenisers may differ."""

    queries: TokenIds
    passages: TokenIds


# A model and its texts; None for a model that takes no part in a step.
RetrieverSide = tuple[DualEncoder, Texts] | None
RerankerSide = tuple[CrossEncoder, Texts] | None
Sides = tuple[RetrieverSide, RerankerSide]


@dataclass(frozen=True)
class ListBatch:
    """B lists of n candidates, with each query and each distinct passage present once.

    `mask` bool (B, n): real candidates. `passage_index` int64 (B, n): a candidate's position among the batch's
    distinct passages. The parts are padded batches with the positions (int64) that their rows fill: of the B
    queries, the distinct passages, and the B·n query-passage pairs (padding left out).
    """

    mask: Tensor
    passage_index: Tensor
    queries: list[Part]
    passages: list[Part]
    pairs: list[Part]

    def share(self, rank: int, count: int) -> "ListBatch":
        """The same lists with every `count`-th row of each part, from `rank` on: one process's share of the work."""
        if count == 1:
            return self
        queries, passages, pairs = (
            [(rows[rank::count], batch.rows(slice(rank, None, count))) for rows, batch in parts if len(rows) > rank]
            for parts in (self.queries, self.passages, self.pairs)
        )
        return ListBatch(self.mask, self.passage_index, queries, passages, pairs)

    def tokens(self) -> tuple[int, int]:
        """Real tokens and tokens with padding, over all parts."""
        parts = [*self.queries, *self.passages, *self.pairs]
        real = sum(int(batch.attention_mask.sum()) for _, batch in parts)
        return real, sum(batch.attention_mask.numel() for _, batch in parts)


def make_batch(
    lists: TrainingLists,
    rows: npt.NDArray[np.int64],
    retriever: RetrieverSide,
    reranker: RerankerSide,
) -> ListBatch:
    """The lists at `rows` as a batch for the models that take part."""
    chosen = lists.passages[rows]
    query_rows = lists.query_rows[rows]
    mask = chosen != NO_PASSAGE
    distinct, index = np.unique(chosen[mask], return_inverse=True)
    passage_index = np.zeros(chosen.shape, dtype=np.int64)
    passage_index[mask] = index
    queries: list[Part] = []
    passages: list[Part] = []
    pairs: list[Part] = []
    if retriever is not None:
        model, texts = retriever
        queries = _single_parts(model, [texts.queries[int(row)] for row in query_rows], "query")
        passages = _single_parts(model, [texts.passages[int(row)] for row in distinct], "passage")
    if reranker is not None:
        pairs = _pair_parts(*reranker, query_rows, chosen)
    return ListBatch(torch.from_numpy(mask), torch.from_numpy(passage_index), queries, passages, pairs)


def split_rows(
    lists: TrainingLists, rows: npt.NDArray[np.int64], sides: Sides, micro_tokens: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Cut a step's lists into parts of at most about `micro_tokens` tokens, at least one list each, in order."""
    retriever, reranker = sides
    if not len(rows):
        return
    start = tokens = 0
    for place, row in enumerate(rows):
        passages = lists.passages[row]
        real = passages[passages != NO_PASSAGE].tolist()
        cost = 0
        if retriever is not None:
            limit = retriever[0].config.passage_length
            cost += sum(min(len(retriever[1].passages[p]), limit) for p in real)
        if reranker is not None:
            query = len(reranker[1].queries[int(lists.query_rows[row])])
            limit = reranker[0].config.pair_length
            cost += sum(min(query + len(reranker[1].passages[p]), limit) for p in real)
        if place > start and tokens + cost > micro_tokens:
            yield rows[start:place]
            start, tokens = place, 0
        tokens += cost
    yield rows[start:]


def _single_parts(retriever: DualEncoder, texts: list[Ids], tower: Tower) -> list[Part]:
    framed = [retriever.frame(ids, tower) for ids in texts]
    lengths = np.array([len(ids) for ids in framed])
    return [
        (torch.from_numpy(part), retriever.format.pad([framed[i] for i in part]))
        for part in token_budget_batches(lengths, TOKEN_BUDGET)
    ]


def _pair_parts(
    reranker: CrossEncoder, texts: Texts, query_rows: npt.NDArray[np.int32], chosen: npt.NDArray[np.int32]
) -> list[Part]:
    places = np.flatnonzero(chosen != NO_PASSAGE)
    rows = chosen.reshape(-1)
    framed = [
        reranker.frame(texts.queries[int(query_rows[place // chosen.shape[1]])], texts.passages[int(rows[place])])
        for place in places
    ]
    parts = []
    for part in token_budget_batches(np.array([len(ids) for ids, _ in framed]), TOKEN_BUDGET):
        batch = reranker.format.pad([framed[i][0] for i in part], [framed[i][1] for i in part])
        parts.append((torch.from_numpy(places[part]), batch))
    return parts
