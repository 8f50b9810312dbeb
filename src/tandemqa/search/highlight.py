"""The answer inside a passage: its sentence that is nearest to the question, found with the retriever."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from tandemqa.data.dataset import Passage
from tandemqa.data.tokens import TokenIds
from tandemqa.encoders.dual import DualEncoder
from tandemqa.search.sentences import sentences

# Sentences looked at in one passage, so that a whole book as a passage does not take a minute.
MOST = 100
# Of these, so many are read at the most, and none whose words are less like the question's by more than this.
FEW, BEHIND = 4, 0.1
# Sentences whose token states are held at once, some hundred megabytes at the most.
BLOCK = 1024


def best_sentences(
    retriever: DualEncoder,
    queries: TokenIds,
    query_tokens: Sequence[NDArray[np.float32]],
    passages: Sequence[Passage],
    own: Sequence[int],
) -> list[tuple[int, int]]:
    """Where the sentence of each passage that answers its query best begins and ends in the text, in characters.

    queries: the retriever's token ids; query_tokens: what `DualEncoder.encode_queries` makes of them; own: the row of
    each passage's query. A sentence is read behind the title of its passage; of equal ones the first is taken. A
    passage without text has the span (0, 0).
    """
    spans = [_distinct(passage.text, islice(sentences(passage.text), MOST)) for passage in passages]
    texts = [
        f"{passage.title} {passage.text[start:end]}".strip()
        for passage, found in zip(passages, spans, strict=True)
        for start, end in found
    ]
    counts = [len(found) for found in spans]
    of = np.repeat(np.arange(len(passages)), counts)
    tokens = retriever.tokenize(texts)
    likely = likely_sentences(retriever, queries, tokens, of, own)
    scores = np.where(likely, np.float32(-1.0), np.float32(-np.inf))
    # A sentence that is the only likely one of its passage needs no reading.
    read = np.flatnonzero(likely & (np.bincount(of[likely], minlength=len(passages))[of] > 1))
    texts_read = [tokens[number] for number in read]
    scores[read] = sentence_scores(retriever, query_tokens, texts_read, np.array(own)[of[read]])
    ends = np.cumsum(counts)
    return [
        found[int(np.argmax(scores[end - len(found) : end]))] if found else (0, 0)
        for found, end in zip(spans, ends.tolist(), strict=True)
    ]


def _distinct(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first of those that read alike."""
    first: dict[str, tuple[int, int]] = {}
    for start, end in spans:
        first.setdefault(text[start:end], (start, end))
    return list(first.values())


def likely_sentences(
    retriever: DualEncoder, queries: TokenIds, texts: TokenIds, of: NDArray[np.int64], own: Sequence[int]
) -> NDArray[np.bool_]:
    """Which texts may be the best of their passage, bool (N,), by the embeddings of their tokens, which cost no more
    than looking them up.

    of: the passage of each text, rising; own: the row of each passage's query. The embeddings are compared as the
    token states are in `sentence_scores`. For a quarter to a half of the tokens, the pick is that of reading all
    texts in more than nine of ten passages that answer, and elsewhere one nearly as good:
    `benchmarks/results/answers.md`.
    """
    likely = np.zeros(len(texts), dtype=np.bool_)
    query_tokens = {row: retriever.look_up(queries[row]) for row in set(own)}
    for passage, row in enumerate(own):
        numbers = np.flatnonzero(of == passage)
        if len(numbers) < 2:
            likely[numbers] = True
            continue
        found = [texts[number] for number in numbers.tolist()]
        lengths = np.array([len(ids) for ids in found])
        tokens = retriever.look_up(np.concatenate(found))
        scores = np.full(len(numbers), -1.0)
        some, query = np.flatnonzero(lengths), query_tokens[row]
        if len(some) and len(query):
            starts = (np.cumsum(lengths) - lengths)[some]
            scores[some] = np.maximum.reduceat(_products(query, tokens), starts, axis=1).mean(axis=0)
        best = np.argsort(-scores, kind="stable")[:FEW]
        likely[numbers[best[scores[best] >= scores[best[0]] - BEHIND]]] = True
    return likely


def sentence_scores(
    retriever: DualEncoder, query_tokens: Sequence[NDArray[np.float32]], texts: TokenIds, own: NDArray[np.int64]
) -> NDArray[np.float32]:
    """How well each text answers its query, float32 (N,): the mean over the query's tokens of the cosine to the token
    of the text that is most like it.

    query_tokens: what `DualEncoder.encode_queries` makes of the queries; own: the row of each text's query.

    The late interaction of ColBERT (Khattab and Zaharia, SIGIR 2020), on the token states that the retriever pools.
    A sentence is so short that this finds the answer more often than the similarity of the two vectors, the
    re-ranker's score, or words weighted by their rarity: `benchmarks/results/answers.md`.
    """
    scores = np.full(len(texts), -1.0, dtype=np.float32)
    for start in range(0, len(texts), BLOCK):
        block = [texts[number] for number in range(start, min(start + BLOCK, len(texts)))]
        for number, tokens in enumerate(retriever.encode_tokens(block, "passage"), start):
            query = query_tokens[int(own[number])]
            if len(query) and len(tokens):
                scores[number] = _products(query, tokens).max(axis=1).mean()
    return scores


def _products(query: NDArray[np.float32], tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inner products of two sets of vectors, by torch: a thread of numpy's library goes on spinning for 25 ms
    after a product, on a core that the encoder needs."""
    products: NDArray[np.float32] = (torch.from_numpy(query) @ torch.from_numpy(tokens).T).numpy()
    return products
