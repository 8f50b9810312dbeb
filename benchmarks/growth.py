"""How the joint step grows: time per list and peak memory against list size, passage length, batch and depth.

    python benchmarks/growth.py [--out benchmarks/results] [--seconds 20]

Each cell is a process of its own: all-MiniLM-L6-v2 (or its first three layers) as both models, random token ids,
the optimiser's step included, for about so many seconds after a first step that does not count. FLOPs are counted
from the shapes (2 for a multiplication and addition, three times the forward pass; second passes as they are made)
and held against plain products of the same shapes in the same precision, in the same process. Prints a markdown table
and writes growth.png, and growth.jsonl, a line for each cell with its commit: what stands there of this commit is not
measured again, unless the code has changes that are not committed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SIZES, LENGTHS, BATCHES, DEPTHS = (8, 32, 128), (64, 128, 256), (4, 16), (3, 6)
CHANGED = "-changed"
BASE = {"size": 8, "length": 128, "batch": 8, "depth": 6, "grad_keep": 1.0}


def cells() -> list[dict[str, float]]:
    """The base cell, and those that differ from it in one thing."""
    found = [BASE]
    for name, values in (("size", SIZES), ("length", LENGTHS), ("batch", BATCHES), ("depth", DEPTHS)):
        found += [BASE | {name: value} for value in values if value != BASE[name]]
    # Steps of two lists of 128 take as long as those of 32 lists of 8.
    return [cell | {"batch": 2} if cell["size"] == 128 else cell for cell in found]


def measure(cell: dict[str, float], seconds: float) -> dict[str, float]:
    import numpy as np

    from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
    from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
    from tandemqa.lists.build import TrainingLists
    from tandemqa.training.batch import Texts
    from tandemqa.training.config import TrainingConfig
    from tandemqa.training.joint import LossConfig
    from tandemqa.training.listwise import Listwise
    from tandemqa.training.optimizer import make_optimizer

    size, length, batch, depth = (int(cell[name]) for name in ("size", "length", "batch", "depth"))
    retriever = DualEncoder.load(RetrieverConfig(passage_length=length))
    reranker = CrossEncoder.load(RerankerConfig(pooling="mean", pair_length=length + 16))
    for encoder in (retriever.query_tower, reranker.encoder):
        encoder.encoder.layer = encoder.encoder.layer[:depth]
    generator = np.random.default_rng(0)
    passages = [generator.integers(1000, 30000, length).astype(np.int32) for _ in range(2000)]
    queries = [generator.integers(1000, 30000, 12).astype(np.int32) for _ in range(512)]
    lists = TrainingLists(
        np.arange(512, dtype=np.int32),
        np.stack([generator.permutation(2000)[:size] for _ in range(512)]).astype(np.int32),
    )
    texts = Texts(queries, passages)
    config = TrainingConfig()
    objective = Listwise(
        retriever, reranker, texts, texts, lists, LossConfig(), config.micro_tokens, grad_keep=cell["grad_keep"]
    )
    optimizer = make_optimizer(objective.model, config)
    objective.model.train()
    steps, started, read = -1, 0.0, 0
    while steps < 1 or time.perf_counter() - started < seconds:
        if steps == 0:
            started = time.perf_counter()
        rows = np.arange((steps + 1) * batch, (steps + 2) * batch) % 512
        optimizer.zero_grad(set_to_none=True)
        record = objective.backward(rows)
        optimizer.step()
        steps += 1
        if steps > 0:
            read += 3 * record["gradient_tokens"] + record["tokens_again"]
    spent = time.perf_counter() - started
    hidden, inner = 384, 1536
    per_token = 2 * depth * (4 * hidden * hidden + 2 * hidden * inner + 2 * length * hidden)
    return {
        "seconds_per_list": spent / (steps * batch),
        "tokens_per_second": record["padded_tokens"] * steps / spent,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gflops": per_token * read / spent / 1e9,
        "matmul_gflops": matmul_speed(hidden, inner),
    }


def matmul_speed(hidden: int, inner: int) -> float:
    """GFLOP/s of the products of one layer, forwards and backwards, on a part of 4,096 tokens, and nothing else."""
    import torch

    from tandemqa.encoders.backbone import has_bfloat16

    kind = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
    work = 0.0
    spent = 0.0
    for columns, rows, count in ((hidden, hidden, 4), (hidden, inner, 1), (inner, hidden, 1)):
        x, w, y = torch.randn(4096, columns), torch.randn(rows, columns), torch.randn(4096, rows)
        x, w, y = x.to(kind), w.to(kind), y.to(kind)
        for repeat in range(6):
            started = time.perf_counter()
            for _ in range(count):
                _ = x @ w.T, y @ w, y.T @ x
            if repeat:
                spent += time.perf_counter() - started
                work += count * 6 * 4096 * columns * rows
    return work / spent / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(json.loads(options.cell), options.seconds)))
        return
    kept = options.out / "growth.jsonl"
    commit = commit_here()
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    rows = []
    for cell in cells():
        measured = [row for row in known if row["cell"] == cell and row.get("commit") == commit]
        if measured and not commit.endswith(CHANGED):
            rows.append(measured[-1])
            continue
        command = [sys.executable, __file__, "--cell", json.dumps(cell), "--seconds", str(options.seconds)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        rows.append({"commit": commit, "cell": cell, **json.loads(found)})
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"Commit {commit}\n\n{table(rows)}")
    plot(rows, options.out / "growth.png")


def commit_here() -> str:
    """The commit that is measured; with `CHANGED` where the code is not that of the commit."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    asked = [*git, "rev-parse", "--short", "HEAD"], [*git, "status", "--porcelain", "src", "benchmarks/growth.py"]
    commit, changes = (subprocess.run(c, check=True, capture_output=True, text=True).stdout.strip() for c in asked)
    return commit + CHANGED if changes else commit


def table(rows: list[dict]) -> str:
    lines = [
        "| list size | passage tokens | batch | layers | s a list | tokens/s | peak MiB | GFLOP/s "
        "| plain products | share |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        cell = row["cell"]
        lines.append(
            f"| {cell['size']} | {cell['length']} | {cell['batch']} | {cell['depth']} "
            f"| {row['seconds_per_list']:.2f} | {row['tokens_per_second']:,.0f} | {row['peak_mib']:,.0f} "
            f"| {row['gflops']:.0f} | {row['matmul_gflops']:.0f} | {row['gflops'] / row['matmul_gflops']:.0%} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    names = {
        "size": "passages in a list",
        "length": "tokens in a passage",
        "batch": "lists in a step",
        "depth": "layers",
    }
    figure, axes = pyplot.subplots(2, len(names), figsize=(12, 5), layout="constrained")
    for column, (name, label) in enumerate(names.items()):
        own = [row for row in rows if all(row["cell"][n] == v for n, v in BASE.items() if n not in (name, "batch"))]
        own = [row for row in own if name == "batch" or row["cell"]["batch"] in (BASE["batch"], 2)]
        own.sort(key=lambda row: row["cell"][name])
        for axis, value in ((axes[0, column], "seconds_per_list"), (axes[1, column], "peak_mib")):
            axis.plot([row["cell"][name] for row in own], [row[value] for row in own], marker="o", color="#30638e")
            axis.set_ylim(bottom=0)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("seconds a list")
    axes[1, 0].set_ylabel("peak memory, MiB")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
