"""A recipe on a dataset: the chain of stages from base models to an evaluated bundle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from tandemqa.data.dataset import Dataset, Qrels, load_dataset
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens
from tandemqa.encoders.bundle import Bundle, save_bundle
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.evaluate.metrics import counted_queries
from tandemqa.evaluate.stages import evaluate
from tandemqa.files import read_json, whole_file, write_json
from tandemqa.index.vectors import passage_index
from tandemqa.lists.build import ListsConfig, text_groups, undenoised_lists
from tandemqa.recipe.config import Recipe, load_recipe
from tandemqa.recipe.stage import Stage
from tandemqa.search.rank import retrieve
from tandemqa.training.batch import Texts
from tandemqa.training.joint import JointModel, LossConfig, blend_factor
from tandemqa.training.loop import TrainingConfig, fit


def train(dataset: Dataset | str | Path, out: str | Path, recipe: Recipe | str | Path = "quick") -> Bundle:
    """Train a retriever and a re-ranker together on the split `train` and write the bundle `out/bundle`.

    The stages: candidates (the base retriever's top passages for every question), warm-up (the re-ranker alone, on
    lists of its own), joint training, evaluation. Each leaves its result under `out/stages`, keyed by what it
    depends on. Called again, after an interruption or with a recipe that differs late in the chain, `train` redoes
    only what is missing, and goes on inside an unfinished training stage.
    """
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if recipe.evaluation.split is not None:
        dataset.judged(recipe.evaluation.split)  # a missing split is better found before the training than after
    chain = _Chain.start(dataset, recipe, Path(out) / "stages")
    chain = chain.warmup().joint()
    bundle = save_bundle(
        Path(out) / "bundle",
        chain.retriever,
        chain.reranker,
        {
            "recipe": recipe.model_dump(),
            "started_from": _started_from(recipe),
            "blend": blend_factor(recipe.loss),
            "data": {"fingerprint": dataset.fingerprint, "questions": len(chain.qrels)},
        },
    )
    if recipe.evaluation.split is not None:
        report = evaluate(bundle, dataset, recipe.evaluation.split, recipe.evaluation.depth)
        bundle.about["metrics"] = report.as_json()
        write_json(bundle.folder / "tandem.json", bundle.about)
    return bundle


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
        return cls(
            dataset,
            recipe,
            folder,
            qrels,
            retriever,
            reranker,
            retriever_texts,
            reranker_texts,
            _load_run(stage.folder / "candidates.npz", list(qrels)),
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
            [self.key, seed, lists.model_dump(), training.model_dump(), loss.model_dump(), *depends_on],
        )
        models = JointModel(self.retriever, self.reranker)
        weights = stage.folder / "weights.safetensors"
        if stage.complete:
            load_model(models, weights)
        else:
            drawn = undenoised_lists(
                self.candidates,
                self.qrels,
                self.dataset.passages.row,
                text_groups(self.retriever_texts.passages),
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
    manifest = Path(recipe.retriever.model).parent / "tandem.json"
    return str(read_json(manifest)["started_from"]) if manifest.exists() else recipe.retriever.model
