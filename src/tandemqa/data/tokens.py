"""The token store: texts as token ids, computed once, memory-mapped ever after."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tandemqa.code import code_version
from tandemqa.data.dataset import Dataset
from tandemqa.errors import TandemError
from tandemqa.files import cache_folder, read_json, save_array, whole_folder, write_json
from tandemqa.progress import bar

BATCH = 4096
# No encoder here reads further, so that one store serves every choice of lengths.
MAX_TOKENS = 512

TokenBlock = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""Some texts: the token ids of all, one text after the other, and the length of each."""


class TokenIds(Protocol):
    """Texts as token ids, int32 arrays without special tokens: a token store, or a list of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> npt.NDArray[np.int32]: ...


class TokenStore:
    """Token ids of texts, without special tokens, each cut at a maximum length.

    On disk: `ids.bin` (int32, all texts one after the other), `offsets.npy` (int64, one more than texts) and
    `tokens.json`. Both arrays are memory-mapped, so that opening a store of any size costs nothing, unless it is not
    to be `mapped`: each map takes a file handle.
    """

    def __init__(self, folder: Path, mapped: bool = True) -> None:
        self.folder = folder
        about = read_json(folder / "tokens.json")
        try:
            mode: Literal["r"] | None = "r" if mapped else None
            self.offsets: npt.NDArray[np.int64] = np.load(folder / "offsets.npy", mmap_mode=mode, allow_pickle=False)
            size = (folder / "ids.bin").stat().st_size
            whole = size == int(self.offsets[-1]) * 4 and len(self.offsets) == about["count"] + 1
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise TandemError(f"The token store {folder} is damaged; remove the folder, it is built again.")
        self.ids: npt.NDArray[np.int32] = (
            np.memmap(folder / "ids.bin", dtype=np.int32, mode="r")
            if mapped and size
            else np.fromfile(folder / "ids.bin", dtype=np.int32)
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    @classmethod
    def build(cls, folder: Path, texts: Iterable[str], count: int, tokenizer: Any) -> "TokenStore":
        """Tokenise `count` texts into `folder`, whole or not at all."""
        with bar("tokenise", count, "text") as progress:
            return cls.of_blocks(folder, _followed(token_blocks(texts, tokenizer), progress))

    @classmethod
    def of_blocks(cls, folder: Path, blocks: Iterable[TokenBlock]) -> "TokenStore":
        """Write texts that are token ids already into `folder`, whole or not at all."""
        all_lengths = [np.zeros(1, dtype=np.int64)]
        with whole_folder(folder) as partial:
            with (partial / "ids.bin").open("wb") as file:
                for ids, lengths in blocks:
                    file.write(np.asarray(ids, dtype=np.int32).tobytes())
                    all_lengths.append(lengths)
            offsets = np.cumsum(np.concatenate(all_lengths), dtype=np.int64)
            save_array(partial / "offsets.npy", offsets)
            write_json(partial / "tokens.json", {"count": len(offsets) - 1, "max_tokens": MAX_TOKENS})
        return cls(folder)


def token_blocks(texts: Iterable[str], tokenizer: Any) -> Iterator[TokenBlock]:
    """Tokenise texts, some at a time."""
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        encoded = tokenizer(batch, add_special_tokens=False, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        ids = np.fromiter((i for ids in encoded for i in ids), dtype=np.int32)
        yield ids, np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))


def _followed(blocks: Iterator[TokenBlock], progress: "tqdm[Any]") -> Iterator[TokenBlock]:
    for block in blocks:
        yield block
        progress.update(len(block[1]))


def passage_tokens(dataset: Dataset, tokenizer: Any) -> TokenStore:
    """The token store of a dataset's passages: built on first use, found in the cache ever after.

    The cache is keyed by the content of the corpus, by what the tokeniser does and by the code of the store.
    """
    code = code_version("data/dataset.py", "data/tokens.py")
    key = f"{dataset.passages.fingerprint}-{tokenizer_fingerprint(tokenizer)}-{MAX_TOKENS}-{code}"
    folder = cache_folder() / "tokens" / key
    if not (folder / "tokens.json").exists():
        texts = (passage.full for passage in dataset.passages)
        return TokenStore.build(folder, texts, len(dataset.passages), tokenizer)
    return TokenStore(folder)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hexadecimal digits that identify what a fast tokeniser does, whatever folder it came from."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are the caller's last call, not a property of the tokeniser.
    settings["truncation"] = settings["padding"] = None
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
