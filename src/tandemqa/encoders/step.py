"""An encoder for the time of a training step: what its parts share, and where their gradients come together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tandemqa.encoders.backbone import hidden_states
from tandemqa.encoders.inputs import TokenBatch

# The sums of the gradients of leaves, by leaf.
Gradients = dict[Tensor, Tensor]


class WordTable:
    """The word embeddings of the tokens that a training step reads, looked up once for all of its batches.

    A lookup's gradient is as large as the vocabulary; made once a step instead of once a batch, it costs next to
    nothing. `vectors` is a leaf, at which the gradient is gathered until `backward` hands it on.
    """

    def __init__(self, words: nn.Embedding, batches: Sequence[TokenBatch], learns: bool) -> None:
        self.row = torch.zeros(words.num_embeddings, dtype=torch.int64, device=words.weight.device)
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *(batch.input_ids.flatten() for batch in batches)])
        ids = torch.unique(ids).to(words.weight.device)
        self.row[ids] = torch.arange(len(ids), device=ids.device)
        with torch.set_grad_enabled(learns):
            self.looked_up: Tensor = words(ids)
        self.vectors = self.looked_up.detach().requires_grad_(self.looked_up.requires_grad)

    def backward(self, gradients: Gradients) -> None:
        """Hand the gradient of `vectors`, if there is one, on to the embeddings' weights."""
        gradient = gradients.get(self.vectors)
        if gradient is not None:
            self.looked_up.backward(gradient)  # type: ignore[no-untyped-call]

    def __getitem__(self, input_ids: Tensor) -> Tensor:
        """Word embeddings, shape (N, L, d), of ids of shape (N, L)."""
        return nn.functional.embedding(self.row[input_ids], self.vectors)


class StepEncoder:
    """An encoder as transformers has it.

    leaves: what gradients are to be taken of, none if it does not learn; `backward` hands their sums on.
    """

    def __init__(self, model: nn.Module, batches: Sequence[TokenBatch], learns: bool) -> None:
        self.model = model
        self.words = WordTable(model.get_input_embeddings(), batches, learns)  # type: ignore[operator]
        self.parameters = [parameter for parameter in model.parameters() if learns and parameter.requires_grad]
        self.leaves = [*self.parameters, *([self.words.vectors] if self.words.vectors.requires_grad else [])]

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Last hidden states, shape (N, L, d)."""
        return hidden_states(self.model, batch, self.words[batch.input_ids])

    def reader(self) -> "StepEncoder":
        """What reads where no gradient is taken: itself, so that dropout falls alike."""
        return self

    def backward(self, gradients: Gradients) -> None:
        """Add the sums of the leaves' gradients to those of the parameters."""
        for parameter in self.parameters:
            if parameter in gradients:
                add_gradient(parameter, gradients[parameter])
        self.words.backward(gradients)


def draws(model: nn.Module) -> bool:
    """Whether an encoder draws random numbers, for dropout (all of whose rates `load_backbone` sets alike)."""
    return model.training and any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in model.modules())


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
