"""Converting a large MS MARCO collection: seconds, lines a second and the peak memory of the command.

    python benchmarks/convert.py [--lines 10000000]

Writes collection.tsv with that many lines of about 55 random words, a question for every thousandth, and its positive
into a temporary folder, and runs `tandemqa convert` on it in a process of its own. Ten million lines take about 4 GB
for the collection and as much again for the dataset.
"""

import argparse
import random
import resource
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=10_000_000, help="passages in collection.tsv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "msmarco"), Path(temporary, "data")
        write_source(source, options.lines)
        size = (source / "collection.tsv").stat().st_size
        print(f"collection.tsv: {options.lines:,} lines, {size / 1e6:,.0f} MB", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tandemqa", "convert", str(source), "--out", str(out)], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"{seconds:.1f} s, {options.lines / seconds:,.0f} lines/s, peak memory {peak:,.0f} MiB")


def write_source(folder: Path, lines: int) -> None:
    generator = random.Random(0)
    words = ["".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 9))) for _ in range(20_000)]
    phrases = [" ".join(generator.choices(words, k=11)) for _ in range(10_000)]
    folder.mkdir()
    with (
        (folder / "collection.tsv").open("w") as collection,
        (folder / "queries.train.tsv").open("w") as queries,
        (folder / "qrels.train.tsv").open("w") as qrels,
    ):
        for number in range(lines):
            collection.write(f"{number}\t{' '.join(generator.choices(phrases, k=5))}\n")
            if number % 1000 == 0:
                queries.write(f"{number}\t{generator.choice(phrases)}\n")
                qrels.write(f"{number}\t0\t{number}\t1\n")


if __name__ == "__main__":
    main()
