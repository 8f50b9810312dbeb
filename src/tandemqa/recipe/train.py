"""A recipe on a dataset: from base models to an evaluated bundle."""

from pathlib import Path
from typing import Any

from tandemqa import processes
from tandemqa.data.dataset import Dataset, load_dataset
from tandemqa.data.lines import check_trec_names
from tandemqa.encoders.bundle import MANIFEST, Bundle, save_bundle
from tandemqa.errors import TandemError
from tandemqa.extras import needed
from tandemqa.files import read_json, write_json
from tandemqa.recipe.chain import Chain
from tandemqa.recipe.config import Recipe, load_recipe
from tandemqa.recipe.run import RUN
from tandemqa.recipe.sample import SPLIT
from tandemqa.recipe.stage import reading
from tandemqa.recipe.stages import EVALUATION
from tandemqa.training.log import summary_writer


def train(dataset: Dataset | str | Path, out: str | Path, recipe: Recipe | str | Path = "default") -> Bundle:
    """Train a retriever and a re-ranker together on the split `train` and write the bundle `out/bundle`.

    The stages (see `recipe.chain`) end with the evaluation, which also learns how much the retriever's score counts
    in the final ranking. Each leaves its result under `out/stages`, keyed by what it depends on. Called again, after
    an interruption or with a recipe that differs late in the chain, `train` redoes only what is missing, and goes on
    inside an unfinished training stage; called again with nothing changed, it does nothing. Under torchrun all
    processes call it and train together.
    """
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if recipe.evaluation.split is not None:
        # Better found before the training than after: a missing split, ids that the evaluation's files cannot carry.
        check_trec_names([*dataset.judged(recipe.evaluation.split), *dataset.passages.ids], str(dataset.folder))
    if recipe.joint.validate_steps is not None:
        dataset.judged(SPLIT)
    _need_extras(recipe)
    out = Path(out)
    place = out / "bundle"
    if place.exists() and not (place / MANIFEST).exists():
        raise TandemError(f"{place} holds something that is no bundle; choose another --out or move it away.")
    processes.join()
    chain = Chain(dataset, recipe, out / "stages")
    if processes.decided(_finished(chain, place)):
        return Bundle.load(place)
    data = {
        "path": str(dataset.folder.resolve()),
        "fingerprint": dataset.fingerprint,
        "questions": len(chain.materials.qrels),
    }
    if processes.is_main():
        stages = [step.name for step in chain.steps]
        write_json(out / RUN, {"data": data, "recipe": recipe.model_dump(), "stages": stages})
    chain.run()
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "started_from": chain.materials.started_from,
        "data": data,
        "stages": chain.keys,
    }
    if recipe.evaluation.split is not None:
        stage = chain.steps[-1].stage
        with reading(stage.folder):
            about |= read_json(stage.folder / EVALUATION)
    if processes.is_main():
        save_bundle(place, chain.materials.retriever, chain.materials.reranker, about)
    processes.wait()
    return Bundle.load(place)


def _need_extras(recipe: Recipe) -> None:
    """Refuse a recipe whose options need a package that is not installed."""
    if any(stage.tensorboard for stage in (recipe.warm_retriever, recipe.warm_reranker, recipe.joint)):
        summary_writer()
    if recipe.retriever.lora_rank or recipe.reranker.lora_rank:
        needed("peft", "lora", "The setting lora_rank")


def _finished(chain: Chain, place: Path) -> bool:
    if not (chain.complete and place.exists()):
        return False
    about = read_json(place / MANIFEST)
    return bool(about.get("recipe") == chain.materials.recipe.model_dump() and about.get("stages") == chain.keys)
