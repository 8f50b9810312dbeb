"""TandemQA: question answering in two stages, a retriever and a re-ranker trained together."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandemqa.data.dataset import Dataset, load_dataset
    from tandemqa.encoders.bundle import Bundle
    from tandemqa.errors import TandemError
    from tandemqa.evaluation.stages import evaluate
    from tandemqa.index.index import Index
    from tandemqa.recipe.config import Recipe, load_recipe
    from tandemqa.recipe.train import train
    from tandemqa.search.searcher import Searcher

__all__ = [
    "Bundle",
    "Dataset",
    "Index",
    "Recipe",
    "Searcher",
    "TandemError",
    "evaluate",
    "load_dataset",
    "load_recipe",
    "train",
]

try:
    __version__ = version("tandemqa")
except PackageNotFoundError:
    __version__ = "0"

_HOME = {
    "Bundle": "encoders.bundle",
    "Dataset": "data.dataset",
    "Index": "index.index",
    "Recipe": "recipe.config",
    "Searcher": "search.searcher",
    "TandemError": "errors",
    "evaluate": "evaluation.stages",
    "load_dataset": "data.dataset",
    "load_recipe": "recipe.config",
    "train": "recipe.train",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: torch alone takes seconds, and `tandemqa --help` must answer at once.
    if name not in _HOME:
        raise AttributeError(f"module 'tandemqa' has no attribute {name!r}")
    return getattr(import_module(f"tandemqa.{_HOME[name]}"), name)
