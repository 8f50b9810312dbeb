"""A dataset's passages as one retriever sees them: encoded once, found in the cache ever after."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tandemqa.code import code_version
from tandemqa.data.dataset import Dataset
from tandemqa.data.tokens import passage_tokens, tokenizer_fingerprint
from tandemqa.encoders.backbone import device_of, has_bfloat16
from tandemqa.encoders.dual import DualEncoder
from tandemqa.encoders.quantised import most_in_weights, ranges_fingerprint
from tandemqa.files import cache_folder, save_array
from tandemqa.index.dense import DenseIndex, in_half
from tandemqa.index.segment import SHARD
from tandemqa.index.shards import Shards
from tandemqa.progress import bar


class VectorCache:
    """Vectors of a corpus, float16, in files of `SHARD` passages; interrupted encoding loses one file at most.

    The cache is keyed by the retriever's weights, settings and code and by the content of the corpus, so that
    candidates, evaluation and index never encode the same passages twice.
    """

    def __init__(self, retriever: DualEncoder, corpus_fingerprint: str) -> None:
        config = retriever.config
        settings = (
            config.pooling,
            config.similarity,
            config.passage_length,
            tokenizer_fingerprint(retriever.tokenizer),
            has_bfloat16(device_of(retriever)),
            *_precision(retriever),
            code_version("data/dataset.py", "data/tokens.py", "encoders", "index/vectors.py"),
        )
        text = f"{retriever.fingerprint()} {settings} {corpus_fingerprint}"
        self.folder = cache_folder() / "vectors" / hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, start: int, stop: int) -> npt.NDArray[np.float16] | None:
        """The vectors of rows `start`, a multiple of `SHARD`, to `stop`; None if no file is there that holds them."""
        try:
            vectors: npt.NDArray[np.float16] = np.load(self.path(start), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        return vectors if len(vectors) == stop - start else None

    def save(self, start: int, vectors: npt.NDArray[np.float16]) -> None:
        save_array(self.path(start), vectors)

    def path(self, start: int) -> Path:
        """The file of the vectors from row `start` on."""
        return self.folder / f"{start:09}.npy"


def _precision(retriever: DualEncoder) -> list[str]:
    """What tells the retriever's precision from others; nothing for the usual one."""
    if retriever.precision == "int8":
        return [f"int8 up to {most_in_weights()}", ranges_fingerprint(retriever.ranges["passage"])]
    return [] if retriever.precision == "auto" else [retriever.precision]


def passage_index(retriever: DualEncoder, dataset: Dataset) -> DenseIndex:
    """The exact index of all passages of `dataset`, row i being passage row i."""
    cached = VectorCache(retriever, dataset.passages.fingerprint)
    count = len(dataset.passages)
    starts = range(0, count, SHARD)
    missing = [start for start in starts if cached.load(start, min(start + SHARD, count)) is None]
    if missing:
        tokens = passage_tokens(dataset, retriever.tokenizer)
        with bar("encode passages", count, "passage") as progress:
            for start in starts:
                stop = min(start + SHARD, count)
                if start in missing:
                    vectors = retriever.encode([tokens[row] for row in range(start, stop)], "passage", show=progress)
                    cached.save(start, in_half(vectors, lambda row, _: [dataset.passages[row].full], start))
                progress.update(stop - progress.n)
    return DenseIndex.of_blocks(Shards([cached.path(start) for start in starts]))
