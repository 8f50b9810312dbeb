"""The index: one folder with all that search needs of the passages, as it is at one moment.

index.json        which models and corpus it was built from, and how vectors are kept
passages.sqlite   the passages, and which segments the index consists of: its transactions are the commits
segments/         see `segment.py`
write.lock        held by the one writer
"""

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tandemqa.data.dataset import Dataset
from tandemqa.encoders.backbone import Precision
from tandemqa.encoders.bundle import Bundle, check_bundle
from tandemqa.encoders.calibration import load_ranges
from tandemqa.errors import TandemError
from tandemqa.files import put_back, read_json, stamp
from tandemqa.index.lexical import search_parts
from tandemqa.index.passages import PassageStore
from tandemqa.index.segment import KindChoice, Segment, StorageChoice

MANIFEST, PASSAGES, SEGMENTS = "index.json", "passages.sqlite", "segments"
FORMAT = 2
# A writer may remove a segment between the moment a reader learns of it and the moment it opens it, or replace all.
ATTEMPTS = 5
# Conditions whose rows are remembered, a byte a row.
MASKS = 8

Mask = npt.NDArray[np.bool_] | None
"""Which passages of a segment may be found, bool of shape (n,); None for all of them."""

Ranking = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Rows int32 (Q, k), best first, -1 from where there are no more; scores float32 (Q, k), -inf there."""


@dataclass(frozen=True)
class Index:
    """Passages as vectors, words, texts and the re-ranker's token ids, each under the same row in all of them.

    It shows one generation, whatever a writer does meanwhile, until it is closed or nothing refers to it any more. A
    passage keeps its row until it is replaced or deleted; rows are not without gaps. `about` is the content of
    `index.json`: format, data and bundle fingerprints, where the bundle lies (relative to the index), versions, how
    vectors are kept, the models' precision.
    """

    folder: Path
    passages: PassageStore
    segments: list[Segment]
    about: dict[str, Any]
    _masks: dict[tuple[str, ...], list[Mask]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(map(len, self.segments)) - self.passages.deleted

    @classmethod
    def build(
        cls,
        bundle: Bundle | str | Path,
        dataset: Dataset | str | Path,
        out: str | Path,
        vectors: KindChoice | None = None,
        storage: StorageChoice = "auto",
        precision: Precision | None = None,
    ) -> "Index":
        """Index the passages of `dataset` for `bundle` into the folder `out`; see `build.build`."""
        from tandemqa.index.build import build

        build(bundle, dataset, Path(out), vectors, storage, precision)
        return cls.open(out)

    @classmethod
    def open(cls, folder: str | Path, earlier: "Index | None" = None) -> "Index":
        """Open an index; a file that is missing, truncated or damaged is a `TandemError` that names it.

        Segments that an `earlier` index has open are shared with it, which makes this a matter of a quarter of a
        millisecond; each of the two may be closed without the other.
        """
        folder = Path(folder).absolute()  # it is opened again from wherever the process may have gone
        known = {} if earlier is None else {segment.folder.name: segment for segment in earlier.segments}
        counted = None if earlier is None else earlier.passages
        for attempt in range(ATTEMPTS):
            found, passages = stamp(folder / MANIFEST), None
            about = read_manifest(folder)
            try:
                passages = PassageStore(folder / PASSAGES, counted)
                segments = [
                    known[name] if name in known else Segment(folder / SEGMENTS / name) for name in passages.segments
                ]
            except TandemError:
                built_again = stamp(folder / MANIFEST) != found
                changed = passages is not None and PassageStore(folder / PASSAGES).state != passages.state
                if attempt == ATTEMPTS - 1 or not (built_again or changed):
                    raise
                continue
            if stamp(folder / MANIFEST) != found:  # what was read is of two builds
                continue
            masks = earlier._masks if earlier is not None and earlier.passages.state == passages.state else {}
            index = cls(folder, passages, segments, about, masks)
            if sum(map(len, segments)) > passages.next_row:
                raise TandemError(f"The index {folder} is damaged: its files disagree; build it again.")
            return index
        raise TandemError(f"The index {folder} changes faster than it can be opened; open it again.")

    def refreshed(self) -> "Index":
        """The index as it is now: this object if nothing has changed since it was opened, else a new one."""
        now = PassageStore(self.folder / PASSAGES, self.passages)
        now.close()
        return self if now.state == self.passages.state else Index.open(self.folder, self)

    def close(self) -> None:
        """Let go of the generation, so that a writer may remove what has been replaced since."""
        self.passages.close()
        self.segments.clear()

    @property
    def rows(self) -> npt.NDArray[np.int32]:
        """The rows of all passages, rising, int32 of shape (n,)."""
        live = self.passages.live()
        kept = [segment.rows[live[segment.rows]] for segment in self.segments]
        return np.concatenate([np.empty(0, dtype=np.int32), *kept])

    # Search

    @cached_property
    def tokens(self) -> "SegmentTokens":
        """What the re-ranker reads: `tokens[row]` are int32 token ids without special tokens."""
        return SegmentTokens(self.segments)

    def search_vectors(self, queries: npt.NDArray[np.float32], k: int, where: Sequence[str] = ()) -> Ranking:
        """The k passages whose vectors have the largest inner products with each query vector, float32 (Q, d).

        Only passages that fulfil every condition in `where` ("year>=2001", "lang=en"; see `metadata.py`) are found.
        """
        rows = np.full((len(queries), k), -1, dtype=np.int32)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for segment, allowed in zip(self.segments, self._allowed(where), strict=True):
            places, found = segment.vectors.search(queries, k, allowed)
            own = np.where(places >= 0, segment.rows[places], np.int32(-1))
            all_rows, all_scores = np.hstack([rows, own]), np.hstack([scores, found])
            order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
            rows, scores = np.take_along_axis(all_rows, order, axis=1), np.take_along_axis(all_scores, order, axis=1)
        return rows, scores

    def vectors_of(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The vectors of the passages at `rows` as they are stored, float32 of shape (n, d)."""
        found = np.empty((len(rows), self.segments[0].vectors.index.d), dtype=np.float32)
        for segment in self.segments:
            own = np.flatnonzero((rows >= segment.rows[0]) & (rows <= segment.rows[-1]))
            if len(own):
                found[own] = segment.vectors.vectors(np.searchsorted(segment.rows, rows[own]))
        return found

    def search_words(self, questions: Sequence[str], k: int, where: Sequence[str] = ()) -> Ranking:
        """BM25's k best passages for each question, of those that fulfil every condition in `where`.

        A passage that shares no word with the question is not found. Until the index is compacted, deleted passages
        count in the frequencies of words.
        """
        parts = [part for segment in self.segments for part in segment.words]
        if not parts:
            return np.full((len(questions), k), -1, np.int32), np.full((len(questions), k), -np.inf, np.float32)
        masks: list[Mask] = []
        for segment, allowed in zip(self.segments, self._allowed(where), strict=True):
            ends = np.cumsum([part.size for part in segment.words])
            masks += [None] * len(ends) if allowed is None else np.split(allowed, ends[:-1])
        places, scores = search_parts(parts, questions, k, masks)
        return np.where(places >= 0, self._rows[places], np.int32(-1)), scores

    @cached_property
    def _rows(self) -> npt.NDArray[np.int32]:
        """The rows of all positions in the segments, deleted ones too."""
        return np.concatenate([segment.rows for segment in self.segments])

    def _allowed(self, where: Sequence[str]) -> list[Mask]:
        """Which passages of each segment may be found."""
        if not where and not self.passages.deleted:
            return [None] * len(self.segments)
        conditions = tuple(where)
        masks = self._masks.get(conditions)
        if masks is None:
            allowed = self.passages.live() & self.passages.fulfilling(conditions)
            masks = [allowed[segment.rows] for segment in self.segments]
            if len(self._masks) >= MASKS:
                self._masks.clear()  # no other thread looks up twice what it needs
            self._masks[conditions] = masks
        return masks

    # Change

    def add(
        self, passages: str | Path | Iterable[Mapping[str, Any]], bundle: Bundle | str | Path | None = None
    ) -> "Index":
        """Add passages, each in the place of the one with its `_id` if there is one: the index as it is then.

        `passages` is a file in the layout of `corpus.jsonl` or such objects; see `update.add_passages`. This object
        goes on showing its own generation, as it does with `delete` and `compact`.
        """
        from tandemqa.index.update import add_passages

        source = Path(passages) if isinstance(passages, str | Path) else passages
        add_passages(self.folder, source, bundle)
        return Index.open(self.folder)

    def delete(self, ids: str | Iterable[str]) -> "Index":
        """Delete the passages with these ids, or this id; some may not be there: the index as it is then."""
        from tandemqa.index.update import delete_passages

        delete_passages(self.folder, ids)
        return Index.open(self.folder)

    def compact(self) -> "Index":
        """Make one segment of all, without what was deleted: the index as it is then."""
        from tandemqa.index.update import compact

        compact(self.folder)
        return Index.open(self.folder)

    # The models

    def load_bundle(self, bundle: Bundle | str | Path | None = None) -> Bundle:
        """The models of this index, in its precision: `bundle` if given, else the one it was built with, where it was
        then.

        A bundle that is not there, or whose weights are others, is a `TandemError`.
        """
        if isinstance(bundle, Bundle):
            self._check_model(bundle.folder, bundle.about)
            return self._in_its_precision(bundle)
        built_with = self.folder.resolve() / self.about["bundle"]["path"]
        if bundle is None and not built_with.exists():
            raise TandemError(
                f"The index {self.folder} needs the bundle that it was built with, which is no longer at "
                f"{os.path.normpath(built_with)}; give its new place with --bundle."
            )
        folder, about = check_bundle(os.path.normpath(built_with) if bundle is None else bundle)
        self._check_model(folder, about)
        return self._in_its_precision(Bundle.load(folder))

    def _in_its_precision(self, bundle: Bundle) -> Bundle:
        anew = f"build it again: tandemqa index {bundle.folder} DATA --out {self.folder}"
        if self.precision == "int8" and not bundle.calibrated:
            load_ranges(bundle.folder, bundle.retriever, bundle.reranker)  # they may have come after it was loaded
            if not bundle.calibrated:
                raise TandemError(
                    f"The index {self.folder} was built with int8.safetensors of {bundle.folder}, which is gone; "
                    f"{anew} --precision int8"
                )
        try:
            bundle = bundle.at(self.precision)
        except TandemError as error:
            raise TandemError(f"The index {self.folder} was built with int8. {error} Or {anew}") from error
        if bundle.calibration != self.about.get("calibration"):
            raise TandemError(
                f"The index {self.folder} was built before int8.safetensors of {bundle.folder} was made anew; "
                f"{anew} --precision int8"
            )
        return bundle

    @property
    def precision(self) -> Precision:
        """What the models compute in whose vectors these are."""
        precision: Precision = self.about.get("precision", "auto")
        return precision

    def _check_model(self, folder: Path, about: dict[str, Any]) -> None:
        built_with = self.about["bundle"]["fingerprint"]
        if about.get("fingerprint") != built_with:
            raise TandemError(
                f"The index {self.folder} was built by another model ({built_with}) than the bundle {folder} "
                f"({about.get('fingerprint')}); rebuild it with: tandemqa index {folder} DATA --out {self.folder}"
            )


class SegmentTokens:
    """The token ids of the passages of all segments, by row."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        # Segments are made one after the other and joined all at once, so that their rows never interleave.
        self._segments = segments
        self._first = [int(segment.rows[0]) for segment in segments]

    def __len__(self) -> int:
        """One more than the last row."""
        return int(self._segments[-1].rows[-1]) + 1 if self._segments else 0

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        number = bisect_right(self._first, row) - 1
        if number >= 0:
            segment = self._segments[number]
            place = int(np.searchsorted(segment.rows, row))
            if place < len(segment) and segment.rows[place] == row:
                return segment.tokens[place]
        raise IndexError(f"row {row} is no passage of the index")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `index.json`; a folder that is no index of this format is a `TandemError`."""
    put_back(folder)
    if not folder.exists():
        raise TandemError(f"{folder} does not exist; name the folder that `tandemqa index --out` wrote.")
    if not (folder / MANIFEST).exists():
        raise TandemError(f"{folder} is not an index: it holds no {MANIFEST}; name one that `tandemqa index` wrote.")
    about = read_json(folder / MANIFEST)
    if not isinstance(about, dict) or not {"format", "bundle"} <= about.keys():
        raise TandemError(f"{folder / MANIFEST} does not describe an index; build the index again.")
    if about["format"] != FORMAT:
        raise TandemError(
            f"The index {folder} has format {about['format']}, this version of tandemqa reads {FORMAT}; "
            "build the index again."
        )
    return about


def describe_index(folder: Path) -> dict[str, Any]:
    """What an index holds, ready for JSON, once every file of it has been found whole."""
    index = Index.open(folder)
    files = {path.name: path.stat().st_size for path in (folder / MANIFEST, folder / PASSAGES)}
    segments = {}
    for segment in index.segments:
        about = dict(segment.about)
        place = segment.folder.relative_to(index.folder).as_posix()
        files |= {f"{place}/{name}": size for name, size in about.pop("files").items()}
        segments[segment.folder.name] = about
    described = {
        **index.about,
        "generation": index.passages.generation,
        "passages": len(index),
        "deleted until compacted": index.passages.deleted,
        "fields": ", ".join(index.passages.fields) or "none",
        "segments": segments,
        "files": files,
    }
    index.close()
    return described
