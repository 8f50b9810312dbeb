"""A recipe on a dataset: the chain of stages from base models to an evaluated bundle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.qrels import Qrels
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.bundle import MANIFEST, Bundle, save_bundle
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.errors import TandemError
from tandemqa.evaluation.metrics import counted_queries
from tandemqa.evaluation.stages import rank_stages
from tandemqa.files import read_json, whole_file
from tandemqa.index.vectors import passage_index
from tandemqa.lists.build import ListsConfig, text_groups, undenoised_lists
from tandemqa.recipe.config import Recipe, load_recipe
from tandemqa.recipe.stage import Stage
from tandemqa.search.rank import retrieve
from tandemqa.training.batch import Texts
from tandemqa.training.joint import JointModel, LossConfig
from tandemqa.training.loop import TrainingConfig, fit


def train(dataset: Dataset | str | Path, out: str | Path, recipe: Recipe | str | Path = "quick") -> Bundle:
    """Train a retriever and a re-ranker together on the split `train` and write the bundle `out/bundle`.

    The stages: candidates (the base retriever's top passages for every question), warm-up (the re-ranker alone, on
    lists of its own), joint training, evaluation, which also learns how much the retriever's score counts in the
    final ranking. Each leaves its result under `out/stages`, keyed by what it depends on. Called again, after an
    interruption or with a recipe that differs late in the chain, `train` redoes only what is missing, and goes on
    inside an unfinished training stage.
    """
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if recipe.evaluation.split is not None:
        dataset.judged(recipe.evaluation.split)  # a missing split is better found before the training than after
    place = Path(out) / "bundle"
    if place.exists() and not (place / MANIFEST).exists():
        raise TandemError(f"{place} holds something that is no bundle; choose another --out or move it away.")
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "started_from": _started_from(recipe),
    }
    chain = _Chain.start(dataset, recipe, Path(out) / "stages").warmup().joint()
    about["data"] = {"fingerprint": dataset.fingerprint, "questions": len(chain.qrels)}
    if recipe.evaluation.split is not None:
        trained = Bundle(place, chain.retriever, chain.reranker, about)
        rankings = rank_stages(trained, dataset, recipe.evaluation.split, recipe.evaluation.depth)
        about["blend"] = rankings.learn_blend()
        about["metrics"] = rankings.report(about["blend"]).as_json()
    return save_bundle(place, chain.retriever, chain.reranker, about)


@dataclass(frozen=True)
class _Chain:
    """What the training stages share. `key` identifies all that the models have been through so far."""

    dataset: Dataset
    recipe: Recipe
    folder: Path
    qrels: Qrels
    retriever: DualEncoder
    reranker: CrossEncoder
    retriever_texts: Texts
    reranker_texts: Texts
    candidates: Run
    key: str

    @classmethod
    def start(cls, dataset: Dataset, recipe: Recipe, folder: Path) -> "_Chain":
        """Load the base models and find candidates for every training question."""
        # A fresh scoring head is drawn at random.
        torch.manual_seed(recipe.seed)
        retriever, reranker = DualEncoder.load(recipe.retriever), CrossEncoder.load(recipe.reranker)
        qrels = _training_questions(dataset, recipe)
        texts = [dataset.queries[query_id] for query_id in qrels]
        retriever_texts = Texts(retriever.tokenize(texts), passage_tokens(dataset, retriever.tokenizer))
        reranker_texts = Texts(reranker.tokenize(texts), passage_tokens(dataset, reranker.tokenizer))
        depth = max(recipe.warmup_lists.depth, recipe.lists.depth)
        stage = Stage(
            folder / "candidates",
            [dataset.fingerprint, list(qrels), recipe.retriever.model_dump(), retriever.fingerprint(), depth],
        )
        if not stage.complete:
            index = passage_index(retriever, dataset)
            _save_run(
                stage.folder / "candidates.npz",
                retrieve(retriever, index, list(qrels), retriever_texts.queries, depth),
            )
            stage.finish()
        with stage.reading():
            candidates = _load_run(stage.folder / "candidates.npz", list(qrels))
        return cls(
            dataset,
            recipe,
            folder,
            qrels,
            retriever,
            reranker,
            retriever_texts,
            reranker_texts,
            candidates,
            stage.key,
        )

    def warmup(self) -> "_Chain":
        """Train the re-ranker alone, so that the retriever has something to learn from."""
        start = [self.recipe.reranker.model_dump(), self.reranker.fingerprint()]
        loss = self.recipe.loss.reranker_alone()
        return self._fit("warmup", self.recipe.warmup_lists, self.recipe.warmup, loss, self.recipe.seed, start)

    def joint(self) -> "_Chain":
        """Train both models on the same lists."""
        return self._fit("joint", self.recipe.lists, self.recipe.joint, self.recipe.loss, self.recipe.seed + 1, [])

    def _fit(
        self,
        name: str,
        lists: ListsConfig,
        training: TrainingConfig,
        loss: LossConfig,
        seed: int,
        depends_on: Sequence[object],
    ) -> "_Chain":
        stage = Stage(
            self.folder / name,
            [
                self.key,
                seed,
                lists.model_dump(),
                training.model_dump(exclude={"micro_tokens"}),
                loss.model_dump(),
                *depends_on,
            ],
        )
        models = JointModel(self.retriever, self.reranker)
        weights = stage.folder / "weights.safetensors"
        if stage.complete:
            with stage.reading():
                load_model(models, weights)
        else:
            drawn = undenoised_lists(
                self.candidates,
                self.qrels,
                self.dataset.passages.row,
                text_groups(self.retriever_texts.passages, self.recipe.retriever.passage_length),
                lists,
                seed,
            )
            drawn.save(stage.folder / "lists.npz")
            fit(
                self.retriever,
                self.reranker,
                drawn,
                self.retriever_texts,
                self.reranker_texts,
                training,
                loss,
                seed,
                stage.folder,
                name,
            )
            with whole_file(weights) as partial:
                save_model(models, str(partial))
            stage.finish()
            (stage.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return replace(self, key=stage.key)


def _training_questions(dataset: Dataset, recipe: Recipe) -> Qrels:
    """The judgements of the questions to train on: all of the split, or a random draw kept in file order."""
    qrels = dataset.judged("train")
    query_ids = counted_queries(qrels)
    wanted = recipe.data.questions
    if wanted is not None and wanted < len(query_ids):
        drawn = np.random.default_rng(recipe.seed).choice(len(query_ids), size=wanted, replace=False)
        query_ids = [query_ids[i] for i in sorted(drawn)]
    return {query_id: qrels[query_id] for query_id in query_ids}


def _save_run(path: Path, run: Run) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, rows=run.rows, scores=run.scores)


def _load_run(path: Path, query_ids: list[str]) -> Run:
    with np.load(path, allow_pickle=False) as arrays:
        return Run(query_ids, arrays["rows"], arrays["scores"])


def _started_from(recipe: Recipe) -> str:
    """The retriever before any training: a recipe that goes on from a bundle starts where that bundle started."""
    model = Path(recipe.retriever.model)
    manifest = model.parent / MANIFEST
    if manifest.exists() and "started_from" in (about := read_json(manifest)):
        return str(about["started_from"])
    return str(model.resolve()) if model.exists() else recipe.retriever.model
