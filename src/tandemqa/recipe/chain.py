"""The chain of stages from base models to a trained pair, each kept by what it depends on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tandemqa import processes
from tandemqa.data.dataset import Dataset
from tandemqa.data.runs import Run
from tandemqa.data.tokens import passage_tokens, tokenizer_fingerprint
from tandemqa.encoders.bundle import MANIFEST, Bundle
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.errors import TandemError
from tandemqa.evaluation.report import write_runs
from tandemqa.evaluation.stages import rank_stages
from tandemqa.files import read_json, save_array, save_arrays, write_json
from tandemqa.index.dense import DenseIndex
from tandemqa.index.lexical import LexicalIndex
from tandemqa.index.vectors import passage_index
from tandemqa.lists.build import DrawConfig, Drawn, TrainingLists, build_lists, text_groups
from tandemqa.lists.denoise import Scores, denoised_lists
from tandemqa.recipe.config import Recipe
from tandemqa.recipe.questions import training_questions, unlabelled_questions
from tandemqa.recipe.sample import HARD, RERANKED_BY, RETRIEVER, Sample, draw_sample, measure_on, sampled_questions
from tandemqa.recipe.stage import Stage, reading
from tandemqa.search.rank import fuse, lexical, reranker_scores, retrieve
from tandemqa.training.batch import Texts
from tandemqa.training.checkpoint import load_weights, remove_checkpoints, save_weights
from tandemqa.training.config import TrainingConfig
from tandemqa.training.contrastive import Contrastive
from tandemqa.training.joint import LossConfig
from tandemqa.training.listwise import Listwise
from tandemqa.training.loop import NotFiniteError, Objective, Refresh, fit
from tandemqa.training.validation import Validation

EVALUATION = "evaluation.json"


class Standing(NamedTuple):
    """The stages that the two models' weights come from; None for the base models."""

    retriever: Stage | None
    reranker: Stage | None


@dataclass(frozen=True)
class Step:
    """A stage and how it is run, with the models as they stand before it."""

    stage: Stage
    before: Standing
    run: Callable[[Path], None]

    @property
    def name(self) -> str:
        return self.stage.folder.name

    @property
    def trains(self) -> bool:
        return self.name.startswith(("warm_", "joint"))


class Chain:
    """The stages of a recipe on a dataset, under `folder`, and the two models as far as they have been trained.

    `steps` lists them in order; `run` does what is missing and leaves the trained models in `retriever` and
    `reranker`. Several processes (see `tandemqa.processes`) train together; the other stages run in the main one.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, folder: Path) -> None:
        self.dataset = dataset
        self.recipe = recipe
        self.folder = folder
        torch.manual_seed(recipe.seed)  # a fresh scoring head is drawn at random
        self.retriever = DualEncoder.load(recipe.retriever)
        self.reranker = CrossEncoder.load(recipe.reranker)
        self.started_from = _started_from(recipe)
        self.qrels = training_questions(dataset, recipe)
        self.unlabelled = unlabelled_questions(dataset, recipe, self.qrels)
        self.query_ids = [*self.qrels, *self.unlabelled]
        self._loaded = Standing(None, None)
        self.steps: list[Step] = []
        self.end = self._lay_out()

    @property
    def complete(self) -> bool:
        return all(step.stage.state == "complete" for step in self.steps)

    @property
    def keys(self) -> dict[str, str]:
        """What identifies the result of each stage, by its name."""
        return {step.name: step.stage.key for step in self.steps}

    def run(self) -> None:
        """Run the stages that have no result yet."""
        with processes.main_first():
            _ = self._retriever_texts, self._reranker_texts
        for step in self.steps:
            if processes.decided(step.stage.state == "complete"):
                continue
            if processes.is_main():
                step.stage.begin()
            processes.wait()
            self._stand(step.before)
            if step.trains or processes.is_main():
                step.run(step.stage.folder)
            if processes.is_main():
                step.stage.finish()
                remove_checkpoints(step.stage.folder)
            processes.wait()
        self._stand(self.end)

    def _lay_out(self) -> Standing:
        recipe, seed = self.recipe, self.recipe.seed
        questions = hashlib.sha256(json.dumps([list(self.qrels), self.unlabelled]).encode()).hexdigest()[:16]
        data = {"input data": self.dataset.fingerprint, "input questions": questions}
        bases = {
            name: {
                "settings": model.config.model_dump(),
                "weights": model.fingerprint(),
                "tokenizer": tokenizer_fingerprint(model.tokenizer),
            }
            for name, model in (("retriever", self.retriever), ("reranker", self.reranker))
        }

        def add(name: str, run: Callable[..., None], before: Standing, **depends_on: Any) -> Stage:
            stage = Stage(self.folder / name, depends_on)
            self.steps.append(Step(stage, before, partial(run, name=name)))
            return stage

        def origin(model: str, stage: Stage | None) -> dict[str, Any]:
            return {model: bases[model]} if stage is None else {f"input {model}": stage.key}

        at = Standing(None, None)
        if recipe.warm_retriever.epochs > 0:
            settings = _settings(recipe.warm_retriever)
            warmed = add(
                "warm_retriever",
                partial(self._warm_retriever, seed=seed),
                at,
                **data,
                **origin("retriever", None),
                seed=seed,
                warm_retriever=settings,
            )
            at = Standing(warmed, None)
        for number in range(recipe.rounds):
            suffix = f"-{number + 1}" if number else ""
            mined = add(
                f"mine{suffix}",
                self._mine,
                at,
                **data,
                **origin("retriever", at.retriever),
                mine=_settings(recipe.mine),
            )
            if recipe.warm_reranker.epochs > 0:
                warmed = add(
                    f"warm_reranker{suffix}",
                    partial(self._warm_reranker, mined=mined, seed=seed),
                    at,
                    **{"input mine": mined.key},
                    **origin("reranker", at.reranker),
                    seed=seed,
                    warm_lists=_settings(recipe.warm_lists),
                    warm_reranker=_settings(recipe.warm_reranker),
                    loss=recipe.loss.reranker_alone().model_dump(),
                )
                at = Standing(at.retriever, warmed)
            inputs: dict[str, Any] = {"input mine": mined.key}
            scored = None
            if recipe.reranker_scores:
                scored = add(
                    f"score{suffix}",
                    partial(self._score, mined=mined),
                    at,
                    **inputs,
                    **origin("reranker", at.reranker),
                    depth=recipe.lists.depth,
                )
                inputs["input score"] = scored.key
            listed = add(
                f"lists{suffix}",
                partial(self._lists, mined=mined, scored=scored, seed=seed + 1),
                at,
                **inputs,
                seed=seed + 1,
                lists=_settings(recipe.lists),
            )
            joint = add(
                f"joint{suffix}",
                partial(self._joint, listed=listed, seed=seed + 1),
                at,
                **{"input lists": listed.key},
                **origin("retriever", at.retriever),
                **origin("reranker", at.reranker),
                seed=seed + 1,
                loss=recipe.loss.model_dump(),
                joint=_settings(recipe.joint),
                refresh_steps=recipe.refresh_steps,
            )
            at = Standing(
                joint if recipe.loss.retriever_learns else at.retriever,
                joint if recipe.loss.reranker_learns else at.reranker,
            )
            seed += 2
        if recipe.evaluation.split is not None:
            add(
                "evaluate",
                self._evaluate,
                at,
                **data,
                **origin("retriever", at.retriever),
                **origin("reranker", at.reranker),
                evaluation=_settings(recipe.evaluation),
            )
        return at

    # The stages. Each reads its inputs' folders and writes into its own.

    def _warm_retriever(self, folder: Path, name: str, seed: int) -> None:
        config = self.recipe.warm_retriever
        lists = _made_once(folder / "lists.npz", lambda: self._warm_retriever_lists(seed))
        objective = Contrastive(
            self.retriever,
            self._retriever_texts,
            lists,
            [
                [self.dataset.passages.row[p] for p, grade in grades.items() if grade > 0]
                for grades in self.qrels.values()
            ],
            self._same_text,
            config.temperature,
            config.micro_tokens,
            config.precision,
            config.grad_keep,
        )
        self._train(objective, config, seed, folder, name)
        self._save_models(folder, retriever=True)

    def _warm_retriever_lists(self, seed: int) -> TrainingLists:
        """Each question with its positive, and negatives of its own if the recipe wants them."""
        config, row = self.recipe.warm_retriever, self.dataset.passages.row
        labelled = list(self.qrels)
        if config.negatives == "none":
            pairs = [(number, row[p]) for number, q in enumerate(labelled) for p, g in self.qrels[q].items() if g > 0]
            numbers, positives = np.array(pairs, dtype=np.int32).T
            return TrainingLists(numbers, positives[:, None])
        if config.negatives == "bm25":
            candidates = self._bm25(labelled, config.depth)
        else:
            drawn = np.random.default_rng(seed).integers(
                len(self.dataset.passages),
                size=(len(labelled), 2 * config.negatives_per_question + 8),
                dtype=np.int32,
            )
            candidates = Run(labelled, drawn, np.zeros(drawn.shape, dtype=np.float32))
        draw = DrawConfig(size=1 + config.negatives_per_question, depth=config.depth)
        return build_lists(candidates, self.qrels, row, self._same_text, draw, seed, keep_single=True).lists

    def _mine(self, folder: Path, name: str) -> None:
        source, depth = self.recipe.mine.source, self.recipe.mine.depth
        index = None if source == "bm25" else passage_index(self.retriever, self.dataset)
        _save_run(folder / "candidates.npz", self._candidates(index, depth))

    def _warm_reranker(self, folder: Path, name: str, mined: Stage, seed: int) -> None:
        config = self.recipe.warm_reranker
        row = self.dataset.passages.row
        draw = self.recipe.warm_lists
        lists = _made_once(
            folder / "lists.npz",
            lambda: build_lists(_load_run(mined), self.qrels, row, self._same_text, draw, seed).lists,
        )
        self._train(self._listwise(lists, self.recipe.loss.reranker_alone(), config), config, seed, folder, name)
        self._save_models(folder, reranker=True)

    def _score(self, folder: Path, name: str, mined: Stage) -> None:
        scores = self._scores(_load_run(mined).cut(self.recipe.lists.depth), name)
        for file_name, values in (("positives.npy", scores.positives), ("scores.npy", scores.candidates)):
            save_array(folder / file_name, values)

    def _lists(self, folder: Path, name: str, mined: Stage, scored: Stage | None, seed: int) -> None:
        scores = None
        if scored is not None:
            with reading(scored.folder):
                files = (scored.folder / name for name in ("scores.npy", "positives.npy"))
                scores = Scores(*(np.load(file, allow_pickle=False) for file in files))
        drawn, about = self._draw(_load_run(mined).cut(self.recipe.lists.depth), scores, seed)
        drawn.lists.save(folder / "lists.npz")
        save_array(folder / "verdicts.npy", drawn.verdicts)
        write_json(folder / "lists.json", about | {"counts": drawn.counts})

    def _joint(self, folder: Path, name: str, listed: Stage, seed: int) -> None:
        config = self.recipe.joint
        with reading(listed.folder):
            lists = TrainingLists.load(listed.folder / "lists.npz")
        refresh = None
        if self.recipe.refresh_steps is not None:
            refresh = Refresh(self.recipe.refresh_steps, partial(self._refreshed, seed=seed))
        validation = None
        if config.validate_steps is not None and config.epochs > 0:
            validation = self._validation(folder, config.validate_steps, seed)
        loss = self.recipe.loss
        self._train(self._listwise(lists, loss, config), config, seed, folder, name, refresh, validation)
        self._save_models(folder, retriever=loss.retriever_learns, reranker=loss.reranker_learns)

    def _evaluate(self, folder: Path, name: str) -> None:
        config = self.recipe.evaluation
        assert config.split is not None
        pair = Bundle(folder, self.retriever, self.reranker, {"started_from": self.started_from})
        rankings = rank_stages(pair, self.dataset, config.split, config.depth)
        learnt = rankings.learn()
        write_runs(rankings.final(learnt), folder, self.dataset.passages.ids)
        write_json(folder / EVALUATION, learnt.model_dump() | {"metrics": rankings.report(learnt).as_json()})

    def _refreshed(self, folder: Path, seed: int) -> Listwise:
        """Lists from the models in the midst of their training; found in `folder` after an interruption."""

        def made() -> TrainingLists:
            index = None
            if self.recipe.mine.source != "bm25":
                index = DenseIndex.build(
                    self.retriever.encode(self._retriever_texts.passages, "passage", show="encode passages")
                )
            candidates = self._candidates(index, self.recipe.mine.depth).cut(self.recipe.lists.depth)
            scores = self._scores(candidates, "score") if self.recipe.reranker_scores else None
            drawn, about = self._draw(candidates, scores, seed)
            write_json(folder / "lists.json", about | {"counts": drawn.counts})
            return drawn.lists

        return self._listwise(_made_once(folder / "lists.npz", made), self.recipe.loss, self.recipe.joint)

    def _validation(self, folder: Path, every_steps: int, seed: int) -> Validation:
        """The measurements of the joint training, on a sample that is drawn with the models as they are before it."""
        config, path = self.recipe.joint, folder / "sample.npz"
        if processes.is_main() and not path.exists():
            query_ids = sampled_questions(self.dataset, config.validation_questions, seed)
            hard = [self._bm25(query_ids, HARD)]
            if self.recipe.mine.source != "bm25":
                queries = self.retriever.tokenize([self.dataset.queries[query_id] for query_id in query_ids])
                index = passage_index(self.retriever, self.dataset)
                hard.append(retrieve(self.retriever, index, query_ids, queries, HARD))
            draw_sample(self.dataset, hard, config.validation_passages, seed).save(path)
        processes.wait()
        sample = Sample.load(path)
        return Validation(
            every_steps,
            config.patience,
            lambda: measure_on(sample, self.dataset, self.retriever, self.reranker),
            RERANKED_BY if self.recipe.loss.reranker_learns else RETRIEVER,
        )

    # What several stages do.

    def _train(self, objective: Objective, config: TrainingConfig, *arguments: Any) -> None:
        """`fit`, but questions and passages are named by their ids."""
        try:
            fit(objective, config, *arguments)
        except NotFiniteError as error:
            passages = self.dataset.passages.ids
            raise TandemError(
                error.sentence(lambda row: repr(self.query_ids[row]), lambda row: repr(passages[row]))
            ) from error

    def _candidates(self, index: DenseIndex | None, depth: int) -> Run:
        dense = None
        if index is not None:
            dense = retrieve(self.retriever, index, self.query_ids, self._retriever_texts.queries, depth)
        if self.recipe.mine.source == "dense":
            assert dense is not None
            return dense
        words = self._bm25(self.query_ids, depth)
        return words if dense is None else fuse(dense, words, depth)

    def _bm25(self, query_ids: list[str], depth: int) -> Run:
        index = LexicalIndex.build(passage.full for passage in self.dataset.passages)
        return lexical(index, query_ids, [self.dataset.queries[query_id] for query_id in query_ids], depth)

    def _scores(self, candidates: Run, show: str) -> Scores:
        texts, row = self._reranker_texts, self.dataset.passages.row
        positives = [
            (number, row[passage])
            for number, grades in enumerate(self.qrels.values())
            for passage, grade in grades.items()
            if grade > 0
        ]
        return Scores(
            reranker_scores(self.reranker, candidates, texts.queries, texts.passages, show=show),
            self.reranker.score(texts.queries, texts.passages, np.array(positives, dtype=np.int64)),
        )

    def _draw(self, candidates: Run, scores: Scores | None, seed: int) -> tuple[Drawn, dict[str, Any]]:
        """Training lists, and what is to be known of how they were made."""
        passages = self.dataset.passages
        if scores is None:
            return build_lists(candidates, self.qrels, passages.row, self._same_text, self.recipe.lists, seed), {}
        return denoised_lists(
            candidates,
            scores,
            self.qrels,
            self.unlabelled,
            passages.ids,
            passages.row,
            self._same_text,
            self.recipe.lists,
            seed,
        )

    def _listwise(self, lists: TrainingLists, loss: LossConfig, config: TrainingConfig) -> Listwise:
        return Listwise(
            self.retriever,
            self.reranker,
            self._retriever_texts,
            self._reranker_texts,
            lists,
            loss,
            config.micro_tokens,
            config.precision,
            config.grad_keep,
        )

    def _stand(self, standing: Standing) -> None:
        """Give the models the weights that they have after these stages."""
        for model in ("retriever", "reranker"):
            stage = getattr(standing, model)
            if stage is not None and stage is not getattr(self._loaded, model):
                with reading(stage.folder):
                    load_weights(stage.folder / f"{model}.safetensors", getattr(self, model))
        self._loaded = standing

    def _save_models(self, folder: Path, retriever: bool = False, reranker: bool = False) -> None:
        for model, wanted in ((self.retriever, retriever), (self.reranker, reranker)):
            if wanted and processes.is_main():
                name = "retriever" if model is self.retriever else "reranker"
                save_weights(folder / f"{name}.safetensors", model)

    @cached_property
    def _retriever_texts(self) -> Texts:
        queries = self.retriever.tokenize([self.dataset.queries[query_id] for query_id in self.query_ids])
        return Texts(queries, passage_tokens(self.dataset, self.retriever.tokenizer))

    @cached_property
    def _reranker_texts(self) -> Texts:
        queries = self.reranker.tokenize([self.dataset.queries[query_id] for query_id in self.query_ids])
        return Texts(queries, passage_tokens(self.dataset, self.reranker.tokenizer))

    @cached_property
    def _same_text(self) -> npt.NDArray[np.int64]:
        special = len(self.retriever.frame(np.empty(0, dtype=np.int32), "passage"))
        return text_groups(self._retriever_texts.passages, self.retriever.limit("passage") - special)


def _settings(config: Any) -> dict[str, Any]:
    """What a stage's result depends on.

    Not what only saves memory (though dropout falls otherwise where a step is cut otherwise), nor who looks on, nor
    how it would be measured in its midst where it is not.
    """
    left_out = {"micro_tokens", "gradient_checkpointing", "tensorboard"}
    if getattr(config, "validate_steps", 0) is None:
        left_out |= {"patience", "validation_questions", "validation_passages"}
    return dict(config.model_dump(exclude=left_out))


def _made_once(path: Path, make: Callable[[], TrainingLists]) -> TrainingLists:
    """The lists in `path`, made by the main process unless an interrupted run left them there."""
    if processes.is_main() and not path.exists():
        make().save(path)
    processes.wait()
    return TrainingLists.load(path)


def _started_from(recipe: Recipe) -> str:
    """The retriever before any training: a recipe that goes on from a bundle starts where that bundle started."""
    model = Path(recipe.retriever.model)
    manifest = model.parent / MANIFEST
    if model.is_dir() and manifest.exists() and "started_from" in (about := read_json(manifest)):
        return str(about["started_from"])
    return str(model.resolve()) if model.exists() else recipe.retriever.model


def _save_run(path: Path, run: Run) -> None:
    save_arrays(path, query_ids=np.array(run.query_ids), rows=run.rows, scores=run.scores)


def _load_run(stage: Stage) -> Run:
    with reading(stage.folder), np.load(stage.folder / "candidates.npz", allow_pickle=False) as arrays:
        return Run(arrays["query_ids"].tolist(), arrays["rows"], arrays["scores"])
