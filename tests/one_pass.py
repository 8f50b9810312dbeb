"""The models read in one pass with gradient, as transformers has them: what the program's parts are held against."""

from typing import Any

import torch
from torch import Tensor

from tandemqa.encoders.backbone import hidden_states
from tandemqa.training.joint import Outputs


def vectors(retriever: Any, batch: Any, tower: str) -> Tensor:
    """The retriever's vectors (N, d) of a padded batch."""
    return retriever.pooled(hidden_states(retriever.tower(tower), batch), batch)


def pair_scores(reranker: Any, batch: Any) -> Tensor:
    """The re-ranker's scores (N,) of a padded batch of pairs."""
    return reranker.scores(reranker.pooled(hidden_states(reranker.encoder, batch), batch))


def outputs(model: Any, batch: Any) -> Outputs:
    """The encoders' vectors of a batch of lists, with gradient where they learn."""
    found = {}
    with model.autocast(remember=True):
        for name, task in model.tasks(batch).items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and task.learns):
                values = [task.pooled(hidden_states(task.encoder, part), part) for _, part in task.parts]
                places = torch.cat([rows for rows, _ in task.parts])
                found[name] = values[0].new_zeros(task.shape).index_put((places,), torch.cat(values))
    return Outputs(**found)


def scores(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The score matrices (B, n) of the retriever and the re-ranker."""
    return model.scores(outputs(model, batch), batch)
