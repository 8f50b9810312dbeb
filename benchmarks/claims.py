"""The claims of the RocketQAv2 paper, measured: a grid of recipes that differ in one thing each.

    python benchmarks/claims.py run --work WORK [--sets medquad] [--backbones three] [--cells main] [--seeds 0 1 2]
    python benchmarks/claims.py table --work WORK

`run` trains and measures cell by cell, each in a process of its own, and goes on where it was: what has been
measured, here or elsewhere, lies in benchmarks/results/claims/cells and is not done again, unless a cell is to start
from a bundle that is not here; a killed cell goes on from its last checkpoint. Main cells come first, with the first
seed, then all others, then the next seed. `--cells` takes names, or `main` or `all`; what they need is run before
them. `table` writes claims.md and plots into benchmarks/results/claims. Only dev questions are measured. The cells
`st` need the extra `data`.

--smoke: every cell on a handful of questions and short texts, in two steps: whether all of it works.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from claims.cells import BACKBONES, CELLS, SETS, Job, queue

if TYPE_CHECKING:
    from claims.place import Place

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = arguments().parse_args()
    {"run": run, "cell": one_cell, "table": table}[options.what](options)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table", "cell"], help="`cell` is what `run` starts for each")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs and the figures")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["medquad"])
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=["three"])
    parser.add_argument("--cells", default="all", help="names with commas between, or `main`, or `all`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="all of it, tiny")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "claims", help="for figures and the table"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cell under way ends, too
    failed: list[str] = []
    for name in options.sets:
        for backbone in options.backbones:
            place = place_of(options, name, backbone)
            queued = queue(chosen(options.cells), options.seeds)
            again = {other for job in queued if not place.done(job) for other in place.missing_for(job)}
            jobs = [job for job in queued if job in again or not place.done(job)]
            started = time.monotonic()
            for number, job in enumerate(jobs, 1):
                title = f"{name} {backbone} {job.name}"
                print(f"{title}: {number} of {len(jobs)}", flush=True)
                if missing := place.missing_for(job):
                    print(f"left out: it needs {', '.join(other.name for other in missing)}", flush=True)
                    failed.append(title)
                    continue
                if subprocess.run(child(options, place.name, place.backbone, job)).returncode:
                    failed.append(title)
                minutes = (time.monotonic() - started) / 60 / number
                print(f"{minutes:.1f} minutes a cell, {minutes * (len(jobs) - number):.0f} left", flush=True)
    if failed:
        raise SystemExit("Not measured, see above why: " + "; ".join(failed))


def child(options: argparse.Namespace, name: str, backbone: str, job: Job) -> list[str]:
    """The command that runs one cell."""
    told = ["cell", "--work", str(options.work), "--data", str(options.data), "--sets", name, "--backbones", backbone]
    told += ["--cells", job.cell.name, "--seeds", str(job.seed), "--out", str(options.out)]
    return [sys.executable, __file__, *told, *(["--smoke"] if options.smoke else [])]


def one_cell(options: argparse.Namespace) -> None:
    from claims.train import run_job

    from tandemqa.errors import TandemError

    place = place_of(options, options.sets[0], options.backbones[0])
    try:
        run_job(place, Job(CELLS[options.cells], options.seeds[0]))
    except (TandemError, KeyboardInterrupt) as error:
        raise SystemExit(str(error)) from error


def table(options: argparse.Namespace) -> None:
    from claims.page import write_page

    places = [place_of(options, name, backbone) for name in SETS for backbone in BACKBONES]
    print(f"{write_page(places, options.out)} is written.")


def place_of(options: argparse.Namespace, name: str, backbone: str) -> "Place":
    from claims.place import Place

    work = options.work.resolve()
    results = options.out.resolve()
    if options.smoke:
        work = results = work / "smoke"
    return Place(work, results, options.data.resolve(), name, backbone, options.smoke)


def chosen(told: str) -> list[str]:
    """The names of the cells that `--cells` means."""
    if told in ("all", "main"):
        return [name for name, cell in CELLS.items() if told == "all" or cell.main]
    names = told.split(",")
    unknown = [name for name in names if name not in CELLS]
    if unknown:
        raise SystemExit(f"There is no cell {unknown[0]!r}; there are {', '.join(CELLS)}.")
    return names


if __name__ == "__main__":
    main()
