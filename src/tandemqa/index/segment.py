"""A segment: a folder with the vectors, words and tokens of some passages, never changed once it is whole.

segment.json     what it is: passages, structure of the vectors, recall, sizes of the files
rows.npy         int32, rising: position i in the segment is this row of the index
vectors.faiss    see `dense.py`
bm25/            see `lexical.py`: one index for every `PART` passages
tokens/          what the re-ranker reads: a token store
"""

import fcntl
import os
import shutil
import weakref
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tandemqa.data.tokens import TokenStore
from tandemqa.errors import TandemError
from tandemqa.files import read_json, remove_partial, save_array, whole_folder, write_json
from tandemqa.index.dense import DenseIndex, Kind, Storage, in_half
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.recall import tune
from tandemqa.index.shards import Shards
from tandemqa.progress import bar

SEGMENT, ROWS, VECTORS, WORDS, TOKENS, SHARDS = (
    "segment.json",
    "rows.npy",
    "vectors.faiss",
    "bm25",
    "tokens",
    "shards",
)
# Passages that are encoded between two commits: what an interrupted build loses at most.
SHARD = 8192
# Passages of one BM25 index: building it takes about half a gigabyte.
PART = 131_072
# From so many passages on, arrays are memory-mapped. Each map takes a file handle, of which a process has few.
MAPPED = 10_000
# Above so many vectors "auto" is approximate.
EXACT_AT_MOST = 1_000_000

# What recall is measured against: what rounding to bytes had lost before, it does not tell.
EXACT, ENCODED, ROUNDED = "exact search over", "vectors as encoded", "copies rounded to bytes"

KindChoice = Literal["auto", "exact", "ivf", "hnsw"]
StorageChoice = Literal["auto", "fp16", "int8"]

Encoded = tuple[npt.NDArray[np.floating], Sequence[npt.NDArray[np.int32]]]
"""Passages as vectors (n, d) and as the re-ranker's token ids."""


class Segment:
    """A segment that is open: as long as anything refers to it, no writer's sweep removes it."""

    def __init__(self, folder: Path) -> None:
        """Open a segment; a file that is missing, cut short or damaged is a `TandemError` that names it."""
        self.folder = folder
        weakref.finalize(self, _shared_lock(folder).close)
        self.about = read_json(folder / SEGMENT)
        _check_files(folder, self.about)
        self._mapped = self.about["passages"] >= MAPPED
        self.vectors = DenseIndex.load(folder / VECTORS, self._mapped)
        self.tokens = TokenStore(folder / TOKENS, self._mapped)
        try:
            self.rows: npt.NDArray[np.int32] = np.load(
                folder / ROWS, mmap_mode="r" if self._mapped else None, allow_pickle=False
            )
        except ValueError as error:
            raise TandemError(f"{folder / ROWS} is damaged ({error}); build the index again.") from error
        if {len(self.vectors), len(self.tokens), len(self.rows)} != {self.about["passages"]}:
            raise TandemError(f"The segment {folder} is damaged: its files disagree; build the index again.")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rounded(self) -> bool:
        """Whether its vectors are rounded to bytes, or have been before."""
        return bool(self.about["vectors"]["storage"] == "int8" or self.about["recall"].get(EXACT) == ROUNDED)

    @cached_property
    def words(self) -> list[LexicalIndex]:
        """BM25 of the passages in the order of their positions, `PART` in each."""
        try:
            folders = sorted((self.folder / WORDS).iterdir())
        except FileNotFoundError as error:
            raise TandemError(f"The segment {self.folder} is gone; open the index again.") from error
        return [LexicalIndex.load(folder, self._mapped) for folder in folders]


class Source(Protocol):
    """What a segment is made of (see `source.py`); passages are asked for from the place `start` to before `stop`."""

    @property
    def rounded(self) -> bool:
        """Whether the vectors are copies that were rounded to bytes, and no longer as the retriever gave them."""

    def texts(self, start: int, stop: int, /) -> list[str]:
        """What the models read of each."""

    def encode(self, start: int, stop: int, progress: "tqdm[Any]", /) -> Encoded:
        """The vector and the re-ranker's tokens of each; `progress` is moved on by work of more than a moment."""


def write_segment(
    folder: Path,
    rows: npt.NDArray[np.int32],
    source: Source,
    vectors: KindChoice,
    storage: StorageChoice,
    questions: npt.NDArray[np.float32] | None = None,
) -> None:
    """Write the segment of the passages at `rows` into `folder`; it is whole when `segment.json` is there.

    Each part of it is whole or not there, so that the same call goes on where a killed one stopped. `questions`,
    float32 (Q, d), are what recall is measured with; without them passages are.
    """
    shards = folder / SHARDS
    if not (folder / SEGMENT).exists():
        for place in (folder, shards, folder / WORDS):
            place.mkdir(parents=True, exist_ok=True)
            remove_partial(place)
        count = len(rows)
        _encode(shards, count, source)
        _index_words(folder / WORDS, count, source)
        blocks = sorted(shards.iterdir())
        if not (folder / TOKENS).exists():
            ids, lengths = (Shards([block / f"{name}.npy" for block in blocks]) for name in ("ids", "lengths"))
            # The lengths are copied, because the store holds those of all shards until it is written.
            TokenStore.of_blocks(folder / TOKENS, zip(ids, map(np.array, lengths), strict=True))
        encoded = Shards([block / "vectors.npy" for block in blocks])
        index = DenseIndex.of_blocks(encoded, *_resolved(vectors, storage, count))
        recall = tune(index, encoded, questions)
        index.save(folder / VECTORS)
        save_array(folder / ROWS, rows)
        files = sorted(f for f in folder.rglob("*") if f.is_file() and shards not in f.parents)
        about = {
            "passages": count,
            "vectors": _structure(index, _resolved(vectors, storage, count)[1]),
            "recall": {**recall.as_json(), EXACT: ROUNDED if source.rounded else ENCODED},
            "files": {file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
        }
        write_json(folder / SEGMENT, about)
    shutil.rmtree(shards, ignore_errors=True)


def sweep(segments: Path, keep: Collection[str]) -> None:
    """Remove from a folder of segments what is not to be kept, except those that a reader has open."""
    remove_partial(segments)
    for segment in segments.iterdir():
        if segment.is_dir() and segment.name not in keep:
            _remove_unless_open(segment)


def _remove_unless_open(folder: Path) -> None:
    try:
        with (folder / SEGMENT).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except FileNotFoundError:
        shutil.rmtree(folder)
    except BlockingIOError:
        pass


def link(segments: Path, into: Path) -> None:
    """Give all segments of a folder a second place, where those who have them open find what they have yet to read.

    They share files and so locks; on a disk without hard links nothing is there.
    """
    for segment in segments.glob("*"):
        shutil.rmtree(into / segment.name, ignore_errors=True)
        with suppress(OSError):
            shutil.copytree(segment, into / segment.name, copy_function=os.link)


def _encode(shards: Path, count: int, source: Source) -> None:
    with bar("encode passages", count, "passage") as progress:
        for start in range(0, count, SHARD):
            stop = min(start + SHARD, count)
            shard = shards / f"{start:09}"
            if not shard.exists():
                vectors, tokens = source.encode(start, stop, progress)
                half = in_half(vectors, source.texts, start)
                with whole_folder(shard) as partial:
                    save_array(partial / "vectors.npy", half)
                    save_array(partial / "ids.npy", np.concatenate([*tokens, np.empty(0, dtype=np.int32)]))
                    save_array(partial / "lengths.npy", np.fromiter(map(len, tokens), np.int64, len(tokens)))
            progress.update(stop - progress.n)


def _index_words(folder: Path, count: int, source: Source) -> None:
    with bar("BM25", count, "passage") as progress:
        for start in range(0, count, PART):
            stop = min(start + PART, count)
            part = folder / f"{start:09}"
            if not part.exists():
                LexicalIndex.build(source.texts(start, stop)).save(part)
            progress.update(stop - start)


def _resolved(vectors: KindChoice, storage: StorageChoice, count: int) -> tuple[Kind, Storage]:
    kind: Kind = ("exact" if count <= EXACT_AT_MOST else "ivf") if vectors == "auto" else vectors
    return kind, ("fp16" if kind == "exact" else "int8") if storage == "auto" else storage


def _structure(index: DenseIndex, storage: Storage) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": index.kind, "storage": storage, "size": int(index.index.d)}
    if index.kind == "ivf":
        about |= {"lists": index.widest, "lists searched": index.breadth}
    if index.kind == "hnsw":
        about["candidates searched"] = index.breadth
    return about


def _check_files(folder: Path, about: dict[str, Any]) -> None:
    if not isinstance(about, dict) or not {"passages", "vectors", "recall", "files"} <= about.keys():
        raise TandemError(f"{folder / SEGMENT} does not describe a segment; build the index again.")
    for name, size in about["files"].items():
        file = folder / name
        if not file.exists():
            raise TandemError(f"The segment {folder} is incomplete: {name} is missing; build the index again.")
        if file.stat().st_size != size:
            raise TandemError(
                f"The segment {folder} is damaged: {name} has {file.stat().st_size} bytes instead of {size}; "
                "build the index again."
            )


def _shared_lock(folder: Path) -> BinaryIO:
    try:
        file = (folder / SEGMENT).open("rb")
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError) as error:  # gone, or about to go
        raise TandemError(f"The index lacks its segment {folder}; build the index again.") from error
    return file
