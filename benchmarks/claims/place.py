"""Where the cells of one set and backbone live, and what they all share: questions, candidates, models."""

import platform
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from variants import write_part

from claims import cells
from claims.cells import (
    CELLS,
    METRIC,
    RECIPE,
    REFERENCE,
    SETS,
    SMOKE,
    STEPS,
    Cell,
    DataSet,
    Job,
    needed,
    started_from,
)
from tandemqa import Dataset, load_dataset, load_recipe
from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.encoders.backbone import BASE_MODEL, default_device, has_bfloat16, load_tokenizer, resolve_model
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.files import read_json, save_array, whole_folder, write_json
from tandemqa.index.vectors import passage_index
from tandemqa.recipe.config import Recipe
from tandemqa.recipe.sample import sampled_questions
from tandemqa.search.rank import retrieve


@dataclass(frozen=True)
class Place:
    """The cells of the set `name` on a backbone: runs under `work`, figures under `results`; `data` has the sets."""

    work: Path
    results: Path
    data: Path
    name: str
    backbone: str
    smoke: bool = False

    @property
    def folder(self) -> Path:
        return self.work / f"{self.name}-{self.backbone}"

    @property
    def set(self) -> DataSet:
        return SMOKE if self.smoke else SETS[self.name]

    def result(self, job: Job) -> Path:
        return self.results / "cells" / f"{self.name}-{self.backbone}" / f"{job.name}.json"

    def run(self, job: Job) -> Path:
        return self.folder / "runs" / job.name

    def done(self, job: Job) -> bool:
        """Whether the cell has been measured, with its present settings."""
        path = self.result(job)
        return path.exists() and bool(read_json(path)["about"]["cell"] == self.identity(job.cell))

    def missing_for(self, job: Job) -> list[Job]:
        """What must be run before a cell can be: what is not measured, or not here and to be started from."""
        starts = {CELLS[name] for name in started_from(job.cell)}
        return [
            other
            for other in job.needs
            if not self.done(other) or (other.cell in starts and not (self.run(other) / "bundle").exists())
        ]

    def identity(self, cell: Cell) -> dict[str, Any]:
        """What a cell's figures depend on, besides code, data and seed."""
        settings = [*REFERENCE, *(cells.SMOKE_SETTINGS if self.smoke else ()), *cell.settings]
        return {
            "settings": settings,
            "steps": self.steps(cell),
            "questions": self.set.questions,
            "unlabelled": self.set.unlabelled,
            "dev": self.set.dev,
            "after": {name: self.identity(CELLS[name]) for name in needed(cell)},
        }

    def steps(self, cell: Cell) -> int:
        """Steps of the cell's joint training."""
        if not cell.steps:
            return 0
        return max(1, round((cells.SMOKE_STEPS if self.smoke else STEPS) * cell.steps))

    def recipe(self, job: Job, *more: str) -> Recipe:
        """The recipe of a cell, all but for the passes over its lists."""
        model, other = self.model(self.backbone), self.model("base" if self.backbone == "three" else "three")
        names = {name: str(self.run(Job(CELLS[name], job.seed)) / "bundle") for name in CELLS}
        names |= {"other": other, "half": str(max(1, self.steps(job.cell) // 2))}
        names |= {"unlabelled": str(self.set.unlabelled)}
        common = [f"retriever.model={model}", f"reranker.model={model}", f"seed={job.seed}"]
        common.append(f"data.questions={self.set.questions}")
        settings = self.identity(job.cell)["settings"]
        return load_recipe(RECIPE, [*common, *(each.format_map(names) for each in settings), *more])

    def model(self, backbone: str) -> str:
        """The base model, or a folder of its first three layers."""
        if backbone == "base":
            return BASE_MODEL
        folder = self.work / "models" / backbone
        if not folder.exists():
            write_first_layers(folder, 3)
        return str(folder)

    @cached_property
    def dataset(self) -> Dataset:
        if not self.smoke:
            return load_dataset(self.data / self.name)
        part = self.work / "data" / self.name
        if not part.exists():
            whole = load_dataset(self.data / self.name)
            write_part(whole, part, SMOKE.questions + SMOKE.unlabelled, SMOKE.dev, cells.SMOKE_PASSAGES)
        return load_dataset(part)

    @cached_property
    def query_ids(self) -> list[str]:
        """The dev questions that every cell is measured on."""
        return sampled_questions(self.dataset, self.set.dev, seed=0)

    @property
    def qrels(self) -> Qrels:
        judged = self.dataset.judged("dev")
        return {query_id: judged[query_id] for query_id in self.query_ids}

    @property
    def questions(self) -> list[str]:
        """The text of the dev questions."""
        return [self.dataset.queries[query_id] for query_id in self.query_ids]

    @cached_property
    def candidates(self) -> Run:
        """The candidates on which every re-ranker of the set is measured: the untouched base retriever's top,
        whatever the backbone, and behind them the positives that it missed."""
        path = self.work / "candidates" / f"{self.name}-{self.set.dev}-top{cells.DEPTH}.npy"
        if not path.exists():
            base = DualEncoder.load(RetrieverConfig())
            index = passage_index(base, self.dataset)
            top = retrieve(base, index, self.query_ids, base.tokenize(self.questions), cells.DEPTH)
            rows = with_positives(top.rows, self.qrels, self.dataset.passages.row)
            save_array(path, rows)
        rows = np.load(path, allow_pickle=False)
        return Run(self.query_ids, rows, -np.broadcast_to(np.arange(rows.shape[1]), rows.shape).astype(np.float32))

    def save(self, job: Job, values: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
        """Write a cell's figures and how they came about: of each stage the means of all metrics, and of each dev
        question the rank of its first relevant passage, 0 where there is none among the first ten."""
        told = {"cell": self.identity(job.cell), "seed": job.seed, "set": self.name, "backbone": self.backbone}
        means = {
            stage: {metric: round(float(np.mean(each)), 6) for metric, each in metrics.items()}
            for stage, metrics in values.items()
        }
        ranks = {stage: " ".join(map(str, ranks_of(metrics[METRIC]))) for stage, metrics in values.items()}
        write_json(self.result(job), {"about": told | about | surroundings(), "means": means, "ranks": ranks})

    def load(self, job: Job) -> dict[str, Any]:
        """A cell's file, with "values": stage -> MRR@10 of each dev question, float64 (N,)."""
        result: dict[str, Any] = read_json(self.result(job))
        ranks = {stage: np.array(each.split(), dtype=np.float64) for stage, each in result.pop("ranks").items()}
        values = {stage: np.divide(1, each, where=each > 0, out=np.zeros_like(each)) for stage, each in ranks.items()}
        return result | {"values": values}


def ranks_of(reciprocals: np.ndarray) -> list[int]:
    """The ranks behind values of MRR@10, 0 for 0."""
    return [round(1 / each) if each else 0 for each in np.asarray(reciprocals).tolist()]


def with_positives(top: np.ndarray, qrels: Qrels, row: dict[str, int]) -> np.ndarray:
    """Rankings, int32 (Q, k), with the positives that they lack behind them; -1 where a ranking ends."""
    whole = []
    for ranked, grades in zip(top.tolist(), qrels.values(), strict=True):
        positives = [row[passage] for passage, grade in grades.items() if grade > 0]
        whole.append([each for each in ranked if each >= 0] + [each for each in positives if each not in ranked])
    rows = np.full((len(whole), max(map(len, whole))), -1, dtype=np.int32)
    for number, each in enumerate(whole):
        rows[number, : len(each)] = each
    return rows


def write_first_layers(folder: Path, count: int) -> None:
    """The base model without its later layers, as a folder that loads like any other."""
    from transformers import AutoModel

    source = resolve_model(BASE_MODEL)
    model = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    model.encoder.layer = model.encoder.layer[:count]
    model.config.num_hidden_layers = count
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        load_tokenizer(BASE_MODEL).save_pretrained(partial)


def surroundings() -> dict[str, Any]:
    """The commit, and the machine."""
    root = Path(__file__).parent
    git = ("git", "-C", str(root))
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    computes = "bfloat16" if has_bfloat16(default_device()) else "float32"
    models = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "commit": commit + (" with changes" if changed else ""),
        "machine": f"{models[0] if models else platform.processor()}, {platform.machine()}, {computes}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
