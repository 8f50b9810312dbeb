"""What an index costs: seconds and memory of a build by size, and of search, conditions, additions and compaction.

    python benchmarks/index.py [--sizes 50000 200000] [--kinds exact ivf] [--dimension 384]

Passages are random words in Zipf's proportions, 50 on average; vectors are random around 1,000 centres and cost
nothing to make, so that what is measured is everything but the encoder. Each build runs in a process of its own.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from kill_index import write_bundle

from tandemqa.encoders.bundle import Bundle
from tandemqa.index.index import Index
from tandemqa.index.update import add_passages, compact, delete_passages

QUERIES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--kinds", nargs="+", default=["exact", "ivf"])
    parser.add_argument("--dimension", type=int, default=384)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["TANDEMQA_CACHE"] = str(work / "cache")
        bundle = with_random_vectors(write_bundle(work), options.dimension)
        for size in options.sizes:
            write_corpus(work / str(size), size)
            for kind in options.kinds:
                for step in (build, ask, change):
                    run(step, bundle, work / str(size), work / f"{kind}-{size}", kind)


def run(step: Any, *arguments: Any) -> None:
    child = multiprocessing.get_context("fork").Process(target=step, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)


def build(bundle: Bundle, data: Path, out: Path, kind: Any) -> None:
    before = peak()
    started = time.perf_counter()
    index = Index.build(bundle, data, out, kind)
    seconds = time.perf_counter() - started
    about = index.segments[0].about
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    vectors = (out / "segments").glob("*/vectors.faiss")
    print(
        f"\n{len(index):,} passages, {about['vectors']}\n  build {seconds:.1f} s, peak {peak():,.0f} MB "
        f"({before:,.0f} before it), on disk {size:,.0f} MB of which vectors "
        f"{sum(file.stat().st_size for file in vectors) / 1e6:,.0f}; {about['recall']}",
        flush=True,
    )


def ask(bundle: Bundle, data: Path, out: Path, kind: Any) -> None:
    index, opened = timed(lambda: Index.open(out))
    queries = bundle.retriever.encode(range(QUERIES), "query")
    words = ["w3 w70 w911", "w12 w5000"]
    index.search_words(words[:1], 50)
    index.search_vectors(queries, 50)
    figures = {
        "vectors": timed(lambda: [index.search_vectors(query[None], 50) for query in queries])[1] / QUERIES,
        "words": timed(lambda: index.search_words(words, 50))[1] / 2,
        "condition, first": timed(lambda: index.search_vectors(queries[:1], 50, ["year>=2010"]))[1],
        "condition, again": timed(lambda: index.search_vectors(queries[:1], 50, ["year>=2010"]))[1],
    }
    told = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in figures.items())
    print(f"  open {opened * 1000:.0f} ms; {told}", flush=True)


def change(bundle: Bundle, data: Path, out: Path, kind: Any) -> None:
    records = [{"_id": f"n{number}", "text": f"w{number} w7", "year": 2020} for number in range(1000)]
    added = timed(lambda: add_passages(out, records, bundle))[1]
    one = timed(lambda: add_passages(out, records[:1], bundle))[1]
    deleted = timed(lambda: delete_passages(out, [f"p{number}" for number in range(1000)]))[1]
    before = peak()
    compacted = timed(lambda: compact(out))[1]
    print(
        f"  add 1,000 in {added:.2f} s, 1 in {one:.2f} s, delete 1,000 in {deleted:.2f} s, "
        f"compact in {compacted:.1f} s, peak {peak():,.0f} MB ({before:,.0f} before it)",
        flush=True,
    )


def with_random_vectors(bundle: Bundle, dimension: int) -> Bundle:
    calls = itertools.count(1)
    centres = np.random.default_rng(0).normal(size=(1000, dimension)).astype(np.float32)

    def encode(texts: Any, side: str, **_: Any) -> Any:
        random = np.random.default_rng(next(calls) + 10**6 * (side == "query"))
        vectors = random.standard_normal((len(texts), dimension), dtype=np.float32)
        vectors += centres[random.integers(1000, size=len(texts))]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    bundle.retriever.encode = encode  # type: ignore[method-assign, assignment]
    bundle.retriever.size = dimension
    return bundle


def write_corpus(folder: Path, count: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for number in range(count):
            words = np.minimum(random.zipf(1.3, size=random.integers(20, 80)), 200_000)
            text = " ".join(f"w{word}" for word in words)
            record = {"_id": f"p{number}", "title": f"number {number}", "text": text, "year": 1990 + number % 35}
            file.write(json.dumps(record) + "\n")


def timed(work: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def peak() -> float:
    """The most memory this process has held, in megabytes; memory-mapped files count while they are in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
