"""Encoding and re-ranking: this project against sentence-transformers, alternating.

    python benchmarks/encoding.py DATA [--bundle BUNDLE] [--passages 2000] [--questions 20] [--rounds 3]
        [--theirs PYTHON]

Same weights, same texts, same length limits, as many threads, tokenising timed too; one computes at a time.
sentence-transformers runs at its defaults, in bfloat16 and, where PYTHON is an interpreter that has them (release 5
with transformers 4: `pip install "sentence-transformers[onnx,openvino]==5.*" nncf "datasets<5"`), in int8 on ONNX
Runtime and OpenVINO, each quantised by its own helper (see theirs.py). Encoding: passages of the corpus. Re-ranking:
the 50 passages that the retriever finds among these for each question. Without a bundle, the base model is both, with
an untrained head. The int8 products of all layers alone, of as many tokens, show what int8 could reach if nothing
else took time. Prints each round's rate, the medians' ratios to sentence-transformers, and how near the results are
to its float32: the cosine of vectors; the mean over questions of the rank correlation of scores, and how often the
first passage is the same.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentence_transformers
import torch
from scipy.stats import spearmanr

from tandemqa import Bundle, load_dataset
from tandemqa.encoders import threads
from tandemqa.encoders.backbone import for_inference
from tandemqa.encoders.bundle import save_bundle
from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import TOKEN_BUDGET, DualEncoder, RetrieverConfig

THEIRS = "sentence-transformers"
PRODUCTS = "tandemqa int8, products alone"
CANDIDATES = 50
WIDTH = 36


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder in BEIR layout")
    parser.add_argument("--bundle", help="a trained pair")
    parser.add_argument("--passages", type=int, default=2000, help="passages taken from the corpus at random")
    parser.add_argument("--questions", type=int, default=20, help="questions taken at random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--theirs", metavar="PYTHON", help="an interpreter with their ONNX or OpenVINO backend")
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
        known = [queries[number] for number in unasked[:500]]
        bundle.calibrate(known, others)
        theirs = Theirs(options.theirs, bundle, Path(folder), known, others) if options.theirs else None
        vectors = compare("passages", len(passages), encoders(bundle, theirs, passages), options.rounds)
        exact = vectors.pop(THEIRS)
        del vectors[PRODUCTS]
        for name, found in vectors.items():
            cosines = np.sum(unit(found) * unit(exact), axis=1)
            print(f"{name:{WIDTH}} cosine to float32: mean {cosines.mean():.5f}, smallest {cosines.min():.5f}")
        count = min(CANDIDATES, len(passages))
        asked = bundle.retriever.encode(bundle.retriever.tokenize(questions), "query", precision="fp32")
        candidates = np.argsort(-(asked @ exact.T), axis=1)[:, :count]
        pairs = np.stack([np.repeat(np.arange(len(questions)), count), candidates.reshape(-1)], axis=1)
        scores = compare("pairs", len(pairs), scorers(bundle, theirs, questions, passages, pairs), options.rounds)
        exact = scores.pop(THEIRS).reshape(-1, count)
        for name, found in scores.items():
            found = found.reshape(-1, count)
            order = np.mean([spearmanr(*both).statistic for both in zip(found, exact, strict=True)])
            same = np.mean(found.argmax(1) == exact.argmax(1))
            print(f"{name:{WIDTH}} rank correlation to float32 {order:.5f}, same first passage {same:.1%}")


# The results of a way, and the seconds that they took.
Ways = dict[str, Callable[[], tuple[np.ndarray, float]]]


class Theirs:
    """The int8 backends of sentence-transformers in another interpreter, both models of the bundle ready there."""

    def __init__(self, python: str, bundle: Bundle, folder: Path, questions: list[str], passages: list[str]) -> None:
        command = [python, str(Path(__file__).with_name("theirs.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.file = folder / "theirs.npy"
        pairs = [f"{question} {passage}" for question, passage in zip(questions, passages, strict=False)]
        ready = self._ask(
            bundle=str(bundle.folder),
            folder=str(folder),
            texts={"retriever": passages, "reranker": pairs},
            threads=torch.get_num_threads(),
        )
        self.backends = ready["backends"]

    def ways(self, model: str, texts: list) -> Ways:
        """Each backend's vectors of texts by the retriever, or scores of pairs by the re-ranker."""
        return {f"{THEIRS} {each} int8": lambda each=each: self._values(each, model, texts) for each in self.backends}

    def _values(self, backend: str, model: str, texts: list) -> tuple[np.ndarray, float]:
        done = self._ask(backend=backend, model=model, texts=texts, file=str(self.file))
        return np.load(self.file), done["seconds"]

    def _ask(self, **request: object) -> dict:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} ended with code {self.process.wait()}; its words are above.")
        return json.loads(line)


def encoders(bundle: Bundle, theirs: Theirs | None, passages: list[str]) -> Ways:
    """Vectors of the passages, by each way."""
    ours, fast = bundle.retriever, Bundle.load(bundle.folder).at("int8").retriever  # packed apart
    tokens = sum(len(fast.frame(ids, "passage")) for ids in fast.tokenize(passages))
    folder = str(bundle.folder / "retriever")
    plain = sentence_transformers.SentenceTransformer(folder)
    bfloat16 = sentence_transformers.SentenceTransformer(folder, model_kwargs={"dtype": torch.bfloat16})
    ways = {
        THEIRS: timed(lambda: plain.encode(passages)),
        f"{THEIRS} bfloat16": timed(lambda: bfloat16.encode(passages)),
        "tandemqa": timed(lambda: ours.encode(ours.tokenize(passages), "passage")),
        "tandemqa int8": timed(lambda: fast.encode(fast.tokenize(passages), "passage")),
        PRODUCTS: timed(lambda: multiply(fast, tokens)),
    }
    return ways | (theirs.ways("retriever", passages) if theirs else {})


def multiply(encoder: DualEncoder, tokens: int) -> np.ndarray:
    """The matrix products (GELU is part of one) that int8 makes of so many tokens, on bytes at random; there are no
    vectors."""
    layers = for_inference(encoder.tower("passage"), "int8", encoder.ranges["passage"]).layers
    width = encoder.passage_tower.config.hidden_size
    states = torch.randint(255, (TOKEN_BUDGET, width), dtype=torch.uint8)

    def products(count: int) -> None:
        rows = states[:count]
        for layer in layers:
            layer.read.linear(rows, layer.dtype)
            layer.gather.linear(rows, torch.float32)
            forward = layer.feedforward
            wide = forward.widen.linear.gelu(rows, forward.variant, forward.step, forward.zero)
            forward.narrow(wide, torch.float32)

    counts = [min(TOKEN_BUDGET, tokens - start) for start in range(0, tokens, TOKEN_BUDGET)]
    list(threads.without_gradient(products, counts, states.device))
    return np.empty((0, width), dtype=np.float32)


def scorers(
    bundle: Bundle, theirs: Theirs | None, questions: list[str], passages: list[str], pairs: np.ndarray
) -> Ways:
    """Scores of the (question, passage) pairs, by each way."""
    ours, fast = bundle.reranker, Bundle.load(bundle.folder).at("int8").reranker  # packed apart
    folder = str(bundle.folder / "reranker")
    plain = sentence_transformers.CrossEncoder(folder)
    bfloat16 = sentence_transformers.CrossEncoder(folder, model_kwargs={"dtype": torch.bfloat16})
    texts = [(questions[question], passages[passage]) for question, passage in pairs]
    ways = {
        THEIRS: timed(lambda: plain.predict(texts)),
        f"{THEIRS} bfloat16": timed(lambda: bfloat16.predict(texts)),
        "tandemqa": timed(lambda: ours.score(ours.tokenize(questions), ours.tokenize(passages), pairs)),
        "tandemqa int8": timed(lambda: fast.score(fast.tokenize(questions), fast.tokenize(passages), pairs)),
    }
    return ways | (theirs.ways("reranker", texts) if theirs else {})


def timed(way: Callable[[], np.ndarray]) -> Callable[[], tuple[np.ndarray, float]]:
    def run() -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        return way(), time.perf_counter() - start

    return run


def compare(what: str, count: int, ways: Ways, rounds: int) -> dict[str, np.ndarray]:
    """Time each way in turn, once to warm up and `rounds` times; print the rates, return the results."""
    results, rates = {}, {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            results[name], seconds = way()
            if round_number:
                rates[name].append(count / seconds)
                print(f"round {round_number}: {name:{WIDTH}} {rates[name][-1]:8.1f} {what}/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, median in medians.items():
        print(f"{name:{WIDTH}} median {median:8.1f} {what}/s, {median / medians[THEIRS]:.2f} times {THEIRS}")
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
