"""What a segment is made of: texts that are encoded, or what other segments hold already."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tandemqa.data.tokens import tokenizer_fingerprint
from tandemqa.encoders.bundle import Bundle
from tandemqa.index.passages import PassageStore
from tandemqa.index.segment import Encoded, Segment
from tandemqa.index.vectors import VectorCache

# Texts from which it pays to find out whether both models have the same tokeniser.
WORTH_COMPARING = 500


@dataclass(frozen=True)
class Texts:
    """Passages to be encoded by a bundle; vectors that are `cached` are not made again."""

    bundle: Bundle
    read: Callable[[int, int], list[str]]
    cached: VectorCache | None = None
    rounded: ClassVar[bool] = False

    def texts(self, start: int, stop: int) -> list[str]:
        return self.read(start, stop)

    def encode(self, start: int, stop: int, progress: "tqdm[Any]") -> Encoded:
        retriever, reranker = self.bundle.retriever, self.bundle.reranker
        texts = self.read(start, stop)
        tokens = reranker.tokenize(texts)
        vectors = self.cached.load(start, stop) if self.cached else None
        if vectors is not None:
            return vectors, tokens
        same = len(texts) >= WORTH_COMPARING and (
            tokenizer_fingerprint(retriever.tokenizer) == tokenizer_fingerprint(reranker.tokenizer)
        )
        return retriever.encode(tokens if same else retriever.tokenize(texts), "passage", show=progress), tokens


class Copied:
    """The passages of `segments` that are `live`, bool by row; `rows` are theirs, int32 of shape (n,)."""

    def __init__(self, segments: Sequence[Segment], passages: PassageStore, live: npt.NDArray[np.bool_]) -> None:
        self._segments, self._passages = segments, passages
        self.rounded = any(segment.rounded for segment in segments)
        self._places = [np.flatnonzero(live[segment.rows]) for segment in segments]
        self._ends = np.cumsum([0, *map(len, self._places)])
        kept = [segment.rows[places] for segment, places in zip(segments, self._places, strict=True)]
        self.rows: npt.NDArray[np.int32] = np.concatenate([np.empty(0, dtype=np.int32), *kept])

    def texts(self, start: int, stop: int) -> list[str]:
        return self._passages.texts(self.rows[start:stop].tolist())

    def encode(self, start: int, stop: int, progress: "tqdm[Any]") -> Encoded:
        vectors: list[npt.NDArray[np.float32]] = []
        tokens: list[npt.NDArray[np.int32]] = []
        for segment, places, first in zip(self._segments, self._places, self._ends, strict=False):
            some = places[max(start - first, 0) : max(stop - first, 0)]
            if len(some):
                vectors.append(segment.vectors.vectors(some))
                tokens += (segment.tokens[place] for place in some.tolist())
        return np.concatenate(vectors), tokens
