"""The recipe: every choice of a training run, validated, from YAML or code."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tandemqa.encoders.cross import RerankerConfig
from tandemqa.encoders.dual import RetrieverConfig
from tandemqa.errors import TandemError
from tandemqa.lists.build import ListsConfig
from tandemqa.training.joint import LossConfig
from tandemqa.training.loop import TrainingConfig

READY = Path(__file__).parent / "ready"


class DataConfig(BaseModel):
    """Which part of the data is used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int | None = Field(None, ge=1, description="Training questions, drawn at random; null takes all.")


class EvaluationConfig(BaseModel):
    """The measurement at a run's end; it also learns how much the retriever's score counts in the final ranking."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str | None = Field("dev", description="Split the run is measured on; null skips the measurement.")
    depth: int = Field(50, ge=1, description="Candidates that the re-ranker sees.")


class Recipe(BaseModel):
    """One training run: models, candidates, re-ranker warm-up, lists, joint training, evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(13, ge=0, description="Seed of everything that is drawn at random.")
    data: DataConfig = Field(DataConfig(), description="Which part of the data is used.")
    retriever: RetrieverConfig = Field(RetrieverConfig(), description="What the retriever is.")
    reranker: RerankerConfig = Field(RerankerConfig(), description="What the re-ranker is.")
    warmup_lists: ListsConfig = Field(ListsConfig(), description="Lists of the re-ranker's warm-up.")
    warmup: TrainingConfig = Field(TrainingConfig(), description="The re-ranker's warm-up, alone.")
    lists: ListsConfig = Field(ListsConfig(), description="Lists of the joint training.")
    joint: TrainingConfig = Field(TrainingConfig(), description="The joint training.")
    loss: LossConfig = Field(LossConfig(), description="The terms of the joint training's loss.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="The final measurement.")


def load_recipe(source: str | Path = "quick", overrides: Sequence[str] = ()) -> Recipe:
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
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise TandemError(_explain(error, f"{path} with --set" if overrides else str(path))) from error


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
        where = f"{source}: {key}" if key else source
        return f"{where}: {first['msg']} (it is {first['input']!r})."
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
