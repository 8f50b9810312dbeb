"""A dataset's passages as one retriever sees them: encoded once, found in the cache ever after."""

import contextlib
import hashlib

from tandemqa.code import code_version
from tandemqa.data.dataset import Dataset
from tandemqa.data.tokens import passage_tokens, tokenizer_fingerprint
from tandemqa.encoders.backbone import device_of, has_bfloat16
from tandemqa.encoders.dual import DualEncoder
from tandemqa.errors import TandemError
from tandemqa.files import cache_folder
from tandemqa.index.dense import DenseIndex


def passage_index(retriever: DualEncoder, dataset: Dataset) -> DenseIndex:
    """The dense index of all passages of `dataset`, row i being passage row i.

    The cache is keyed by the retriever's weights, settings and code and by the content of the corpus, so that
    candidates, evaluation and index never encode the same passages twice.
    """
    config = retriever.config
    settings = (
        config.pooling,
        config.similarity,
        config.passage_length,
        tokenizer_fingerprint(retriever.tokenizer),
        has_bfloat16(device_of(retriever)),
        code_version("data/dataset.py", "data/tokens.py", "encoders", "index/dense.py", "index/vectors.py"),
    )
    key = hashlib.sha256(f"{retriever.fingerprint()} {settings} {dataset.passages.fingerprint}".encode()).hexdigest()[
        :16
    ]
    path = cache_folder() / "vectors" / f"{key}.faiss"
    if path.exists():
        with contextlib.suppress(TandemError):  # a damaged file of the cache is made again
            return DenseIndex.load(path)
    tokens = passage_tokens(dataset, retriever.tokenizer)
    index = DenseIndex.build(retriever.encode(tokens, "passage", show="encode passages"))
    index.save(path)
    return index
