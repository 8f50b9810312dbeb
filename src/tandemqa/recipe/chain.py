"""The chain of stages from base models to a trained pair, each kept by what it depends on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tandemqa import processes
from tandemqa.data.dataset import Dataset
from tandemqa.data.tokens import tokenizer_fingerprint
from tandemqa.recipe import stages
from tandemqa.recipe.config import Recipe
from tandemqa.recipe.materials import Materials
from tandemqa.recipe.stage import Stage, reading
from tandemqa.training.checkpoint import load_weights, remove_checkpoints


class Standing(NamedTuple):
    """The stages that the two models' weights come from; None for the base models."""

    retriever: Stage | None
    reranker: Stage | None


@dataclass(frozen=True)
class Step:
    """A stage and how it is run, with the models as they stand before it."""

    stage: Stage
    before: Standing
    run: Callable[[Materials, Path], None]

    @property
    def name(self) -> str:
        return self.stage.folder.name

    @property
    def trains(self) -> bool:
        return self.name.startswith(("warm_", "joint"))


class Chain:
    """The stages of a recipe on a dataset, under `folder`, and the two models as far as they have been trained.

    `steps` lists them in order; `run` does what is missing and leaves the trained models in `materials`. Several
    processes (see `tandemqa.processes`) train together; the other stages run in the main one.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe, folder: Path) -> None:
        self.materials = Materials(dataset, recipe)
        self.folder = folder
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
            _ = self.materials.retriever_texts, self.materials.reranker_texts
        for step in self.steps:
            if processes.decided(step.stage.state == "complete"):
                continue
            if processes.is_main():
                step.stage.begin()
            processes.wait()
            self._stand(step.before)
            if step.trains or processes.is_main():
                step.run(self.materials, step.stage.folder)
            processes.wait()  # the others may be reading their best state still, which goes with the checkpoints
            if processes.is_main():
                step.stage.finish()
                remove_checkpoints(step.stage.folder)
        self._stand(self.end)

    def _lay_out(self) -> Standing:
        materials, recipe = self.materials, self.materials.recipe
        seed = recipe.seed
        asked = json.dumps([list(materials.qrels), materials.unlabelled])
        questions = hashlib.sha256(asked.encode()).hexdigest()[:16]
        data = {"input data": materials.dataset.fingerprint, "input questions": questions}
        bases = {
            name: {
                "settings": model.config.model_dump(),
                "weights": model.fingerprint(),
                "tokenizer": tokenizer_fingerprint(model.tokenizer),
            }
            for name, model in (("retriever", materials.retriever), ("reranker", materials.reranker))
        }

        def add(name: str, run: Callable[..., None], before: Standing, **depends_on: Any) -> Stage:
            stage = Stage(self.folder / name, depends_on)
            self.steps.append(Step(stage, before, run))
            return stage

        def origin(model: str, stage: Stage | None) -> dict[str, Any]:
            return {model: bases[model]} if stage is None else {f"input {model}": stage.key}

        at = Standing(None, None)
        if recipe.warm_retriever.epochs > 0:
            settings = _settings(recipe.warm_retriever)
            warmed = add(
                "warm_retriever",
                partial(stages.warm_retriever, seed=seed),
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
                stages.mine,
                at,
                **data,
                **origin("retriever", at.retriever),
                mine=_settings(recipe.mine),
            )
            if recipe.warm_reranker.epochs > 0:
                warmed = add(
                    f"warm_reranker{suffix}",
                    partial(stages.warm_reranker, mined=mined.folder, seed=seed),
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
                    partial(stages.score, mined=mined.folder),
                    at,
                    **inputs,
                    **origin("reranker", at.reranker),
                    depth=recipe.lists.depth,
                )
                inputs["input score"] = scored.key
            listed = add(
                f"lists{suffix}",
                partial(
                    stages.lists, mined=mined.folder, scored=None if scored is None else scored.folder, seed=seed + 1
                ),
                at,
                **inputs,
                seed=seed + 1,
                lists=_settings(recipe.lists),
            )
            joint = add(
                f"joint{suffix}",
                partial(stages.joint, listed=listed.folder, seed=seed + 1),
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
                stages.evaluate,
                at,
                **data,
                **origin("retriever", at.retriever),
                **origin("reranker", at.reranker),
                evaluation=_settings(recipe.evaluation),
            )
        return at

    def _stand(self, standing: Standing) -> None:
        """Give the models the weights that they have after these stages."""
        for model in ("retriever", "reranker"):
            stage = getattr(standing, model)
            if stage is not None and stage is not getattr(self._loaded, model):
                with reading(stage.folder):
                    load_weights(stage.folder / f"{model}.safetensors", getattr(self.materials, model))
        self._loaded = standing


def _settings(config: Any) -> dict[str, Any]:
    """What a stage's result depends on.

    Not what only saves memory (though dropout falls otherwise where a step is cut otherwise), nor who looks on, nor
    how it would be measured in its midst where it is not.
    """
    left_out = {"micro_tokens", "gradient_checkpointing", "tensorboard"}
    if getattr(config, "validate_steps", 0) is None:
        left_out |= {"patience", "validation_questions", "validation_passages"}
    return dict(config.model_dump(exclude=left_out))
