"""Exact inner-product search over vectors kept in half precision."""

from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from tandemqa.errors import TandemError
from tandemqa.files import whole_file

# Queries per call: the scores of a block and its heap stay in cache, whatever the number of queries.
BLOCK = 1024


class DenseIndex:
    """A FAISS flat index of float16 vectors; row i of the index is passage row i."""

    def __init__(self, index: faiss.Index) -> None:
        self.index = index

    @classmethod
    def build(cls, vectors: npt.NDArray[np.float32]) -> "DenseIndex":
        """Index vectors, float32 of shape (N, d)."""
        if not np.isfinite(vectors).all():
            row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
            raise TandemError(
                f"The retriever gave a vector that is not finite for passage row {row}; train it again."
            )
        index = faiss.IndexScalarQuantizer(
            vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return cls(index)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(
        self, queries: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The k best rows for each query, best first: rows int32 (Q, k), scores float32 (Q, k).

        k is cut at the size of the index. Never more than a block of queries is compared at once.
        """
        k = min(k, len(self))
        rows = np.empty((len(queries), k), dtype=np.int32)
        scores = np.empty((len(queries), k), dtype=np.float32)
        for start in range(0, len(queries), BLOCK):
            block = slice(start, start + BLOCK)
            scores[block], rows[block] = self.index.search(np.ascontiguousarray(queries[block]), k)
        return rows, scores

    def save(self, path: Path) -> None:
        # Written by Python's own file, so that a full disk is an OSError and not a RuntimeError of faiss.
        with whole_file(path) as partial, partial.open("wb") as file:
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]

    @classmethod
    def load(cls, path: Path) -> "DenseIndex":
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise TandemError(f"The vector index {path} is missing or damaged; build the index again.") from error
