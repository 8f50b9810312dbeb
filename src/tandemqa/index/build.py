"""Building an index from a corpus, so that a build that was killed goes on where it stopped."""

import contextlib
import datetime
import hashlib
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

import tandemqa
from tandemqa.code import code_version
from tandemqa.data.dataset import Dataset, check_layout, read_queries
from tandemqa.data.lines import opened, read_records
from tandemqa.encoders.backbone import Precision
from tandemqa.encoders.bundle import MANIFEST as MODELS
from tandemqa.encoders.bundle import Bundle
from tandemqa.encoders.calibration import load_ranges
from tandemqa.encoders.dual import DualEncoder
from tandemqa.encoders.quantised import has_int8
from tandemqa.errors import TandemError
from tandemqa.files import (
    explained,
    fingerprint,
    put_back,
    put_in_place,
    read_json,
    remove_partial,
    whole_file,
    write_json,
)
from tandemqa.index.index import FORMAT, MANIFEST, PASSAGES, SEGMENTS
from tandemqa.index.lock import LOCK, only_calibrating, only_writer
from tandemqa.index.passages import PassageStore, Record, record_of, store_passages
from tandemqa.index.recall import QUERIES
from tandemqa.index.segment import EXACT_AT_MOST, KindChoice, StorageChoice, link, sweep, write_segment
from tandemqa.index.source import Texts
from tandemqa.index.vectors import VectorCache
from tandemqa.progress import bar

# What a build depends on, in the folder where it is under way.
UNDER_WAY = "build.json"
# Of indexes of format 1, which may be replaced too.
OLD_NAMES = {"vectors.faiss", "bm25", "tokens"}
# Passages from the beginning of a corpus that int8 is calibrated on some of.
FIRST = 10_000


def build(
    bundle: Bundle | str | Path,
    dataset: Dataset | str | Path,
    out: Path,
    vectors: KindChoice | None = None,
    storage: StorageChoice = "auto",
    precision: Precision | None = None,
) -> None:
    """Index the passages of `dataset` for `bundle` into the folder `out`.

    vectors: "exact", "ivf" or "hnsw", or "auto": exact up to a million passages, then IVF. storage: "fp16" or "int8",
    or "auto": half precision for exact search, bytes for the others. precision: what the models compute in, here and
    in all later use of the index; for "int8", a bundle that is not calibrated yet is so on texts of `dataset`. Where
    vectors or precision is None, it is what `tune` chose for the bundle, else "auto".

    The corpus is read as it streams; in memory is one shard, and at the end the vectors. Until the index is complete
    it grows in a hidden folder beside `out` (`.NAME.partial`), where the same call goes on if it was interrupted; an
    index at `out` is replaced then, at once, and those who have it open keep it. A folder with anything else in it is
    a `TandemError`.
    """
    for what, value, kinds in (
        ("vectors", vectors, KindChoice),
        ("storage", storage, StorageChoice),
        ("precision", precision, Precision),
    ):
        if value is not None and value not in get_args(kinds):
            raise TandemError(f"{what} is {value!r}; choose one of {', '.join(get_args(kinds))}.")
    place = _free_place(out)
    folder = dataset.folder if isinstance(dataset, Dataset) else Path(dataset)
    corpus = folder / "corpus.jsonl"
    check_layout(folder)
    with opened(corpus):
        pass
    if not isinstance(bundle, Bundle):
        bundle = Bundle.load(bundle)
    tuned = _tuned(bundle)
    vectors, precision = vectors or tuned[0], precision or tuned[1]
    if precision == "int8" and not bundle.calibrated:
        _calibrate(bundle, folder)
    bundle = bundle.at(precision)
    questions = _questions(bundle.retriever, _asked(folder))
    partial = place.with_name(f".{place.name}.partial")
    with explained(out), contextlib.ExitStack() as stack:
        if (place / MANIFEST).exists():
            stack.enter_context(only_writer(place, out))
            (place / UNDER_WAY).unlink(missing_ok=True)  # of a build that was killed when it was done
        partial.mkdir(parents=True, exist_ok=True)
        stack.enter_context(only_writer(partial, out))
        stack.callback(_remove_if_nothing_done, partial)
        about = _about(place, bundle, corpus, vectors, storage, precision)
        segment = _prepared(partial, about)
        if not (partial / PASSAGES).exists():
            with whole_file(partial / PASSAGES) as file:
                store_passages(file, _records(corpus), corpus, [segment])
        store = stack.enter_context(contextlib.closing(PassageStore(partial / PASSAGES)))
        rows = np.arange(store.next_row, dtype=np.int32)
        cached = VectorCache(bundle.retriever, about["data"]["fingerprint"])
        source = Texts(bundle, lambda start, stop: store.texts(range(start, stop)), cached)
        write_segment(partial / SEGMENTS / segment, rows, source, vectors, storage, questions)
        store.close()
        for path in partial.iterdir():
            if path.name not in (PASSAGES, SEGMENTS, LOCK, UNDER_WAY):
                path.unlink()
        write_json(partial / MANIFEST, about)
        link(place / SEGMENTS, partial / SEGMENTS)
        put_in_place(partial, place)
        (place / UNDER_WAY).unlink()
        sweep(place / SEGMENTS, [segment])


def _tuned(bundle: Bundle) -> tuple[KindChoice, Precision]:
    """The structure and precision that `tune` chose for the bundle, "auto" where it chose none."""
    tuned = bundle.about.get("tuned") or {}
    vectors, precision = tuned.get("vectors", "auto"), tuned.get("precision", "auto")
    if vectors not in get_args(KindChoice) or precision not in get_args(Precision):
        raise TandemError(f"{bundle.folder / MODELS}: what `tune` chose is not valid; tune it again.")
    if vectors == "exact" and tuned.get("passages", 0) <= EXACT_AT_MOST:
        vectors = "auto"  # the same for so many passages; of more, tune has seen nothing
    if precision == "int8" and not has_int8():
        precision = "auto"  # it was tuned on another machine
    return vectors, precision


def _about(
    place: Path, bundle: Bundle, corpus: Path, vectors: KindChoice, storage: StorageChoice, precision: Precision
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": {"fingerprint": fingerprint(corpus)},
        "bundle": {"path": _path_from(place, bundle.folder), "fingerprint": bundle.fingerprint},
        "calibration": bundle.calibration,
        "vectors": vectors,
        "storage": storage,
        "precision": precision,
        "versions": {
            "tandemqa": tandemqa.__version__,
            "faiss": version("faiss-cpu"),
            "bm25s": version("bm25s"),
        },
    }


def _prepared(partial: Path, about: dict[str, Any]) -> str:
    """The name of the segment to write; what is there of a build of something else is removed."""
    depends_on = [
        about[key] for key in ("format", "data", "vectors", "storage", "precision", "calibration", "versions")
    ]
    depends_on += [about["bundle"]["fingerprint"], code_version("data", "encoders", "index")]
    key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    if (partial / UNDER_WAY).exists():
        known = read_json(partial / UNDER_WAY)
        if known["key"] == key:
            remove_partial(partial)
            return str(known["segment"])
    for path in partial.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    segment = secrets.token_hex(8)
    write_json(partial / UNDER_WAY, {"key": key, "segment": segment})
    return segment


def _remove_if_nothing_done(partial: Path) -> None:
    """Leave no folder behind after a mistake that shows before anything has been encoded."""
    if not any(partial.glob(f"{SEGMENTS}/*/*/*")):
        shutil.rmtree(partial, ignore_errors=True)


def _records(corpus: Path) -> Iterator[tuple[int, Record]]:
    size = corpus.stat().st_size
    with bar("read passages", size, "byte") as progress:
        for number, offset, record in read_records(corpus):
            yield number, record_of(corpus, number, record)
            progress.update(offset - progress.n)
        progress.update(size - progress.n)


def _calibrate(bundle: Bundle, folder: Path) -> None:
    """Measure the ranges of a bundle, unless another build has just done so: an index is bound to those it was built
    with, so that two that are begun at once must have the same."""
    with explained(bundle.folder), only_calibrating(bundle.folder):
        load_ranges(bundle.folder, bundle.retriever, bundle.reranker)
        if not bundle.calibrated:
            bundle.calibrate(*_texts(folder))


def _texts(folder: Path) -> tuple[list[str], list[str]]:
    """Questions, if there are any, and passages to calibrate on."""
    corpus = folder / "corpus.jsonl"
    records = itertools.islice(read_records(corpus), FIRST)
    return _asked(folder), [record_of(corpus, number, record).passage.full for number, _, record in records]


def _asked(folder: Path) -> list[str]:
    """The dataset's questions; a corpus alone has none."""
    path = folder / "queries.jsonl"
    return list(read_queries(path).values()) if path.exists() and path.stat().st_size else []


def _questions(retriever: DualEncoder, texts: list[str]) -> npt.NDArray[np.float32] | None:
    """Vectors of some of the questions; None if there are none."""
    if not texts:
        return None
    chosen = np.random.default_rng(0).permutation(len(texts))[:QUERIES]
    return retriever.encode(retriever.tokenize([texts[number] for number in chosen.tolist()]), "query")


def _free_place(out: Path) -> Path:
    """`out` without symbolic links, once it is sure that nothing but an index would be replaced."""
    place = out.resolve()
    put_back(place)
    if place.is_mount():
        raise TandemError(f"{out} is where a disk is mounted, and is replaced as a whole; name a folder inside it.")
    own = {MANIFEST, PASSAGES, f"{PASSAGES}-wal", f"{PASSAGES}-shm", SEGMENTS, LOCK, UNDER_WAY, *OLD_NAMES}
    if place.exists():
        names = {path.name for path in place.iterdir()} if place.is_dir() else None
        if names is None or (names and not {MANIFEST} <= names <= own):
            raise TandemError(f"{out} exists and is not an index; choose another place for --out.")
    return place


def _path_from(folder: Path, target: Path) -> str:
    """The path of `target` seen from `folder`, so that both can move together; absolute between two drives."""
    try:
        return os.path.relpath(target.resolve(), folder)
    except ValueError:
        return str(target.resolve())
