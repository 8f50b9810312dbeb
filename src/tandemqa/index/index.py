"""The index: one folder with all that search needs of the passages."""

import datetime
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tandemqa
from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.tokens import TokenStore, passage_tokens
from tandemqa.encoders.bundle import Bundle, check_bundle
from tandemqa.errors import TandemError
from tandemqa.files import read_json, whole_folder, write_json
from tandemqa.index.dense import DenseIndex
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.passages import PassageStore
from tandemqa.index.vectors import passage_index
from tandemqa.progress import track

MANIFEST = "index.json"
VECTORS, WORDS, PASSAGES, TOKENS = "vectors.faiss", "bm25", "passages.sqlite", "tokens"
FORMAT = 1


@dataclass(frozen=True)
class Index:
    """The passages of a dataset as vectors, words, texts and the re-ranker's token ids; row i is passage i in all.

    `about` is the content of `index.json`: format, passages, data and bundle fingerprints, where the bundle lies
    (relative to the index), versions, file sizes.
    """

    folder: Path
    vectors: DenseIndex
    passages: PassageStore
    tokens: TokenStore
    about: dict[str, Any]

    @cached_property
    def words(self) -> LexicalIndex:
        return LexicalIndex.load(self.folder / WORDS)

    def __len__(self) -> int:
        return len(self.passages)

    @classmethod
    def build(cls, bundle: Bundle | str | Path, dataset: Dataset | str | Path, out: str | Path) -> "Index":
        """Index the passages of `dataset` for `bundle` into the folder `out`, whole or not at all.

        An index that stands at `out` is replaced; a folder with anything else in it is a `TandemError`.
        """
        place = _free_place(Path(out))
        if not isinstance(dataset, Dataset):
            dataset = load_dataset(dataset)
        if not isinstance(bundle, Bundle):
            bundle = Bundle.load(bundle)
        passages = dataset.passages
        with whole_folder(place) as partial:
            passage_index(bundle.retriever, dataset).save(partial / VECTORS)
            LexicalIndex.build(passage.full for passage in passages).save(partial / WORDS)
            PassageStore.build(partial / PASSAGES, track(passages, "store", len(passages), "passage"))
            _adopt(passage_tokens(dataset, bundle.reranker.tokenizer).folder, partial / TOKENS)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            about = {
                "format": FORMAT,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "passages": len(passages),
                "data": {"fingerprint": dataset.fingerprint},
                "bundle": {"path": _path_from(place, bundle.folder), "fingerprint": bundle.fingerprint},
                "versions": {
                    "tandemqa": tandemqa.__version__,
                    "faiss": version("faiss-cpu"),
                    "bm25s": version("bm25s"),
                },
                "files": {path.relative_to(partial).as_posix(): path.stat().st_size for path in files},
            }
            write_json(partial / MANIFEST, about)
        return cls.open(out)

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Open an index; a file that is missing, truncated or damaged is a `TandemError` that names it."""
        folder = Path(folder)
        about = check_index(folder)
        index = cls(
            folder,
            DenseIndex.load(folder / VECTORS),
            PassageStore(folder / PASSAGES),
            TokenStore(folder / TOKENS),
            about,
        )
        if {len(index.vectors), len(index.passages), len(index.tokens)} != {about["passages"]}:
            raise TandemError(f"The index {folder} is damaged: its files disagree on the passages; build it again.")
        return index

    def load_bundle(self, bundle: Bundle | str | Path | None = None) -> Bundle:
        """The models of this index: `bundle` if given, else the one it was built with, where it was then.

        A bundle that is not there, or whose weights are others, is a `TandemError`.
        """
        if isinstance(bundle, Bundle):
            self._check_model(bundle.folder, bundle.about)
            return bundle
        built_with = self.folder.resolve() / self.about["bundle"]["path"]
        if bundle is None and not built_with.exists():
            raise TandemError(
                f"The index {self.folder} needs the bundle that it was built with, which is no longer at "
                f"{os.path.normpath(built_with)}; give its new place with --bundle."
            )
        folder, about = check_bundle(os.path.normpath(built_with) if bundle is None else bundle)
        self._check_model(folder, about)
        return Bundle.load(folder)

    def _check_model(self, folder: Path, about: dict[str, Any]) -> None:
        built_with = self.about["bundle"]["fingerprint"]
        if about.get("fingerprint") != built_with:
            raise TandemError(
                f"The index {self.folder} was built by another model ({built_with}) than the bundle {folder} "
                f"({about.get('fingerprint')}); rebuild it with: tandemqa index {folder} DATA --out {self.folder}"
            )


def check_index(folder: Path) -> dict[str, Any]:
    """The content of `index.json`, after a check that every file has the size that it had when it was written."""
    if not folder.exists():
        raise TandemError(f"{folder} does not exist; name the folder that `tandemqa index --out` wrote.")
    if not (folder / MANIFEST).exists():
        raise TandemError(f"{folder} is not an index: it holds no {MANIFEST}; name one that `tandemqa index` wrote.")
    about = read_json(folder / MANIFEST)
    if not isinstance(about, dict) or not {"format", "passages", "bundle", "files"} <= about.keys():
        raise TandemError(f"{folder / MANIFEST} does not describe an index; build the index again.")
    if about["format"] != FORMAT:
        raise TandemError(
            f"The index {folder} has format {about['format']}, this version of tandemqa reads {FORMAT}; "
            "build the index again."
        )
    for name, size in about["files"].items():
        file = folder / name
        if not file.exists():
            raise TandemError(f"The index {folder} is incomplete: {name} is missing; build it again.")
        if file.stat().st_size != size:
            found = file.stat().st_size
            raise TandemError(
                f"The index {folder} is damaged: {name} has {found} bytes instead of {size}; build it again."
            )
    return about


def _free_place(out: Path) -> Path:
    """`out` without symbolic links, once it is sure that nothing but an index would be replaced."""
    place = out.resolve()
    own = {MANIFEST, VECTORS, WORDS, PASSAGES, TOKENS}
    if place.exists() and not (place.is_dir() and {path.name for path in place.iterdir()} <= own):
        raise TandemError(f"{out} exists and is not an index; choose another place for --out.")
    return place


def _path_from(folder: Path, target: Path) -> str:
    """The path of `target` seen from `folder`, so that both can move together; absolute between two drives."""
    try:
        return os.path.relpath(target.resolve(), folder)
    except ValueError:
        return str(target.resolve())


def _adopt(store: Path, folder: Path) -> None:
    """Give the index a token store of its own that costs no space where the cache is on the same disk."""
    folder.mkdir()
    for file in store.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
