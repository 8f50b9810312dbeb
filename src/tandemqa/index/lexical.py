"""BM25 over the passages' words, by `bm25s`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import bm25s
import numpy as np
import numpy.typing as npt
import Stemmer

from tandemqa.errors import TandemError
from tandemqa.files import whole_folder

BLOCK = 1024


class LexicalIndex:
    """BM25 (Lucene's form, k1 1.2, b 0.75; English stop words and Snowball stemming); row i is passage row i."""

    def __init__(self, bm25: bm25s.BM25, size: int) -> None:
        self.bm25 = bm25
        self.size = size

    @classmethod
    def build(cls, texts: Iterable[str]) -> "LexicalIndex":
        tokens = _tokenize(texts)
        bm25 = bm25s.BM25(k1=1.2, b=0.75)
        bm25.index(tokens, show_progress=False)
        return cls(bm25, len(tokens.ids))

    def search(self, queries: Sequence[str], k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The k best rows for each query, best first: rows int32 (Q, k), scores float32 (Q, k).

        Passages that share no word with the query are no candidates: their row is -1, their score -inf.
        """
        k = min(k, self.size)
        rows = np.full((len(queries), k), -1, dtype=np.int32)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for start in range(0, len(queries), BLOCK):
            block = slice(start, start + BLOCK)
            found, values = self.bm25.retrieve(_tokenize(queries[block]), k=k, show_progress=False)
            matched = values > 0
            rows[block] = np.where(matched, found, -1)
            scores[block] = np.where(matched, values, -np.inf)
        return rows, scores

    def save(self, folder: Path) -> None:
        with whole_folder(folder) as partial:
            self.bm25.save(partial)

    @classmethod
    def load(cls, folder: Path) -> "LexicalIndex":
        """Open an index with its arrays memory-mapped."""
        try:
            bm25 = bm25s.BM25.load(folder, mmap=True)
        except (OSError, ValueError, KeyError) as error:
            raise TandemError(f"The BM25 index {folder} is missing or damaged; build the index again.") from error
        return cls(bm25, int(bm25.scores["num_docs"]))


def _tokenize(texts: Iterable[str]) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(
        list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False, return_ids=True
    )
