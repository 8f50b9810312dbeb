"""Train and measure one cell, through the product's own `train`; cells share what stages they have in common."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np

from claims.cells import CELLS, Job, bundles, needed
from claims.measure import measure_first_stage, measure_pair
from claims.place import Place
from tandemqa import Bundle, train
from tandemqa.encoders.dual import DualEncoder
from tandemqa.files import read_json, whole_folder
from tandemqa.lists.build import TrainingLists
from tandemqa.recipe.chain import Chain


def run_job(place: Place, job: Job) -> None:
    """Train, measure and write the cell's figures. A killed cell goes on where it was, but for sentence-transformers'
    trainers, which begin again."""
    if job.cell.kind == "first stage":
        retriever = DualEncoder.load(place.recipe(job).retriever)
        place.save(job, measure_first_stage(place, retriever, job.cell.name), {})
        return
    if job.cell.kind == "sentence-transformers":
        from claims.today import MINING, train_today  # needs the extra `data`

        budget = place.load(Job(CELLS["dynamic"], job.seed))["about"]["seconds"]
        mining = MINING[job.cell.name]
        bundle, work = train_today(place.dataset, place.recipe(job), place.run(job), budget, mining)
        values, rates = measure_pair(place, bundle.retriever, bundle.reranker)
        about = {"seconds": round(sum(work.values()), 1), "work": work, "budget": budget, "rates": rates}
    else:
        bundle = trained(place, job)
        values, rates = measure_pair(place, bundle.retriever, bundle.reranker)
        work = work_of(place, job, rates)
        about = {"seconds": round(sum(work.values()), 1), "work": work, "rates": rates}
    place.save(job, values, about)
    keep_logs(place, job)


def trained(place: Place, job: Job) -> Bundle:
    """The bundle of a cell. The passes over its lists are as many as give the cell's steps: the lists come first."""
    run, kept = place.run(job), place.folder / "stages"
    listed = place.recipe(job, "joint.epochs=0", "rounds=1")
    chain = Chain(place.dataset, listed, run / "stages")
    take_shared(chain, kept)
    lists = next(step.stage for step in chain.steps if step.name == "lists")
    if lists.state != "complete":
        train(place.dataset, run, listed)
    share(chain, kept)
    count = len(TrainingLists.load(lists.folder / "lists.npz"))
    epochs = place.steps(job.cell) / math.ceil(count / listed.joint.batch_lists)
    return train(place.dataset, run, place.recipe(job, f"joint.epochs={epochs!r}"))


def take_shared(chain: Chain, kept: Path) -> None:
    """Give the run the stages that another cell has finished, known by their keys. The files are linked: a stage's
    files are never written again, only replaced."""
    for step in chain.steps:
        if step.stage.state in ("new", "changed") and (kept / step.stage.key).exists():
            _link(kept / step.stage.key, step.stage.folder)


def share(chain: Chain, kept: Path) -> None:
    """Keep the finished stages before the joint training for other cells."""
    for step in chain.steps:
        before = not step.name.startswith("joint")
        if before and step.stage.state == "complete" and not (kept / step.stage.key).exists():
            _link(step.stage.folder, kept / step.stage.key)


def _link(source: Path, folder: Path) -> None:
    with whole_folder(folder) as partial:
        shutil.copytree(source, partial, copy_function=os.link, dirs_exist_ok=True)


def work_of(place: Place, job: Job, rates: dict[str, float]) -> dict[str, float]:
    """The seconds of each stage behind a cell, whoever ran it, and of the cells whose bundles it starts from."""
    work: dict[str, float] = {}
    for name in needed(job.cell):
        work |= place.load(Job(CELLS[name], job.seed))["about"]["work"]
    return work | stage_seconds(place.run(job), len(place.dataset.passages), rates)


def stage_seconds(run: Path, passages: int, rates: dict[str, float]) -> dict[str, float]:
    """The seconds of each stage of a run: the logged seconds of all steps; for mining (encoding all passages) and
    scoring, the time that they take at the speed measured afterwards."""
    work: dict[str, float] = {}
    mining = passages / rates["passages a second"]
    for path in sorted((run / "stages").glob("*/stage.json")):
        folder, seconds = path.parent, 0.0
        if (log := folder / "log.jsonl").exists():
            seconds += sum(json.loads(line)["seconds"] for line in log.read_text(encoding="utf-8").splitlines())
        seconds += mining * (folder.name.startswith("mine") + len(list(folder.glob("refresh-*"))))
        if (scores := folder / "scores.npy").exists():
            seconds += np.load(scores, mmap_mode="r").size / rates["pairs a second"]
        work[f"{folder.name} {read_json(path)['key']}"] = round(seconds, 1)
    return work


def keep_logs(place: Place, job: Job) -> None:
    """Of a measured cell's run, keep the logs, and the bundle if others start from it; its weights are large."""
    run = place.run(job)
    for log in run.glob("stages/*/log.jsonl"):
        target = place.folder / "logs" / job.name / f"{log.parent.name}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, target)
    if job.cell.name in bundles():
        shutil.rmtree(run / "stages", ignore_errors=True)
    else:
        shutil.rmtree(run, ignore_errors=True)
