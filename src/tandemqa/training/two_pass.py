"""Gradients in two passes: the memory of one part of a batch, whatever the length of its lists.

Both losses are functions of what the encoders give, vectors and scores, alone. So everything is computed without
gradient first; the loss then tells how it depends on each vector and score; and each part is computed once more, with
gradient, to carry that on into the weights (Gao et al., 2021, "Scaling deep contrastive learning batch size under
memory limited setup"; here for scores of pairs too). What hardly moves the loss need not be computed again.
"""

import torch
from torch import Tensor

from tandemqa.encoders.backbone import WordTable
from tandemqa.training.batch import ListBatch, kept_rows
from tandemqa.training.joint import JointModel, Outputs


class TwoPass:
    """One batch on its way through a model twice.

    `outputs` are the first pass's, leaves without history: take a loss of them, call its `backward`, then this one's.
    """

    def __init__(self, model: JointModel, batch: ListBatch) -> None:
        self.model = model
        self.tasks = model.tasks(batch)
        self.states: dict[str, list[Tensor]] = {}
        outputs = {}
        for name, task in self.tasks.items():
            states, values = [], []
            with torch.no_grad(), model.autocast():
                words = WordTable(task.encoder, [part for _, part in task.parts])
                for _, part in task.parts:
                    states.append(_random_state(model.device))
                    values.append(task.encode(part.to(model.device), words))
                self.states[name] = states
                outputs[name] = task.place(values, model.device)
            outputs[name].requires_grad_(task.learns)
        self.outputs = Outputs(**outputs)

    def backward(self, keep: float = 1.0) -> int:
        """The second pass: add the gradient of the weights; returns how many tokens it read, with padding.

        keep 1 is exact, up to the order of sums: dropout falls as it did in the first pass. Below 1, those outputs of
        each encoder whose gradients are smallest are left out, as long as their norms add up to at most 1 - keep of
        the sum of all of that encoder's; dropout then falls anew.
        """
        after = _random_state(self.model.device)
        read = 0
        for name, task in self.tasks.items():
            gradient = getattr(self.outputs, name).grad
            if gradient is None:
                continue
            parts = task.parts
            if keep < 1:
                parts = kept_rows(parts, _worth_keeping(gradient, keep).cpu())
            words = WordTable(task.encoder, [part for _, part in parts], cut=True)
            for number, (rows, part) in enumerate(parts):
                if keep == 1:
                    _set_random_state(self.model.device, self.states[name][number])
                with self.model.autocast():
                    again = task.encode(part.to(self.model.device), words)
                again.backward(gradient[rows.to(self.model.device)])  # type: ignore[no-untyped-call]
                read += part.attention_mask.numel()
            words.backward()
        if keep == 1:
            _set_random_state(self.model.device, after)
        return read


def _worth_keeping(gradient: Tensor, keep: float) -> Tensor:
    """The rows whose gradient is needed, bool (N,): the smallest ones that together hold at most 1 - keep of the sum
    of the rows' norms are not."""
    norms = gradient.flatten(1).norm(dim=1).double() if gradient.ndim > 1 else gradient.abs().double()
    values, order = norms.sort()
    droppable = values.cumsum(0) <= (1 - keep) * norms.sum()
    needed = torch.ones_like(droppable)
    needed[order[droppable]] = False
    return needed & (norms > 0)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
