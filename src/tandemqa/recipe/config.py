"""The recipe: every choice of a training run, validated, from YAML or code."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tandemqa.encoders.cross import RerankerConfig
from tandemqa.encoders.dual import RetrieverConfig
from tandemqa.errors import TandemError
from tandemqa.lists.build import DrawConfig, ListsConfig
from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import LossConfig

READY = Path(__file__).parent / "ready"


class DataConfig(BaseModel):
    """Which part of the data is used."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    questions: int | None = Field(None, ge=1, description="Training questions, drawn at random; null takes all.")
    unlabelled: int = Field(
        0,
        ge=0,
        description="Questions that join by pseudo-labels: training questions not drawn (their labels are not read) "
        "and questions that no split judges. At most this many, drawn at random.",
    )


class WarmRetrieverConfig(TrainingConfig):
    """The retriever's contrastive warm-up (RocketQA, step 1)."""

    epochs: float = Field(0.0, ge=0, description="Passes over the questions; 0 skips the stage.")
    batch_lists: int = Field(64, ge=1, description="Questions per step: their passages are each other's negatives.")
    retriever_rate: float = Field(3e-5, ge=0, description="Peak learning rate of the retriever.")
    negatives: Literal["none", "random", "bm25"] = Field(
        "bm25", description="Where each question's own negatives come from, besides the other questions' passages."
    )
    negatives_per_question: int = Field(1, ge=1, description="How many of them.")
    depth: int = Field(100, ge=1, description="BM25 negatives are drawn from this many.")
    temperature: float = Field(0.05, gt=0, description="Divides the scores: 0.05 suits cosine, 1 an inner product.")


class MineConfig(BaseModel):
    """Where candidates come from."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: Literal["dense", "bm25", "fused"] = Field("dense", description="The retriever, BM25, or both fused.")
    depth: int = Field(100, ge=1, description="Candidates kept for each question.")


class JointConfig(TrainingConfig):
    """The joint training, and how the pair is measured in its midst, on a part of the split `dev`."""

    validate_steps: int | None = Field(
        None,
        ge=1,
        description="Steps after which the pair is measured, again and again; the best state is kept. null: never.",
    )
    patience: int = Field(5, ge=1, description="Measurements in a row without a gain after which training stops.")
    validation_questions: int = Field(100, ge=1, description="Dev questions it is measured on, drawn once.")
    validation_passages: int = Field(
        2000,
        ge=1,
        description="Passages they are asked of: their positives and hard candidates, then random ones up to this.",
    )


class EvaluationConfig(BaseModel):
    """The measurement at a run's end; it also learns how much the retriever's score counts in the final ranking."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    split: str | None = Field("dev", description="Split the run is measured on; null skips the measurement.")
    depth: int = Field(50, ge=1, description="Candidates that the re-ranker sees.")


class Recipe(BaseModel):
    """One training run, from base models to an evaluated pair; the sections stand in the order of the stages."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seed: int = Field(13, ge=0, description="Seed of everything that is drawn at random.")
    data: DataConfig = Field(DataConfig(), description="Which part of the data is used.")
    retriever: RetrieverConfig = Field(RetrieverConfig(), description="What the retriever is.")
    reranker: RerankerConfig = Field(RerankerConfig(), description="What the re-ranker is.")
    warm_retriever: WarmRetrieverConfig = Field(WarmRetrieverConfig(), description="The retriever's warm-up, alone.")
    mine: MineConfig = Field(MineConfig(), description="Where candidates come from.")
    warm_lists: DrawConfig = Field(DrawConfig(), description="Lists of the re-ranker's warm-up.")
    warm_reranker: TrainingConfig = Field(TrainingConfig(), description="The re-ranker's warm-up, alone.")
    lists: ListsConfig = Field(ListsConfig(), description="Lists of the joint training.")
    loss: LossConfig = Field(LossConfig(), description="The terms of the joint training's loss.")
    joint: JointConfig = Field(JointConfig(), description="The joint training.")
    refresh_steps: int | None = Field(
        None, ge=1, description="Steps of the joint training after which candidates are mined and scored anew."
    )
    rounds: int = Field(1, ge=1, description="How often all from `mine` to `joint` is done.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="The final measurement.")

    @model_validator(mode="after")
    def _deep_enough(self) -> Self:
        for section, lists in (("warm_lists", self.warm_lists), ("lists", self.lists)):
            if lists.depth > self.mine.depth:
                raise ValueError(f"{section}.depth ({lists.depth}) is more than mine.depth ({self.mine.depth})")
        return self

    @property
    def reranker_scores(self) -> bool:
        """Whether the lists need the re-ranker's scores of the candidates."""
        return self.lists.denoised_share > 0 or self.data.unlabelled > 0


def load_recipe(source: str | Path = "default", overrides: Sequence[str] = ()) -> Recipe:
    """A ready recipe by name, or a YAML file, with `section.field=value` overrides (values are read as YAML)."""
    path = READY / f"{source}.yaml"
    if not path.exists():
        path = Path(source)
    if not path.is_file():
        ready = ", ".join(sorted(file.stem for file in READY.glob("*.yaml")))
        raise TandemError(f"There is no recipe {str(source)!r}: give the path of a YAML file or one of {ready}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TandemError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise TandemError(f"{path} must hold sections such as `joint:`, not a {type(values).__name__}.")
    for override in overrides:
        _override(values, override)
    where = f"{path} with --set" if overrides else str(path)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise TandemError(_explain(error, where)) from error
    for setting, why in _idle(recipe).items():
        section, _, field = setting.partition(".")
        if field in getattr(recipe, section).model_fields_set:
            raise TandemError(f"{where}: {setting} does nothing, because {why}; leave it out.")
    return recipe


def _idle(recipe: Recipe) -> dict[str, str]:
    """The settings that nothing reads with this recipe, each with the reason.

    Stages of no epochs are not among them: whoever leaves a stage out may want to have it again.
    """
    reasons = {
        "the retriever is trained alone there": ["warm_retriever.reranker_rate", "warm_retriever.head_rate"],
        "the re-ranker is trained alone there": ["warm_reranker.retriever_rate"],
        "one model is trained alone there": ["warm_retriever.clip", "warm_reranker.clip"],
    }
    if recipe.retriever.towers == "shared":
        reasons["shared towers read queries at passage_length, too"] = ["retriever.query_length"]
    if recipe.warm_retriever.negatives != "bm25":
        reasons["warm_retriever.negatives is not bm25"] = ["warm_retriever.depth"]
    if recipe.warm_retriever.negatives == "none":
        reasons["warm_retriever.negatives is none"] = ["warm_retriever.negatives_per_question"]
    if not recipe.reranker_scores:
        unscored = ["lists.low", "lists.high", "lists.thresholds"]
        reasons["lists.denoised_share and data.unlabelled are both 0"] = unscored
    if recipe.joint.validate_steps is None:
        unmeasured = ["joint.patience", "joint.validation_questions", "joint.validation_passages"]
        reasons["joint.validate_steps is not set"] = unmeasured
    if recipe.loss.kl_weight == 0:
        undistilled = ["loss.kl_direction", "loss.kl_reduction", "loss.kl_reranker_gradient"]
        reasons["loss.kl_weight is 0"] = undistilled
    return {setting: why for why, settings in reasons.items() for setting in settings}


def _override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise TandemError(f"--set {override!r} has no value; write it as section.field=value.")
    *sections, last = name.split(".")
    place: Any = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise TandemError(f"--set {override!r}: {section!r} is a value, not a section.")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TandemError(f"--set {override!r}: the value is not valid YAML.") from error


def _explain(error: ValidationError, source: str) -> str:
    """The first mistake, with the key and, for an unknown one, the nearest key that exists."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        if isinstance(first["input"], dict):  # a rule about several settings, which the message names
            return f"{source}: {key + ': ' if key else ''}{message}."
        return f"{source}: {key}: {message} (it is {first['input']!r})."
    known = _known_keys(Recipe)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"{source}: there is no setting {key!r}; the nearest is {near[0]!r}."


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += _known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
