"""The retriever's contrastive warm-up: every passage of the batch is a negative of every other question.

A batch of any size takes the memory of a small one (see `passes`).

With several processes each encodes its share of the texts, and all have the vectors of all: negatives cross devices
(RocketQA, section 3.1), and the gradient is that of one process with the whole batch.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandemqa import processes
from tandemqa.encoders.backbone import Precision, device_of
from tandemqa.encoders.dual import DualEncoder
from tandemqa.lists.build import NO_PASSAGE, TrainingLists
from tandemqa.training.batch import ListBatch, Texts, make_batch
from tandemqa.training.joint import JointModel
from tandemqa.training.passes import Passes


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
        grad_keep: float = 1.0,
    ) -> None:
        self.model = JointModel(retriever, None, precision=precision)
        self.retriever = retriever
        self.texts = texts
        self.lists = lists
        self.positives = positives
        self.same_text = same_text
        self.temperature = temperature
        self.micro_tokens = micro_tokens
        self.grad_keep = grad_keep

    def __len__(self) -> int:
        return len(self.lists)

    def backward(self, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Add this process's part of the gradient of the mean loss over the lists at `rows`, and return its part of
        that mean, and its tokens."""
        batch = make_batch(self.lists, rows, (self.retriever, self.texts), None, self.micro_tokens)
        batch = batch.share(processes.rank(), processes.count())
        target, allowed = self._targets(rows)
        passes = Passes(self.model, batch, self.micro_tokens if self.grad_keep == 1 else 0)
        with torch.no_grad():
            processes.add_up([passes.outputs.queries, passes.outputs.passages])
        queries, passages = passes.outputs.queries[batch.query_index.to(target.device)], passes.outputs.passages
        loss = contrastive_loss(queries, passages, target, allowed, self.temperature)
        # One text that is not finite spoils the losses of all questions: its own list is named.
        for finite in (_finite(queries, passages, batch), torch.isfinite(loss)):
            if not finite.all():
                raise FloatingPointError(int(rows[int(finite.int().argmin())]))
        loss.mean().backward()  # type: ignore[no-untyped-call]
        passes.backward(self.grad_keep)
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


def _finite(queries: Tensor, passages: Tensor, batch: ListBatch) -> Tensor:
    """Whether each list's own question (B, d) and passages, of the distinct ones (P, d), are finite: bool (B,)."""
    own = torch.isfinite(passages).all(1)[batch.passage_index.to(passages.device)]
    return torch.isfinite(queries).all(1) & (own | ~batch.mask.to(own.device)).all(1)
