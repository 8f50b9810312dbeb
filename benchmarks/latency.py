"""Question to answer: latency and throughput by the number of passages, candidates, threads and clients.

    python benchmarks/latency.py build medquad squad scifact --bundle BUNDLE --work DIR [--sizes 10000 100000 1000000]
    python benchmarks/latency.py measure --work DIR --out benchmarks/results

`build` makes an index a size, and goes on where it was interrupted. The passages are those of the datasets (folders
in BEIR layout), in an order drawn by chance; beyond them, half of the sentences of one with half of those of another,
shuffled. Texts, words and tokens are thus real throughout. Vectors are the retriever's for real passages; encoding a
million others would take hours, and how long a search takes does not depend on what vectors mean: theirs are weighted
means of the vectors of both parents, with noise, scaled to unit length. Up to 100,000 passages are searched exactly,
more by IVF.

`measure` asks questions of the datasets through `Searcher.search`, 5 hits each, in a process for each index and
number of threads, with all candidates re-ranked and with the dial of early stopping at 0.02 if the bundle has learnt
it; what has been measured stays in DIR/latency.jsonl. Clients are threads of one process that ask one question after
the other, with the dial. Writes latency.md and latency.png.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZES, DEPTHS, THREADS, CLIENTS = (10_000, 100_000, 1_000_000), (20, 50), (1, 2), (1, 4, 16)
EXACT_AT_MOST = 100_000
DIAL = 0.02
NOISE = 0.3
QUESTIONS, WARM = 200, 10
CALIBRATED_ON = 256  # passages


class Pool:
    """The passages of some datasets, in an order drawn by chance: title and sentences."""

    def __init__(self, folders: list[Path]) -> None:
        from tandemqa.index.passages import read_passages

        passages = [record.passage for folder in folders for _, record in read_passages(folder / "corpus.jsonl")]
        self.passages = [passages[number] for number in np.random.default_rng(0).permutation(len(passages))]

    def write(self, size: int, path: Path) -> None:
        """The first `size` passages, and mixed ones behind them where they are too few, as a corpus.jsonl."""
        from tandemqa.files import whole_file
        from tandemqa.search.sentences import sentences

        few = size > len(self.passages)
        cut = [[p.text[start:end] for start, end in sentences(p.text)] for p in self.passages] if few else []
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            for start, stop in blocks(size):
                random, parents, _ = self.parents(start, stop)
                for row, (first, second) in zip(range(start, stop), parents.tolist(), strict=True):
                    title, text = self.passages[row % len(self.passages)][1:]
                    if row >= len(self.passages):
                        title, mixed = self.passages[first].title, cut[first][::2] + cut[second][1::2]
                        text = " ".join(mixed[number] for number in random.permutation(len(mixed)))
                    file.write(json.dumps({"_id": f"p{row}", "title": title, "text": text or "-"}) + "\n")

    def vectors(self, real: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Vectors of the rows of a block, float16 of shape (n, d); `real` are those of the pool."""
        random, parents, weights = self.parents(start, stop)
        own = real[start:stop]
        first, second = (real[parents[len(own) :, side]].astype(np.float32) for side in (0, 1))
        mixed = weights[len(own) :] * first + (1 - weights[len(own) :]) * second
        mixed += NOISE / np.sqrt(real.shape[1]) * random.standard_normal(mixed.shape)
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        return np.concatenate([own, mixed.astype(np.float16)])

    def parents(self, start: int, stop: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
        """Of the rows of a block: the two passages that each would be mixed of, and the weight of the first."""
        random = np.random.default_rng([1, start])
        parents = random.integers(len(self.passages), size=(stop - start, 2))
        return random, parents, random.uniform(0.3, 0.7, size=(stop - start, 1))


def blocks(size: int) -> Iterator[tuple[int, int]]:
    from tandemqa.index.segment import SHARD

    return ((start, min(start + SHARD, size)) for start in range(0, size, SHARD))


def build(options: argparse.Namespace) -> None:
    os.environ["TANDEMQA_CACHE"] = str(options.work / "cache")
    from tandemqa import Bundle, Index
    from tandemqa.files import fingerprint, write_json
    from tandemqa.index.vectors import VectorCache

    bundle, pool = Bundle.load(options.bundle), Pool(options.data)
    write_json(options.work / "questions.json", asked := questions(options.data))
    if options.precision == "int8" and not bundle.calibrated:
        bundle.calibrate(asked, [passage.full for passage in pool.passages[:CALIBRATED_ON]])
    bundle = bundle.at(options.precision)
    for size in options.sizes:
        place, corpus = options.work / f"index-{size}", options.work / str(size) / "corpus.jsonl"
        if (place / "index.json").exists():
            continue
        started = time.perf_counter()
        if not corpus.exists():
            pool.write(size, corpus)
        # Where the build looks for vectors before it encodes.
        cache = VectorCache(bundle.retriever, fingerprint(corpus))
        real = encoded(bundle.retriever, pool, min(size, len(pool.passages)))
        for start, stop in blocks(size):
            if cache.load(start, stop) is None:
                cache.save(start, pool.vectors(real, start, stop))
        kind = "exact" if size <= EXACT_AT_MOST else "ivf"
        Index.build(bundle, corpus.parent, place, vectors=kind, precision=options.precision).close()
        print(f"{size:,} passages in {time.perf_counter() - started:.0f} s, peak {peak():,.0f} MiB", flush=True)


def encoded(retriever: Any, pool: Pool, count: int) -> np.ndarray:
    """The vectors of the first `count` passages of the pool, float16 of shape (n, d)."""
    from tandemqa.index.vectors import VectorCache
    from tandemqa.progress import bar

    cache, found = VectorCache(retriever, f"the pool of {len(pool.passages)}"), []
    with bar("encode", count, "passage") as progress:
        for start, stop in blocks(len(pool.passages)):
            if start >= count:
                break
            vectors = cache.load(start, stop)
            if vectors is None:
                texts = [passage.full for passage in pool.passages[start:stop]]
                vectors = retriever.encode(retriever.tokenize(texts), "passage", show=progress).astype(np.float16)
                cache.save(start, vectors)
            progress.update(stop - progress.n)
            found.append(vectors)
    return np.concatenate(found)[:count]


def questions(folders: list[Path]) -> list[str]:
    from tandemqa.data.dataset import read_queries

    texts = [text for folder in folders for text in read_queries(folder / "queries.jsonl").values()]
    return [texts[number] for number in np.random.default_rng(0).permutation(len(texts))[: QUESTIONS + WARM]]


def peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(index: Path, bundle: Path, count: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Latencies over one index with the threads of this process, and throughput with all of them."""
    import torch

    from tandemqa.search.searcher import Searcher

    texts = json.loads((index.parent / "questions.json").read_text())
    searcher = Searcher(index, bundle)
    tokens = [len(searcher.index.tokens[int(row)]) for row in searcher.index.rows[:1000]]
    about = {
        "passages": len(searcher.index),
        "vectors": searcher.index.segments[0].vectors.kind,
        "precision": searcher.index.precision,
        "threads": torch.get_num_threads(),
        "tokens": float(np.mean(tokens)),
    }
    dials = (0.0, DIAL) if searcher.learnt.stopping else (0.0,)
    for depth, dial in itertools.product(DEPTHS, dials):
        spent, stages = [], []
        for number, text in enumerate(texts[: WARM + count]):
            started = time.perf_counter()
            answer = searcher.search(text, 5, depth, "dense", dial)
            if number >= WARM:
                spent.append(time.perf_counter() - started)
                stages.append(list(answer.seconds.values()))
        yield about | {
            "depth": depth,
            "dial": dial,
            "p50": 1000 * float(np.percentile(spent, 50)),
            "p99": 1000 * float(np.percentile(spent, 99)),
            "stages": dict(zip(answer.seconds, (1000 * np.median(stages, axis=0)).tolist(), strict=True)),
        }
    for clients in CLIENTS if torch.get_num_threads() == max(THREADS) else ():
        yield about | {
            "depth": DEPTHS[0],
            "clients": clients,
            "qps": throughput(searcher, texts, clients, dials[-1], seconds),
        }


def throughput(searcher: Any, texts: list[str], clients: int, dial: float, seconds: float) -> float:
    """Questions answered in a second by so many threads that ask one after the other."""
    from concurrent.futures import ThreadPoolExecutor

    end = time.perf_counter() + seconds

    def ask(client: int) -> int:
        asked = 0
        while time.perf_counter() < end:
            searcher.search(texts[(client + asked * clients) % len(texts)], 5, DEPTHS[0], "dense", dial)
            asked += 1
        return asked

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answered = sum(pool.map(ask, range(clients)))
    return answered / (time.perf_counter() - started)


def measure(options: argparse.Namespace) -> None:
    kept = options.work / "latency.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for index in sorted(options.work.glob("index-*"), key=lambda path: int(path.name.partition("-")[2])):
        for threads in THREADS:
            size = int(index.name.partition("-")[2])
            if any(row["passages"] == size and row["threads"] == threads for row in rows):
                continue
            command = [sys.executable, __file__, "one", str(index), "--questions", str(options.questions)]
            command += ["--seconds", str(options.seconds), *(["--bundle", options.bundle] if options.bundle else [])]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            rows += (found := [json.loads(line) for line in output.splitlines()])
            with kept.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    text = table(rows, options.questions)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "latency.md").write_text(text)
    plot(rows, options.out / "latency.png")


def table(rows: list[dict[str, Any]], count: int) -> str:
    latency, load = ([row for row in rows if ("qps" in row) == wanted] for wanted in (False, True))
    lines = [
        "# Question to answer",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores; {count} questions one after the other, 5 hits each, in ms.",
        f"{latency[0]['tokens']:.0f} tokens a passage in the mean; precision {latency[0]['precision']}.",
        "",
        "| passages | index | threads | depth | dial | p50 | p99 | retrieve | re-rank | read | highlight |",
        "|---" * 11 + "|",
    ]
    for row in latency:
        stages = " | ".join(f"{value:.1f}" for value in row["stages"].values())
        lines.append(
            f"| {row['passages']:,} | {row['vectors']} | {row['threads']} | {row['depth']} | {row['dial']} "
            f"| {row['p50']:.1f} | {row['p99']:.1f} | {stages} |"
        )
    lines += ["", f"Answers a second, depth {DEPTHS[0]}, by clients (threads of one process):", ""]
    lines += ["| passages | " + " | ".join(map(str, CLIENTS)) + " |", "|---" * (len(CLIENTS) + 1) + "|"]
    for size in sorted({row["passages"] for row in load}):
        values = {row["clients"]: row["qps"] for row in load if row["passages"] == size}
        lines.append(f"| {size:,} | " + " | ".join(f"{values[clients]:.1f}" for clients in CLIENTS) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for depth, colour in zip(DEPTHS, ("#0072b2", "#d55e00"), strict=True):
        for threads, style in zip(THREADS, ("--", "-"), strict=True):
            for dial, marker in ((0.0, "o"), (DIAL, "^")):
                asked = {"depth": depth, "threads": threads, "dial": dial}
                own = [row for row in rows if asked.items() <= row.items()]
                label = f"depth {depth}, {threads} thread{'s' * (threads > 1)}{', dial' * (dial > 0)}"
                sizes, values = [row["passages"] for row in own], [row["p50"] for row in own]
                axes[0].plot(sizes, values, style, marker=marker, color=colour, label=label)
    axes[0].set_xscale("log")
    axes[0].set_ylim(bottom=0)
    axes[0].set_xlabel("passages")
    axes[0].set_ylabel("p50 of one question, ms")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=4, fontsize=8)
    for size in sorted({row["passages"] for row in rows}):
        own = [row for row in rows if "qps" in row and row["passages"] == size]
        axes[1].plot([r["clients"] for r in own], [r["qps"] for r in own], marker="o", label=f"{size:,} passages")
    axes[1].set_ylim(bottom=0)
    axes[1].set_xlabel("clients")
    axes[1].set_ylabel(f"answers a second, depth {DEPTHS[0]}")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    builds = commands.add_parser("build")
    builds.add_argument("data", type=Path, nargs="+", help="folders in BEIR layout")
    builds.add_argument("--bundle", required=True)
    builds.add_argument("--work", type=Path, required=True)
    builds.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    builds.add_argument("--precision", choices=("auto", "int8"), default="auto")
    builds.set_defaults(run=build)
    measures = commands.add_parser("measure")
    measures.add_argument("--work", type=Path, required=True)
    measures.add_argument("--out", type=Path, required=True)
    measures.set_defaults(run=measure)
    ones = commands.add_parser("one")
    ones.add_argument("index", type=Path)
    ones.set_defaults(run=lambda o: [print(json.dumps(r)) for r in one(o.index, o.bundle, o.questions, o.seconds)])
    for command in (measures, ones):
        command.add_argument("--bundle", help="where it is, if it has moved since")
        command.add_argument("--questions", type=int, default=QUESTIONS)
        command.add_argument("--seconds", type=float, default=20, help="of each measurement of throughput")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
