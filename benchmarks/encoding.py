"""Encoding passages: this project against sentence-transformers' default `encode`, in one process, alternating.

    python benchmarks/encoding.py DATA [--passages 2000] [--rounds 3]

Same weights, same passages, same length limit, vectors compared. Prints passages per second of each round, the ratio
of the medians, and the smallest cosine between the two vectors of a passage.
"""

import argparse
import statistics
import time

import numpy as np
from sentence_transformers import SentenceTransformer

from tandemqa import load_dataset
from tandemqa.encoders.backbone import BASE_MODEL, resolve_model
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--passages", type=int, default=2000, help="passages taken from the corpus at random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=128, help="tokens a passage is cut at, for both")
    options = parser.parse_args()

    dataset = load_dataset(options.data)
    count = min(options.passages, len(dataset.passages))
    rows = np.sort(np.random.default_rng(0).choice(len(dataset.passages), size=count, replace=False))
    texts = [dataset.passages[int(row)].full for row in rows]
    ours = DualEncoder.load(RetrieverConfig(passage_length=options.length))
    theirs = SentenceTransformer(resolve_model(BASE_MODEL))
    theirs.max_seq_length = options.length

    # Both start from texts: tokenising is part of what is timed.
    ways = {
        "tandemqa": lambda: ours.encode(ours.tokenize(texts), "passage"),
        "sentence-transformers": lambda: theirs.encode(texts),
    }
    vectors, rates = {}, {name: [] for name in ways}
    ours.encode(ours.tokenize(texts[:64]), "passage")
    theirs.encode(texts[:64])
    for round_number in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            vectors[name] = way()
            rates[name].append(count / (time.perf_counter() - start))
            print(f"round {round_number + 1}: {name:24} {rates[name][-1]:8.1f} passages/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    cosines = np.sum(_unit(vectors["tandemqa"]) * _unit(vectors["sentence-transformers"]), axis=1)
    print(f"ratio of medians {medians['tandemqa'] / medians['sentence-transformers']:.2f}")
    print(f"cosine between the two: mean {cosines.mean():.6f}, smallest {cosines.min():.6f}")


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
