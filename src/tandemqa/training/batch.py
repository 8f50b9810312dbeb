"""A batch of training lists, as padded tensors cut by token budget."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from tandemqa.data.tokens import TokenIds
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder, Tower
from tandemqa.encoders.inputs import Ids, TokenBatch, token_budget_batches
from tandemqa.lists.build import NO_PASSAGE, TrainingLists

# Smaller cuts pad less, stay in cache and are shared out more evenly; larger ones convert the weights less often.
TOKEN_BUDGET = 2048

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
    """B lists of n candidates, with each distinct query and each distinct passage present once.

    `mask` bool (B, n): real candidates. `query_index` int64 (B,): the position of a list's query among the batch's
    distinct queries. `passage_index` int64 (B, n): that of a candidate among the distinct passages. The parts are
    padded batches with the positions (int64) that their rows fill: of the distinct queries, the distinct passages,
    and the B·n query-passage pairs (padding left out).
    """

    mask: Tensor
    query_index: Tensor
    passage_index: Tensor
    queries: list[Part]
    passages: list[Part]
    pairs: list[Part]

    @property
    def distinct(self) -> tuple[int, int]:
        """How many distinct queries and passages there are."""
        return int(self.query_index.max()) + 1, int(self.passage_index.max()) + 1

    def share(self, rank: int, count: int) -> "ListBatch":
        """The same lists with every `count`-th row of each part, from `rank` on: one process's share of the work."""
        if count == 1:
            return self
        queries, passages, pairs = (
            [(rows[rank::count], batch.rows(slice(rank, None, count))) for rows, batch in parts if len(rows) > rank]
            for parts in (self.queries, self.passages, self.pairs)
        )
        return replace(self, queries=queries, passages=passages, pairs=pairs)

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
    micro_tokens: int = TOKEN_BUDGET,
) -> ListBatch:
    """The lists at `rows` as a batch for the models that take part, in parts of at most `micro_tokens`."""
    budget = min(TOKEN_BUDGET, micro_tokens)
    chosen = lists.passages[rows]
    query_rows = lists.query_rows[rows]
    mask = chosen != NO_PASSAGE
    distinct_queries, query_index = np.unique(query_rows, return_inverse=True)
    distinct_passages, index = np.unique(chosen[mask], return_inverse=True)
    passage_index = np.zeros(chosen.shape, dtype=np.int64)
    passage_index[mask] = index
    queries: list[Part] = []
    passages: list[Part] = []
    pairs: list[Part] = []
    if retriever is not None:
        model, texts = retriever
        queries = _single_parts(model, [texts.queries[int(row)] for row in distinct_queries], "query", budget)
        passages = _single_parts(model, [texts.passages[int(row)] for row in distinct_passages], "passage", budget)
    if reranker is not None:
        pairs = _pair_parts(*reranker, query_rows, chosen, budget)
    mask_tensor, queries_of, passages_of = map(torch.from_numpy, (mask, query_index, passage_index))
    return ListBatch(mask_tensor, queries_of, passages_of, queries, passages, pairs)


def list_tokens(lists: TrainingLists, rows: npt.NDArray[np.int64], sides: Sides) -> npt.NDArray[np.int64]:
    """About how many tokens the models read of each of the lists at `rows`, int64 of their shape."""
    retriever, reranker = sides
    tokens = np.zeros(len(rows), dtype=np.int64)
    for place, row in enumerate(rows):
        passages = lists.passages[row]
        real = passages[passages != NO_PASSAGE].tolist()
        if retriever is not None:
            limit = retriever[0].config.passage_length
            tokens[place] += sum(min(len(retriever[1].passages[p]), limit) for p in real)
        if reranker is not None:
            query = len(reranker[1].queries[int(lists.query_rows[row])])
            limit = reranker[0].config.pair_length
            tokens[place] += sum(min(query + len(reranker[1].passages[p]), limit) for p in real)
    return tokens


def split_lists(tokens: npt.NDArray[np.int64], micro_tokens: float) -> Iterator[slice]:
    """Cut a step's lists, of so many `tokens` each, into parts of at most `micro_tokens` or of one list, in order."""
    start = used = 0
    for place, cost in enumerate(tokens.tolist()):
        if place > start and used + cost > micro_tokens:
            yield slice(start, place)
            start, used = place, 0
        used += cost
    if len(tokens):
        yield slice(start, len(tokens))


def kept_rows(parts: list[Part], kept: Tensor) -> list[Part]:
    """The rows of the parts whose position is marked in `kept`, bool (positions,), in parts no larger than these."""
    longest = max((batch.input_ids.shape[1] for _, batch in parts), default=0)
    places = torch.cat([torch.empty(0, dtype=torch.int64), *(rows for rows, _ in parts)])
    chosen = kept[places]

    def together(name: str) -> Tensor:
        tensors = [getattr(batch, name) for _, batch in parts]
        return torch.cat([pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])[chosen]

    if not chosen.any():
        return []
    ids, mask = together("input_ids"), together("attention_mask")
    types = None if parts[0][1].type_ids is None else together("type_ids")
    lengths = mask.sum(1).numpy()
    again = []
    for rows in token_budget_batches(lengths, max(batch.input_ids.numel() for _, batch in parts)):
        cut = slice(int(lengths[rows].max()))
        batch = TokenBatch(ids[rows, cut], mask[rows, cut], None if types is None else types[rows, cut])
        again.append((places[chosen][rows], batch))
    return again


def _single_parts(retriever: DualEncoder, texts: list[Ids], tower: Tower, budget: int) -> list[Part]:
    framed = [retriever.frame(ids, tower) for ids in texts]
    lengths = np.array([len(ids) for ids in framed])
    return [
        (torch.from_numpy(part), retriever.format.pad([framed[i] for i in part]))
        for part in token_budget_batches(lengths, budget)
    ]


def _pair_parts(
    reranker: CrossEncoder,
    texts: Texts,
    query_rows: npt.NDArray[np.int32],
    chosen: npt.NDArray[np.int32],
    budget: int,
) -> list[Part]:
    places = np.flatnonzero(chosen != NO_PASSAGE)
    rows = chosen.reshape(-1)
    framed = [
        reranker.frame(texts.queries[int(query_rows[place // chosen.shape[1]])], texts.passages[int(rows[place])])
        for place in places
    ]
    parts = []
    for part in token_budget_batches(np.array([len(ids) for ids, _ in framed]), budget):
        batch = reranker.format.pad([framed[i][0] for i in part], [framed[i][1] for i in part])
        parts.append((torch.from_numpy(places[part]), batch))
    return parts
