"""From token ids to padded batches: framing with special tokens, cutting by token budget, padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandemqa.data.tokens import MAX_TOKENS
from tandemqa.errors import TandemError
from tandemqa.wording import quoted

Ids = npt.NDArray[np.int32]

# Rows of at least this share of the longest may be padded to it.
SIMILAR = 0.9
# Tokens at the beginning of a text that a message may need.
NAMING = 40
# A batch of a sixteenth of the token budget is large enough not to be widened further: the padding of a training step
# stays below a twentieth for passages of about a hundred tokens, in sixteen lists of eight or more. Texts that are
# both short and few are padded more, for too few of them are alike.
EFFICIENT_SHARE = 16


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded to a common length, as every Hugging Face encoder takes them.

    input_ids, attention_mask and type_ids are int64 tensors of shape (N, L); type_ids is None for encoders
    without segment embeddings.
    """

    input_ids: Tensor
    attention_mask: Tensor
    type_ids: Tensor | None

    def rows(self, chosen: slice) -> "TokenBatch":
        """Some of the sequences, padded as they are."""
        types = None if self.type_ids is None else self.type_ids[chosen]
        return TokenBatch(self.input_ids[chosen], self.attention_mask[chosen], types)

    def to(self, device: torch.device) -> "TokenBatch":
        types = None if self.type_ids is None else self.type_ids.to(device)
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device), types)


class InputFormat:
    """How one encoder frames a text, or a pair of texts, that is already tokenised.

    Learnt from the tokeniser itself (`[CLS] a [SEP] b [SEP]` for BERT, `<s> a </s></s> b </s>` for RoBERTa), so
    that a cross-encoder input is two stored slices glued together and nothing is tokenised twice.
    """

    def __init__(self, tokenizer: Any) -> None:
        text = tokenizer("a", add_special_tokens=False)["input_ids"]
        single = tokenizer("a")["input_ids"]
        pair = tokenizer("a", "a")
        start = _find(single, text, 0)
        first = _find(pair["input_ids"], text, 0)
        second = _find(pair["input_ids"], text, first + len(text))
        self.prefix, self.suffix = _ids(single[:start]), _ids(single[start + len(text) :])
        self.pair_prefix = _ids(pair["input_ids"][:first])
        self.pair_middle = _ids(pair["input_ids"][first + len(text) : second])
        self.pair_suffix = _ids(pair["input_ids"][second + len(text) :])
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.has_types = "token_type_ids" in tokenizer.model_input_names
        types = pair.get("token_type_ids", [0] * len(pair["input_ids"]))
        # Where the second segment begins, counted from the first token of the second text.
        self.type_offset = len([t for t in types[:second] if t == 1])

    def single(self, ids: Ids, max_length: int) -> Ids:
        """One framed text of at most `max_length` tokens, special tokens included; the text is cut at its end."""
        room = max_length - len(self.prefix) - len(self.suffix)
        return np.concatenate([self.prefix, ids[:room], self.suffix])

    def pair(self, query: Ids, passage: Ids, max_length: int) -> tuple[Ids, int]:
        """A framed query and passage, and the position at which the second segment begins.

        At most `max_length` tokens, special tokens included. The longer of the two is cut first, as
        `truncation="longest_first"` does, so that scores equal sentence-transformers' CrossEncoder.
        """
        room = max_length - len(self.pair_prefix) - len(self.pair_middle) - len(self.pair_suffix)
        if len(query) + len(passage) > room:
            shorter = min(len(query), len(passage), room // 2)
            passage_is_longer = len(passage) >= len(query)
            query = query[: shorter if passage_is_longer else room - shorter]
            passage = passage[: room - shorter if passage_is_longer else shorter]
        framed = np.concatenate([self.pair_prefix, query, self.pair_middle, passage, self.pair_suffix])
        return framed, len(self.pair_prefix) + len(query) + len(self.pair_middle) - self.type_offset

    def pad(self, sequences: Sequence[Ids], segment_starts: Sequence[int] | None = None) -> TokenBatch:
        """Pad framed sequences to the longest; `segment_starts` says where each one's second segment begins."""
        length = max(len(ids) for ids in sequences)
        input_ids = np.full((len(sequences), length), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(sequences), length), dtype=np.int64)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        types = None
        if self.has_types:
            types = torch.zeros((len(sequences), length), dtype=torch.int64)
            if segment_starts is not None:
                starts = torch.tensor(segment_starts)[:, None]
                types = (torch.arange(length)[None, :] >= starts).long() * torch.from_numpy(mask)
        return TokenBatch(torch.from_numpy(input_ids), torch.from_numpy(mask), types)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Token ids of texts, without special tokens, each cut at MAX_TOKENS."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=MAX_TOKENS)
    return [_ids(ids) for ids in encoded["input_ids"]]


def position_limit(config: Any) -> int:
    """Tokens that an encoder of this configuration reads at most, special ones included."""
    positions = int(getattr(config, "max_position_embeddings", MAX_TOKENS))
    return min(positions - first_position(config), MAX_TOKENS)


def first_position(config: Any) -> int:
    """The position of an encoder's first token: RoBERTa and its kin count from behind the padding id."""
    kin = "roberta" in config.model_type or config.model_type == "camembert"
    return int(config.pad_token_id) + 1 if kin else 0


def named(tokenizer: Any, ids: Ids) -> str:
    """A tokenised text as a message names it: its beginning, in quotes."""
    return quoted(tokenizer.decode(ids[:NAMING].tolist()))


def prompt_ids(tokenizer: Any, prompt: str) -> Ids:
    """The token ids of a prompt as they stand before any text; a tokeniser that joins them is a `TandemError`."""
    if not prompt:
        return _ids([])
    found = set()
    for text in ("a", "Owls fly.", "3 x 4", "東京"):
        together = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        alone = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.add((tuple(together[: -len(alone)]), together[-len(alone) :] == alone))
    ids, apart = found.pop()
    if found or not apart:
        raise TandemError(
            f"The prompt {prompt!r} cannot be used: this model's tokeniser joins it with the text behind it, "
            "and texts are tokenised without it; choose another model or an empty prompt."
        )
    return _ids(ids)


def token_budget_batches(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Cut work into batches of similar length: yields arrays of row numbers, longest rows first.

    A batch padded to its longest row holds at most `budget` tokens (a single row may exceed it). It also ends where
    rows become a tenth shorter than its longest, once it is large enough for efficient matrix products, so that
    little is padding. Longest first, so that memory peaks at once and the estimate of the remaining time errs on
    the safe side.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        most = max(1, budget // longest)
        enough = max(1, budget // EFFICIENT_SHARE // longest)
        similar = int(np.count_nonzero(lengths[order[start : start + most]] > SIMILAR * longest))
        rows = min(most, max(similar, enough))
        yield order[start : start + rows]
        start += rows


def _ids(values: Sequence[int]) -> Ids:
    return np.asarray(values, dtype=np.int32)


def _find(haystack: Sequence[int], needle: Sequence[int], start: int) -> int:
    for position in range(start, len(haystack) - len(needle) + 1):
        if list(haystack[position : position + len(needle)]) == list(needle):
            return position
    raise TandemError("This model's tokeniser cannot be used: it changes a text when it frames it.")
