"""Encoding and re-ranking: this project against sentence-transformers' defaults, in one process, alternating.

    python benchmarks/encoding.py DATA [--bundle BUNDLE] [--passages 2000] [--questions 20] [--rounds 3]

Same weights, same texts, same length limits, tokenising timed too. Encoding: passages of the corpus. Re-ranking: the
50 passages that the retriever finds among these for each question. Without a bundle, the base model is both, with an
untrained head. Prints each round's rate, the medians' ratios to sentence-transformers, and how near the results are
to its float32: the cosine of vectors; the mean over questions of the rank correlation of scores, and how often the
first passage is the same.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentence_transformers
from scipy.stats import spearmanr

from tandemqa import Bundle, load_dataset
from tandemqa.encoders.bundle import save_bundle
from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig

THEIRS = "sentence-transformers"
CANDIDATES = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--bundle", help="a trained pair")
    parser.add_argument("--passages", type=int, default=2000, help="passages taken from the corpus at random")
    parser.add_argument("--questions", type=int, default=20, help="questions taken at random")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    dataset = load_dataset(options.data)
    generator = np.random.default_rng(0)
    rows, calibrated_on = np.split(generator.permutation(len(dataset.passages)), [options.passages])
    passages = [dataset.passages[int(row)].full for row in np.sort(rows)]
    others = [dataset.passages[int(row)].full for row in calibrated_on[:500]]
    queries = list(dataset.queries.values())
    numbers, unasked = np.split(generator.permutation(len(queries)), [options.questions])
    questions = [queries[number] for number in numbers]
    with tempfile.TemporaryDirectory() as folder:
        bundle = copy_of(options.bundle, Path(folder) / "bundle")
        # On texts that are not measured: `tandemqa index` calibrates on some of those that it encodes.
        bundle.calibrate([queries[number] for number in unasked[:500]], others)
        vectors = compare("passages", len(passages), encoders(bundle, passages), options.rounds)
        exact = vectors.pop(THEIRS)
        for name, found in vectors.items():
            cosines = np.sum(unit(found) * unit(exact), axis=1)
            print(f"{name:24} cosine to float32: mean {cosines.mean():.5f}, smallest {cosines.min():.5f}")
        count = min(CANDIDATES, len(passages))
        asked = bundle.retriever.encode(bundle.retriever.tokenize(questions), "query", precision="fp32")
        candidates = np.argsort(-(asked @ exact.T), axis=1)[:, :count]
        pairs = np.stack([np.repeat(np.arange(len(questions)), count), candidates.reshape(-1)], axis=1)
        scores = compare("pairs", len(pairs), scorers(bundle, questions, passages, pairs), options.rounds)
        exact = scores.pop(THEIRS).reshape(-1, count)
        for name, found in scores.items():
            found = found.reshape(-1, count)
            order = np.mean([spearmanr(*both).statistic for both in zip(found, exact, strict=True)])
            same = np.mean(found.argmax(1) == exact.argmax(1))
            print(f"{name:24} rank correlation to float32 {order:.5f}, same first passage {same:.1%}")


Ways = dict[str, Callable[[], np.ndarray]]


def encoders(bundle: Bundle, passages: list[str]) -> Ways:
    """Vectors of the passages, by each way."""
    ours, fast = bundle.retriever, Bundle.load(bundle.folder).at("int8").retriever  # packed apart
    theirs = sentence_transformers.SentenceTransformer(str(bundle.folder / "retriever"))
    return {
        THEIRS: lambda: theirs.encode(passages),
        "tandemqa": lambda: ours.encode(ours.tokenize(passages), "passage"),
        "tandemqa int8": lambda: fast.encode(fast.tokenize(passages), "passage"),
    }


def scorers(bundle: Bundle, questions: list[str], passages: list[str], pairs: np.ndarray) -> Ways:
    """Scores of the (question, passage) pairs, by each way."""
    ours, fast = bundle.reranker, Bundle.load(bundle.folder).at("int8").reranker  # packed apart
    theirs = sentence_transformers.CrossEncoder(str(bundle.folder / "reranker"))
    texts = [(questions[question], passages[passage]) for question, passage in pairs]
    return {
        THEIRS: lambda: theirs.predict(texts),
        "tandemqa": lambda: ours.score(ours.tokenize(questions), ours.tokenize(passages), pairs),
        "tandemqa int8": lambda: fast.score(fast.tokenize(questions), fast.tokenize(passages), pairs),
    }


def compare(what: str, count: int, ways: Ways, rounds: int) -> dict[str, np.ndarray]:
    """Time each way in turn, once to warm up and `rounds` times; print the rates, return the results."""
    results, rates = {}, {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            if round_number:
                rates[name].append(count / (time.perf_counter() - start))
                print(f"round {round_number}: {name:24} {rates[name][-1]:8.1f} {what}/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name:24} median {median:8.1f} {what}/s, {median / medians[THEIRS]:.2f} times {THEIRS}")
    return results


def copy_of(source: str | None, folder: Path) -> Bundle:
    """The bundle at `source`, or one of base models, written to `folder`, so that calibrating leaves no trace."""
    if source is None:
        pair = DualEncoder.load(RetrieverConfig()), CrossEncoder.load(RerankerConfig())
    else:
        trained = Bundle.load(source)
        pair = trained.retriever, trained.reranker
    save_bundle(folder, *pair, {})

    return Bundle.load(folder)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
