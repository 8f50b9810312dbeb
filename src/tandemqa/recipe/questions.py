"""Which questions a recipe trains on."""

import numpy as np

from tandemqa.data.dataset import Dataset
from tandemqa.data.qrels import Qrels
from tandemqa.evaluation.metrics import counted_queries
from tandemqa.recipe.config import Recipe


def training_questions(dataset: Dataset, recipe: Recipe) -> Qrels:
    """The judgements of the questions to train on: all of the split, or a random draw kept in file order."""
    qrels = dataset.judged("train")
    query_ids = counted_queries(qrels)
    wanted = recipe.data.questions
    if wanted is not None and wanted < len(query_ids):
        drawn = np.random.default_rng(recipe.seed).choice(len(query_ids), size=wanted, replace=False)
        query_ids = [query_ids[i] for i in sorted(drawn)]
    return {query_id: qrels[query_id] for query_id in query_ids}


def unlabelled_questions(dataset: Dataset, recipe: Recipe, labelled: Qrels) -> list[str]:
    """Questions that may join by pseudo-labels: of the training split without its labels, or of no split at all."""
    if not recipe.data.unlabelled:
        return []
    others = {query_id for split, qrels in dataset.qrels.items() if split != "train" for query_id in qrels}
    free = [query_id for query_id in dataset.queries if query_id not in labelled and query_id not in others]
    drawn = np.random.default_rng(recipe.seed).permutation(len(free))[: recipe.data.unlabelled]
    return [free[i] for i in sorted(drawn)]
