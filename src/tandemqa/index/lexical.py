"""BM25 over the passages' words, by `bm25s`."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import bm25s
import numpy as np
import numpy.typing as npt
import Stemmer

from tandemqa.errors import TandemError
from tandemqa.files import save_array, whole_folder

K1, B = 1.2, 0.75
LENGTHS = "lengths.npy"


class LexicalIndex:
    """BM25 (Lucene's form, k1 1.2, b 0.75; English stop words and Snowball stemming); row i is passage row i.

    lengths: int32 of shape (N,), the words of each passage that count.
    """

    def __init__(self, bm25: bm25s.BM25, lengths: npt.NDArray[np.int32]) -> None:
        self.bm25 = bm25
        self.lengths = lengths
        self.words = int(lengths.sum(dtype=np.int64))

    @property
    def size(self) -> int:
        return len(self.lengths)

    @classmethod
    def build(cls, texts: Iterable[str]) -> "LexicalIndex":
        ids, vocabulary = _tokenize(texts, return_ids=True)
        bm25 = bm25s.BM25(k1=K1, b=B)
        with np.errstate(invalid="ignore"):  # of texts without any word the mean length is 0
            bm25.index((ids, vocabulary or {"": 0}), show_progress=False)
        return cls(bm25, np.fromiter(map(len, ids), dtype=np.int32, count=len(ids)))

    def search(
        self, queries: Sequence[str], k: int, allowed: npt.NDArray[np.bool_] | None = None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The k best rows for each query, best first: rows int32 (Q, k), scores float32 (Q, k).

        Passages that share no word with the query, or that are not `allowed` (bool of shape (N,)), are no
        candidates: their row is -1, their score -inf. k is cut at the size of the index.
        """
        return search_parts([self], queries, min(k, self.size), [allowed])

    def frequency(self, word: str) -> int:
        """The number of passages with this word."""
        return len(self._postings(word)[0])

    def scores(self, words: Sequence[str], idf: dict[str, float], mean_length: float) -> npt.NDArray[np.float32]:
        """BM25 of every passage, float32 of shape (N,), as if it stood in a corpus of this `idf` and mean length.

        bm25s has stored idf · tf / (tf + K) with K = k1 (1 - b + b · length / mean length), with the idf and the
        mean of this index alone. K goes from the one mean to the other by a factor that a passage has for all words.
        """
        scores = np.zeros(self.size, dtype=np.float32)
        if not self.words:
            return scores
        own_mean = self.words / self.size
        factor = None
        if mean_length != own_mean:
            lengths = np.asarray(self.lengths, dtype=np.float32)
            factor = (1 - B + B * lengths / mean_length) / (1 - B + B * lengths / own_mean)
        for word in words:
            rows, stored = self._postings(word)
            if not len(rows):
                continue
            share = stored / np.float32(_idf(len(rows), self.size))
            if factor is not None:
                share = 1 / (1 + (1 / share - 1) * factor[rows])
            scores[rows] += np.float32(idf[word]) * share
        return scores

    def _postings(self, word: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        matrix = self.bm25.scores
        column = self.bm25.vocab_dict.get(word, len(matrix["indptr"]))
        if column + 1 >= len(matrix["indptr"]):  # not known, or bm25s' own empty word
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        place = slice(int(matrix["indptr"][column]), int(matrix["indptr"][column + 1]))
        return matrix["indices"][place], matrix["data"][place]

    def save(self, folder: Path) -> None:
        with whole_folder(folder) as partial:
            self.bm25.save(partial)
            for name in ("data", "indices", "indptr"):
                # Again, because numpy does not notice that the disk is full; see `save_array`.
                save_array(partial / f"{name}.csc.index.npy", self.bm25.scores[name])
            save_array(partial / LENGTHS, self.lengths)

    @classmethod
    def load(cls, folder: Path, mapped: bool = True) -> "LexicalIndex":
        """Open an index with its arrays memory-mapped, or read into memory."""
        try:
            bm25 = bm25s.BM25.load(folder, mmap=mapped)
            lengths = np.load(folder / LENGTHS, mmap_mode="r" if mapped else None, allow_pickle=False)
        except (OSError, ValueError, KeyError) as error:
            raise TandemError(f"The BM25 index {folder} is missing or damaged; build the index again.") from error
        return cls(bm25, lengths)


def search_parts(
    parts: Sequence[LexicalIndex], queries: Sequence[str], k: int, allowed: Sequence[npt.NDArray[np.bool_] | None]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The k best rows over several indexes as if they were one; rows count through the parts one after the other.

    Word frequencies and the mean length are those of all parts together, so that the scores of a passage in a small
    part and of one in a large part can be compared. As `LexicalIndex.search`, but k is not cut: -1 follows.
    """
    total = sum(part.size for part in parts)
    mean_length = sum(part.words for part in parts) / max(total, 1)
    rows = np.full((len(queries), k), -1, dtype=np.int32)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    for number, words in enumerate(_tokenize(queries, return_ids=False)):
        idf = {word: _idf(sum(part.frequency(word) for part in parts), total) for word in words}
        found_rows, found_scores, start = [], [], 0
        for part, mask in zip(parts, allowed, strict=True):
            values = part.scores(words, idf, mean_length)
            if mask is not None:
                values *= mask
            best = np.flatnonzero(values)
            if len(best) > k:
                best = best[np.argpartition(-values[best], k - 1)[:k]]
            found_rows.append(best + start)
            found_scores.append(values[best])
            start += part.size
        all_rows, all_scores = np.concatenate(found_rows), np.concatenate(found_scores)
        order = np.lexsort((all_rows, -all_scores))[:k]
        rows[number, : len(order)], scores[number, : len(order)] = all_rows[order], all_scores[order]
    return rows, scores


def _idf(frequency: int, total: int) -> float:
    """Lucene's: never negative."""
    return math.log(1 + (total - frequency + 0.5) / (frequency + 0.5))


def _tokenize(texts: Iterable[str], return_ids: bool) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(
        list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False, return_ids=return_ids
    )
