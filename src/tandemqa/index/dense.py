"""Inner-product search over vectors kept in half precision or in bytes: exact, or approximate by FAISS."""

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import numpy.typing as npt

from tandemqa.encoders import threads
from tandemqa.encoders.backbone import not_finite
from tandemqa.errors import TandemError
from tandemqa.files import whole_file
from tandemqa.wording import quoted

Kind = Literal["exact", "ivf", "hnsw"]
Storage = Literal["fp16", "int8"]

# Queries per call: the scores of a block and its heap stay in cache, whatever the number of queries.
BLOCK = 1024
# Neighbours of a passage in the graph of HNSW (Malkov and Yashunin, 2018, recommend 5 to 48).
NEIGHBOURS = 32
# Vectors per list that the centroids of IVF are learnt from, and at least as many for the ranges of int8.
SAMPLE_PER_LIST, SAMPLE = 64, 65_536
# From so many vectors on, the exact search for one query is shared out to threads; FAISS shares out queries only.
WORTH_SHARING = 50_000
# Of the vectors, the share from which on looking at all of them is as fast as walking the graph.
WALK_AT_MOST = 0.1


_mapping = threading.Lock()


class DenseIndex:
    """A FAISS index of float16 or int8 vectors; row i of the index is vector i of those it was built from.

    index: exact (flat), IVF (lists around centroids; `breadth` of them are looked through) or HNSW (a graph; the
    best `breadth` passages are walked from). FAISS keeps the breadth in its file.
    """

    def __init__(self, index: faiss.Index) -> None:
        self.index = index

    @classmethod
    def build(cls, vectors: npt.NDArray[np.float32]) -> "DenseIndex":
        """Index vectors, float32 of shape (N, d), for exact search in half precision."""
        return cls.of_blocks([in_half(vectors)])

    @classmethod
    def of_blocks(
        cls, blocks: Sequence[npt.NDArray[np.floating]], kind: Kind = "exact", storage: Storage = "fp16"
    ) -> "DenseIndex":
        """Index finite vectors that come in blocks of shape (n, d), never holding more than one block as float32."""
        total, size = sum(map(len, blocks)), blocks[0].shape[1]
        # Lists of about √N / 4 passages, as FAISS's guidelines have it, but none that too few could teach.
        lists = max(1, min(int(4 * math.sqrt(total)), total // SAMPLE_PER_LIST))
        structure = {"exact": "", "ivf": f"IVF{lists},", "hnsw": f"HNSW{NEIGHBOURS},"}[kind]
        quantizer = {"fp16": "SQfp16", "int8": "SQ8"}[storage]
        index = faiss.index_factory(size, structure + quantizer, faiss.METRIC_INNER_PRODUCT)
        if kind == "ivf":
            # Whole vectors are kept, not their distances from a centroid: they come out as they went in.
            index.by_residual = False
            index.cp.min_points_per_centroid = 1
        if not index.is_trained:
            step = math.ceil(total / max(SAMPLE, lists * SAMPLE_PER_LIST))
            # Copies, because a view of each block would keep them all open.
            sample = np.concatenate([block[::step].copy() for block in blocks])
            index.train(_float32(sample))
        for block in blocks:
            index.add(_float32(block))
        return cls(index)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def kind(self) -> Kind:
        if isinstance(self.index, faiss.IndexIVF):
            return "ivf"
        return "hnsw" if isinstance(self.index, faiss.IndexHNSW) else "exact"

    @property
    def breadth(self) -> int:
        """IVF lists looked through, or candidates of HNSW; an exact index looks at all."""
        if self.kind == "ivf":
            return int(self.index.nprobe)
        return int(self.index.hnsw.efSearch) if self.kind == "hnsw" else len(self)

    @breadth.setter
    def breadth(self, value: int) -> None:
        if self.kind == "ivf":
            self.index.nprobe = value
        elif self.kind == "hnsw":
            self.index.hnsw.efSearch = value

    @property
    def widest(self) -> int:
        """The breadth from which on the search is exact."""
        return int(self.index.nlist) if self.kind == "ivf" else len(self)

    def search(
        self, queries: npt.NDArray[np.float32], k: int, allowed: npt.NDArray[np.bool_] | None = None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The k best rows for each query, best first: rows int32 (Q, k), scores float32 (Q, k).

        Only rows that are `allowed`, bool of shape (N,), are found; where they are fewer than k, row -1 and score
        -inf follow. k is cut at the size of the index. Never more than a block of queries is compared at once.
        """
        k = min(k, len(self))
        rows = np.full((len(queries), k), -1, dtype=np.int32)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        among = len(self) if allowed is None else int(allowed.sum())
        if not k or not among:
            return rows, scores
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        # The fewer rows are allowed, the more must be looked at to meet as many of them.
        breadth = min(self.widest, max(k if self.kind == "hnsw" else 1, math.ceil(self.breadth * len(self) / among)))
        for start in range(0, len(queries), BLOCK):
            block = slice(start, start + BLOCK)
            rows[block], scores[block] = self._search(_float32(queries[block]), k, selector, breadth)
        short = np.flatnonzero((rows >= 0).sum(axis=1) < min(k, among))
        if len(short) and self.kind != "exact":
            rows[short], scores[short] = self._search(_float32(queries[short]), k, selector, self.widest)
        scores[rows < 0] = -np.inf
        return rows, scores

    def _search(
        self, queries: npt.NDArray[np.float32], k: int, selector: faiss.IDSelector | None, breadth: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        index = self.index
        if self.kind == "ivf":
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=breadth)
        elif self.kind == "hnsw" and breadth < WALK_AT_MOST * len(self):
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=breadth)
        else:
            index = faiss.downcast_index(index.storage) if self.kind == "hnsw" else index
            if len(queries) == 1 and len(self) >= WORTH_SHARING:
                return _search_in_threads(index, queries, k, selector)
            parameters = faiss.SearchParameters(sel=selector)
        scores, rows = index.search(queries, k, params=parameters)
        return rows, scores

    def vectors(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The vectors at `rows` as they are stored, float32 of shape (n, d)."""
        if self.kind == "ivf":
            with _mapping:  # threads that search at once
                if self.index.direct_map.no():
                    self.index.make_direct_map()
        found: npt.NDArray[np.float32] = self.index.reconstruct_batch(np.ascontiguousarray(rows, dtype=np.int64))
        return found

    def save(self, path: Path) -> None:
        # Written by Python's own file, so that a full disk is an OSError and not a RuntimeError of faiss.
        with whole_file(path) as partial, partial.open("wb") as file:
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))

    @classmethod
    def load(cls, path: Path, mapped: bool = True) -> "DenseIndex":
        """Open an index with its vectors memory-mapped, or read into memory."""
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0))
        except RuntimeError as error:
            raise TandemError(f"The vector index {path} is missing or damaged; build the index again.") from error


def _search_in_threads(
    index: faiss.Index, query: npt.NDArray[np.float32], k: int, selector: faiss.IDSelector | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The exact search for one query, float32 (1, d), each thread in a part of the rows."""
    bounds = np.linspace(0, index.ntotal, threads.count() + 1).astype(int).tolist()

    def search(part: tuple[int, int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        own = faiss.IDSelectorRange(*part)
        both = own if selector is None else faiss.IDSelectorAnd(own, selector)
        scores, rows = index.search(query, k, params=faiss.SearchParameters(sel=both))
        return scores, rows

    found = threads.in_threads(search, list(pairwise(bounds)))
    scores, rows = (np.hstack(parts) for parts in zip(*found, strict=True))
    # A part with too few rows is filled up with row -1 and the lowest score there is.
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def in_half(
    vectors: npt.NDArray[np.floating], texts: Callable[[int, int], Sequence[str]] | None = None, first: int = 0
) -> npt.NDArray[np.float16]:
    """Vectors (N, d) of the passages from `first` on in half precision.

    One that is not finite there is a `TandemError` that names its passage, by what `texts(start, stop)` gives.
    """
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    if (row := not_finite(half)) is not None:
        row += first
        passage = f"row {row}" if texts is None else quoted(texts(row, row + 1)[0])
        raise TandemError(
            f"The vector of the passage {passage} is not finite in half precision (above 65,504, or no number at "
            "all); train the retriever again, or use another."
        )
    return half


def _float32(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(vectors, dtype=np.float32)
