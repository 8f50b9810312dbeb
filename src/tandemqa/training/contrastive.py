"""The retriever's contrastive warm-up: every passage of the batch is a negative of every other question.

A batch of any size takes the memory of a small one (Gao et al., 2021, "Scaling deep contrastive learning batch size
under memory limited setup"): encode everything without gradient, take the loss's gradient with respect to the
vectors, then encode again part by part and carry that gradient on into the encoder.

With several processes each encodes its share of the texts, and all have the vectors of all: negatives cross devices
(RocketQA, section 3.1), and the gradient is that of one process with the whole batch.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandemqa import processes
from tandemqa.encoders.backbone import Precision, autocast, device_of
from tandemqa.encoders.dual import DualEncoder, Tower
from tandemqa.lists.build import NO_PASSAGE, TrainingLists
from tandemqa.training.batch import Part, Texts, make_batch
from tandemqa.training.joint import JointModel


def contrastive_loss(
    queries: Tensor, passages: Tensor, target: Tensor, allowed: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy of each query's positive among the passages it may be compared with, float32 of shape (B,).

    queries (B, d), passages (P, d), target int64 (B,): the column of each query's positive; allowed bool (B, P): the
    columns that are that positive or a negative of the query (RocketQA, equation 2, with in-batch negatives).
    """
    scores = (queries.float() @ passages.float().T) / temperature
    return torch.nn.functional.cross_entropy(scores.masked_fill(~allowed, -torch.inf), target, reduction="none")


class Contrastive:
    """The objective of the warm-up, for `loop.fit`.

    positives: per question row, the passage rows of all its labelled positives; none of them, and no passage that
    reads like one (`same_text`), is ever a negative of the question.
    """

    def __init__(
        self,
        retriever: DualEncoder,
        texts: Texts,
        lists: TrainingLists,
        positives: list[list[int]],
        same_text: npt.NDArray[np.int64],
        temperature: float,
        micro_tokens: int,
        precision: Precision = "auto",
    ) -> None:
        self.model = JointModel(retriever, None, precision=precision)
        self.retriever = retriever
        self.texts = texts
        self.lists = lists
        self.positives = positives
        self.same_text = same_text
        self.temperature = temperature
        self.micro_tokens = micro_tokens

    def __len__(self) -> int:
        return len(self.lists)

    def backward(self, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Add this process's part of the gradient of the mean loss over the lists at `rows`, and return its part of
        that mean, and its tokens."""
        batch = make_batch(self.lists, rows, (self.retriever, self.texts), None).share(
            processes.rank(), processes.count()
        )
        target, allowed = self._targets(rows)
        sides: list[tuple[Tower, list[Part]]] = [("query", batch.queries), ("passage", batch.passages)]
        if processes.count() == 1 and batch.tokens()[1] <= self.micro_tokens:
            vectors = [self._encode(side, parts) for side, parts in sides]
            loss = contrastive_loss(vectors[0], vectors[1], target, allowed, self.temperature)
            loss.mean().backward()  # type: ignore[no-untyped-call]
        else:
            loss = self._cached(sides, target, allowed)
        if not torch.isfinite(loss).all():
            raise FloatingPointError(int(rows[int(torch.argmin(torch.isfinite(loss).int()))]))
        real, padded = batch.tokens()
        mean = float(loss.detach().mean()) / processes.count()
        return {"loss": mean, "tokens": real, "padded_tokens": padded}

    def _targets(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Each list's positive as a column of the batch's distinct passages; the columns each query may see."""
        chosen = self.lists.passages[rows]
        distinct = np.unique(chosen[chosen != NO_PASSAGE])
        target = np.searchsorted(distinct, chosen[:, 0])
        allowed = np.ones((len(rows), len(distinct)), dtype=bool)
        for place, row in enumerate(self.lists.query_rows[rows].tolist()):
            allowed[place] = ~np.isin(self.same_text[distinct], self.same_text[self.positives[row]])
            allowed[place, target[place]] = True
        device = device_of(self.retriever)
        return torch.from_numpy(target).to(device), torch.from_numpy(allowed).to(device)

    def _encode(self, side: Tower, parts: list[Part]) -> Tensor:
        """Vectors of all parts, in the order of the rows that they fill."""
        device = device_of(self.retriever)
        with autocast(device, self.model.precision == "auto"):
            vectors = torch.cat([self.retriever(part.to(device), side) for _, part in parts])
        return vectors[torch.argsort(torch.cat([rows for rows, _ in parts])).to(device)]

    def _cached(self, sides: list[tuple[Tower, list[Part]]], target: Tensor, allowed: Tensor) -> Tensor:
        """The same gradient, with the activations of one part in memory at a time."""
        device = device_of(self.retriever)
        states, vectors = [], []
        for side, parts in sides:
            count = allowed.shape[0 if side == "query" else 1]
            whole = torch.zeros(count, self.retriever.size, device=device)
            for rows, part in parts:
                states.append(_random_state(device))
                with torch.no_grad(), autocast(device, self.model.precision == "auto"):
                    whole[rows.to(device)] = self.retriever(part.to(device), side).float()
            vectors.append(whole)
        processes.add_up(vectors)
        for whole in vectors:
            whole.requires_grad_()
        after = _random_state(device)
        loss = contrastive_loss(vectors[0], vectors[1], target, allowed, self.temperature)
        loss.mean().backward()  # type: ignore[no-untyped-call]
        replay = iter(states)
        for (side, parts), whole in zip(sides, vectors, strict=True):
            assert whole.grad is not None
            for rows, part in parts:
                _set_random_state(device, next(replay))  # dropout must fall as it did the first time
                with autocast(device, self.model.precision == "auto"):
                    again = self.retriever(part.to(device), side)
                again.backward(whole.grad[rows.to(device)])
        _set_random_state(device, after)
        return loss


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
