"""The figures of each stage on one split, as a table, as JSON, and as TREC run files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run, write_trec
from tandemqa.evaluation.metrics import bootstrap_interval, counted_queries, evaluate_run
from tandemqa.wording import counted

METRICS = ("mrr@10", "ndcg@10", "recall@1", "recall@20", "recall@50")
SHOWN = {"mrr@10": "MRR@10", "recall@1": "R@1", "recall@20": "R@20"}


@dataclass(frozen=True)
class Figure:
    """The mean of a metric over the questions, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """Figures by stage and metric, over `questions` questions of `split` and `passages` passages."""

    split: str
    questions: int
    passages: int
    depth: int
    stages: dict[str, dict[str, Figure]]
    seconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        stages = {
            stage: {metric: {"mean": f.mean, "low": f.low, "high": f.high} for metric, f in figures.items()}
            for stage, figures in self.stages.items()
        }
        return {
            "split": self.split,
            "questions": self.questions,
            "passages": self.passages,
            "depth": self.depth,
            "stages": stages,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        """The report that `as_json` gave."""
        stages = {
            stage: {metric: Figure(**figure) for metric, figure in figures.items()}
            for stage, figures in values["stages"].items()
        }
        return cls(**{**values, "stages": stages})

    def table(self) -> str:
        """The stages as text, a line each, with the interval of MRR@10."""
        lines = [
            f"{counted(self.questions, f'{self.split} question')}, {counted(self.passages, 'passage')}, "
            f"top {self.depth} re-ranked",
            "",
            f"{'':24}" + "".join(f"{name:>9}" for name in SHOWN.values()) + "   95 % of MRR@10",
        ]
        for stage, figures in self.stages.items():
            values = "".join(f"{figures[metric].mean:9.3f}" for metric in SHOWN)
            interval = figures["mrr@10"]
            lines.append(f"{stage:24}{values}   {interval.low:.3f} to {interval.high:.3f}")
        if self.reranking_hurts:
            lines += ["", "Warning: re-ranking makes the retriever's ranking worse here."]
        if self.stages["BM25"]["mrr@10"].mean > self.stages["re-ranked"]["mrr@10"].mean:
            lines += ["", "Warning: BM25 ranks better than the pair here: search --mode hybrid, or train on more."]
        return "\n".join(lines)

    @property
    def reranking_hurts(self) -> bool:
        """Whether the retriever's own ranking has the better MRR@10."""
        return self.stages["re-ranked"]["mrr@10"].mean < self.stages["retriever after"]["mrr@10"].mean


def measure(
    runs: Mapping[str, Run],
    qrels: Qrels,
    passage_row: Mapping[str, int],
    split: str,
    depth: int,
    seconds: Mapping[str, float],
    seed: int = 0,
) -> Report:
    """Evaluate the run of each stage, in the order it stands in, on the same questions."""
    stages = {}
    for stage, run in runs.items():
        values = evaluate_run(run, qrels, passage_row, METRICS)
        stages[stage] = {
            metric: Figure(float(each.mean()), *bootstrap_interval(each, seed)) for metric, each in values.items()
        }
    return Report(split, len(counted_queries(qrels)), len(passage_row), depth, stages, dict(seconds))


def write_runs(runs: Mapping[str, Run], folder: Path, passage_ids: Sequence[str]) -> None:
    """Write one TREC run file a stage, named after it."""
    for stage, run in runs.items():
        name = stage.replace(" ", "-").lower()
        write_trec(run, folder / f"{name}.trec", passage_ids, tag=f"tandemqa-{name}")
