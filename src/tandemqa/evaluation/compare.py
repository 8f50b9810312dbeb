"""Runs over the same questions, side by side: how good each is, and which differences are more than chance."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandemqa.data.qrels import Qrels, read_qrels
from tandemqa.data.runs import Run, any_passage, read_trec
from tandemqa.errors import TandemError
from tandemqa.evaluation.metrics import bootstrap_interval, counted_queries, evaluate_run, parse_metric
from tandemqa.evaluation.significance import ROUNDING, holm, paired_interval, randomisation_test
from tandemqa.files import whole_file
from tandemqa.progress import track
from tandemqa.wording import counted

PER_QUERY = ("mrr@10", "ndcg@10", "recall@1", "recall@20", "recall@100")
TOP = 10


@dataclass(frozen=True)
class Measured:
    """One run: its mean with a 95 % bootstrap interval, and how far to trust it.

    missing: questions that it does not rank, which count 0; depth: of its longest ranking; unjudged: share of the
    passages in its top 10 on which the judgements say nothing, so that they count as wrong.
    """

    mean: float
    low: float
    high: float
    missing: int
    depth: int
    unjudged: float


@dataclass(frozen=True)
class Difference:
    """A run minus the first run: the mean with its paired 95 % interval, the p-value of the randomisation test,
    that p-value corrected for the number of runs (Holm), and on how many questions it wins, ties and loses.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """Runs by name on the same questions, and each but the first against the first.

    values: run -> metric -> float64 (N,), for the N `queries` in order.
    """

    metric: str
    queries: list[str]
    runs: dict[str, Measured]
    differences: dict[str, Difference]
    values: dict[str, dict[str, NDArray[np.float64]]]

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "questions": len(self.queries),
            "runs": {name: asdict(run) for name, run in self.runs.items()},
            "against": next(iter(self.runs)),
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
        }

    def table(self) -> str:
        """A line for each run, then one for each difference, then what to beware of."""
        first, *others = self.runs
        against = f"against {first}"
        width = max(map(len, (against, *others))) + 2
        lines = [
            f"{self.metric} over {counted(len(self.queries), 'question')}",
            "",
            f"{'':{width}}{'mean':>7}   {'95 % interval':14}{'missing':>10}   unjudged in top {TOP}",
        ]
        for name, run in self.runs.items():
            interval = f"{run.low:.3f} to {run.high:.3f}"
            lines.append(f"{name:{width}}{run.mean:7.3f}   {interval}{run.missing:10,}{run.unjudged:21.1%}")
        if others:
            counts = f"{'wins':>8}{'ties':>8}{'losses':>8}"
            head = f"{'difference':>10}   {'95 % interval':16}{'p':>10}{'p (Holm)':>11}{counts}"
            lines += ["", f"{against:{width}}{head}"]
        for name, each in self.differences.items():
            interval = f"{each.low:+.3f} to {each.high:+.3f}"
            counts = f"{each.wins:8,}{each.ties:8,}{each.losses:8,}"
            lines.append(
                f"{name:{width}}{each.mean:+10.3f}   {interval}{_p(each.p):>10}{_p(each.p_holm):>11}{counts}"
            )
        _, cut = parse_metric(self.metric)
        for name, run in self.runs.items():
            if run.depth < cut:
                most = counted(run.depth, "passage")
                lines += ["", f"Warning: {name} ranks {most} at most; {self.metric} looks at {cut}."]
        return "\n".join(lines)

    def write_per_query(self, path: Path) -> None:
        """Write a JSON line a question: {"query": id, "runs": {run: {metric: value}}}."""
        with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
            for number, query in enumerate(self.queries):
                runs = {
                    name: {metric: float(values[number]) for metric, values in metrics.items()}
                    for name, metrics in self.values.items()
                }
                file.write(json.dumps({"query": query, "runs": runs}, ensure_ascii=False) + "\n")


def compare(
    judgements: Path | str,
    runs: Sequence[Path | str],
    split: str = "test",
    metric: str = "mrr@10",
    seed: int = 0,
) -> Comparison:
    """Compare TREC run files on the questions of `judgements` that have a positive.

    judgements: a folder in BEIR layout, of which only qrels/`split`.tsv is read, or a qrels file, BEIR's or TREC's.
    runs: one or more; each is named after its file, or by its whole path where two files have one name. One at a time
    is in memory.

    A malformed file, an unknown metric, a run given twice or one without any of the questions is a `TandemError`.
    """
    parse_metric(metric)  # before any file is read
    paths = _named([Path(run) for run in runs])
    judged_in = _qrels_file(Path(judgements), split)
    qrels = read_qrels(judged_in)
    queries = counted_queries(qrels)
    if not queries:
        raise TandemError(f"{judged_in} has no positive: at least one score must be above 0; add judgements.")
    measured: dict[str, Measured] = {}
    differences: dict[str, Difference] = {}
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    first = next(iter(paths))
    for name, path in track(paths.items(), "compare", len(paths), "run"):
        row = any_passage()
        run = read_trec(path, row)
        if not set(queries) & set(run.query_ids):
            raise TandemError(f"{path} ranks no question that {judged_in} judges; compare runs over these questions.")
        values[name] = evaluate_run(run, qrels, row, list(dict.fromkeys([metric, *_reached(run)])))
        measured[name] = _measured(run, qrels, row, values[name][metric], seed)
        del run, row  # before the next is read
        if name != first:
            differences[name] = _difference(values[first][metric], values[name][metric], seed)
    corrected = holm([difference.p for difference in differences.values()])
    for name, p_holm in zip(differences, corrected, strict=True):
        differences[name] = replace(differences[name], p_holm=p_holm)
    return Comparison(metric, queries, measured, differences, values)


def unjudged_share(run: Run, qrels: Qrels, passage_row: Mapping[str, int]) -> float:
    """The share of the passages in the top 10 of the counted questions for which `qrels` has no row, 0 to 1."""
    ranked = unjudged = 0
    place = {query: number for number, query in enumerate(run.query_ids)}
    for query in counted_queries(qrels):
        if query in place:
            top = run.rows[place[query], :TOP]
            judged = [passage_row[passage] for passage in qrels[query] if passage in passage_row]
            ranked += int(np.count_nonzero(top >= 0))
            unjudged += int(np.count_nonzero((top >= 0) & ~np.isin(top, judged)))
    return unjudged / ranked


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    stems = [path.stem for path in paths]
    named = {path.stem if stems.count(path.stem) == 1 else str(path): path for path in paths}
    if len(named) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise TandemError(f"The run {twice} is given twice; name each run once.")
    return named


def _qrels_file(path: Path, split: str) -> Path:
    if not path.is_dir():
        return path
    file = path / "qrels" / f"{split}.tsv"
    if not file.exists():
        splits = ", ".join(sorted(each.stem for each in (path / "qrels").glob("[!.]*.tsv"))) or "none"
        raise TandemError(f"{file} does not exist; choose a split that {path / 'qrels'} has: {splits}.")
    return file


def _reached(run: Run) -> list[str]:
    """The metrics of PER_QUERY that say of this run what they say of others: no recall deeper than it ranks."""
    return [name for name in PER_QUERY if not name.startswith("recall") or parse_metric(name)[1] <= run.rows.shape[1]]


def _measured(run: Run, qrels: Qrels, row: Mapping[str, int], values: NDArray[np.float64], seed: int) -> Measured:
    missing = len(set(counted_queries(qrels)) - set(run.query_ids))
    unjudged = unjudged_share(run, qrels, row)
    interval = bootstrap_interval(values, seed)
    return Measured(float(values.mean()), *interval, missing, run.rows.shape[1], unjudged)


def _difference(first: NDArray[np.float64], second: NDArray[np.float64], seed: int) -> Difference:
    """`second` against `first` as if it were the only run compared."""
    difference = second - first
    wins = int(np.count_nonzero(difference > ROUNDING))
    losses = int(np.count_nonzero(difference < -ROUNDING))
    ties = len(difference) - wins - losses
    interval = paired_interval(first, second, seed)
    p = randomisation_test(first, second, seed)
    return Difference(float(difference.mean()), *interval, p, p, wins, ties, losses)


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "<0.0001"
