"""How often the highlighted sentence of the right passage holds the answer.

    python benchmarks/answers.py DATA [--bundle BUNDLE] [--dev 500] [--test 1000]

DATA is in BEIR layout with an answers.jsonl beside it: lines of _id and answers, each an exact string of the passage.
For each question one of its relevant passages is cut into sentences, and every method picks one. Prints the share of
questions whose pick holds an answer, with 95 % intervals: on dev, to choose by, and on test. Without a bundle, the
base retriever and no re-ranker. Sums are of scores centred by passage and scaled to one spread, with the weight that
is best on dev.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandemqa import load_dataset
from tandemqa.data.dataset import Dataset
from tandemqa.encoders.bundle import Bundle
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.evaluation.metrics import bootstrap_interval
from tandemqa.evaluation.significance import paired_interval
from tandemqa.index.lexical import LexicalIndex
from tandemqa.search.highlight import likely_sentences, sentence_scores
from tandemqa.search.sentences import sentences

WEIGHTS = (0.1, 0.3, 0.5, 1.0)
LATE, SEARCH, LEXICAL = "late interaction", "late interaction of the likely (search)", "BM25"
SUMS = {
    "retriever + re-ranker": ("retriever", "re-ranker"),
    "retriever + BM25": ("retriever", LEXICAL),
    "late interaction + re-ranker": (LATE, "re-ranker"),
    "late interaction + BM25": (LATE, LEXICAL),
}


class Sample:
    """Questions of a split, the sentences of a relevant passage of each, and the scores that methods give them."""

    def __init__(
        self, dataset: Dataset, answers: dict[str, list[str]], split: str, count: int, models: tuple
    ) -> None:
        qrels = {query: grades for query, grades in dataset.judged(split).items() if query in answers}
        drawn = np.random.default_rng(0).choice(len(qrels), size=min(count, len(qrels)), replace=False)
        query_ids = [list(qrels)[number] for number in np.sort(drawn)]
        passages = [dataset.passages[dataset.passages.row[next(iter(qrels[query]))]] for query in query_ids]
        spans = [(number, *span) for number, passage in enumerate(passages) for span in sentences(passage.text)]
        self.own = np.array([number for number, *_ in spans])
        texts = [passages[number].text[start:end] for number, start, end in spans]
        self.holds = np.array(
            [any(a in text for a in answers[query_ids[n]]) for n, text in zip(self.own, texts, strict=True)]
        )
        self.questions = [dataset.queries[query] for query in query_ids]
        titled = [f"{passages[number].title} {text}" for number, text in zip(self.own, texts, strict=True)]
        self.scores = self._scores(texts, titled, *models)

    def _scores(
        self, texts: list[str], titled: list[str], retriever: DualEncoder, reranker: CrossEncoder | None
    ) -> dict[str, NDArray[np.float64]]:
        own, scores = self.own, {"first sentence": -np.arange(len(texts), dtype=np.float64)}
        rows, values = LexicalIndex.build(texts).search(self.questions, len(texts))
        words = np.zeros((len(self.questions), len(texts)))
        query, place = np.nonzero(rows >= 0)
        words[query, rows[query, place]] = values[query, place]
        scores[LEXICAL] = words[own, np.arange(len(texts))]
        queries, read = retriever.tokenize(self.questions), retriever.tokenize(titled)
        vectors = retriever.encode(read, "passage", show="encode")
        query_vectors, query_tokens = retriever.encode_queries(queries)
        scores["retriever"] = np.einsum("nd,nd->n", vectors, query_vectors[own])
        scores[LATE] = sentence_scores(retriever, query_tokens, read, own)
        likely = likely_sentences(retriever, queries, read, own, range(len(self.questions)))
        scores[SEARCH] = np.where(likely, scores[LATE], -1.0)
        print(f"{sum(len(read[n]) for n in np.flatnonzero(likely)) / sum(map(len, read)):.2f} of the tokens are read")
        if reranker is not None:
            pairs = np.stack([own, np.arange(len(texts))], axis=1)
            tokens = reranker.tokenize(self.questions), reranker.tokenize(titled)
            scores["re-ranker"] = reranker.score(*tokens, pairs, show="re-rank")
        return {name: values.astype(np.float64) for name, values in scores.items()}

    def hits(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """1 for each question whose best sentence holds an answer, else 0."""
        order = np.lexsort((-scores, self.own))
        first = order[np.unique(self.own[order], return_index=True)[1]]
        hits = np.zeros(len(self.questions))
        hits[self.own[first]] = self.holds[first]
        return hits

    def added(self, first: str, second: str, weight: float) -> NDArray[np.float64]:
        """The scores of one method plus `weight` times those of another."""
        return self._standard(self.scores[first]) + weight * self._standard(self.scores[second])

    def _standard(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        means = np.bincount(self.own, weights=scores) / np.maximum(1, np.bincount(self.own))
        centred = scores - means[self.own]
        return centred / centred.std()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout with answers.jsonl")
    parser.add_argument("--bundle", help="the models; the base retriever alone if not given")
    parser.add_argument("--dev", type=int, default=500, help="questions to choose by")
    parser.add_argument("--test", type=int, default=1000, help="questions to report")
    options = parser.parse_args()

    dataset = load_dataset(options.data)
    lines = (Path(options.data) / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {record["_id"]: record["answers"] for record in map(json.loads, lines)}
    bundle = Bundle.load(options.bundle) if options.bundle else None
    models = (bundle.retriever, bundle.reranker) if bundle else (DualEncoder.load(RetrieverConfig()), None)
    dev = Sample(dataset, answers, "dev", options.dev, models)
    test = Sample(dataset, answers, "test", options.test, models)

    picks = {name: (dev.hits(values), test.hits(test.scores[name])) for name, values in dev.scores.items()}
    for name, (first, second) in SUMS.items():
        if first in dev.scores and second in dev.scores:
            best = max(WEIGHTS, key=lambda weight: dev.hits(dev.added(first, second, weight)).mean())
            picks[f"{name} · {best}"] = tuple(each.hits(each.added(first, second, best)) for each in (dev, test))
    print(f"{len(dev.own) / len(dev.questions):.1f} sentences a passage (dev)\n")
    print(f"| sentence picked by | dev ({len(dev.questions)}) | test ({len(test.questions)}) |\n|---|---|---|")
    for name, values in picks.items():
        print(f"| {name} | {' | '.join(_with_interval(value) for value in values)} |")
    for name in ("first sentence", LEXICAL, LATE):
        low, high = paired_interval(picks[name][1], picks[SEARCH][1], seed=0)
        difference = (picks[SEARCH][1] - picks[name][1]).mean()
        print(f"{SEARCH} against {name}, test: {difference:+.3f} ({low:+.3f} to {high:+.3f})")


def _with_interval(values: NDArray[np.float64]) -> str:
    low, high = bootstrap_interval(values, seed=0)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
