"""The objective of the joint training and of the re-ranker's warm-up: losses on the score matrices of lists."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tandemqa import processes
from tandemqa.encoders.backbone import Precision
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.lists.build import TrainingLists
from tandemqa.training.batch import ListBatch, Sides, Texts, list_tokens, make_batch, split_lists
from tandemqa.training.joint import JointModel, LossConfig, Outputs, joint_loss, loss_terms
from tandemqa.training.losses import rank_correlation
from tandemqa.training.passes import Passes


class Listwise:
    """The joint loss over lists, for `loop.fit`; a model that no term of the loss needs takes no part."""

    def __init__(
        self,
        retriever: DualEncoder,
        reranker: CrossEncoder,
        retriever_texts: Texts,
        reranker_texts: Texts,
        lists: TrainingLists,
        config: LossConfig,
        micro_tokens: int,
        precision: Precision = "auto",
        grad_keep: float = 1.0,
    ) -> None:
        self.sides: Sides = (
            (retriever, retriever_texts) if config.retriever_learns else None,
            (reranker, reranker_texts) if config.needs_reranker else None,
        )
        self.model = JointModel(
            self.sides[0] and retriever,
            self.sides[1] and reranker,
            config.retriever_learns,
            config.reranker_learns,
            precision,
        )
        self.lists = lists
        self.config = config
        self.micro_tokens = micro_tokens
        self.grad_keep = grad_keep

    def __len__(self) -> int:
        return len(self.lists)

    def backward(self, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Add this process's part of the gradient of the mean loss over the lists at `rows`, and return its part of
        the mean of each term, and its tokens: the sums over the processes are those of all lists.

        With both models there is also "rank_correlation", Spearman's between their scores of a list. "tokens_again":
        what did not fit into `micro_tokens` beside the rest of its list and was read without gradient first, padding
        included. "gradient_tokens": what was read with gradient, which is all but where `grad_keep` is below 1.
        Every list of a step counts the same, however the step is cut.
        """
        own = rows[processes.rank() :: processes.count()]
        tokens = list_tokens(self.lists, own, self.sides)
        record = dict.fromkeys(("loss", "kl", "reranker", "retriever"), 0.0)
        if None not in self.sides:
            record["rank_correlation"] = 0.0
        record |= {"tokens": 0, "padded_tokens": 0, "tokens_again": 0, "gradient_tokens": 0}
        # What is worth a gradient is known only when the whole step has been read without.
        for cut in split_lists(tokens, self.micro_tokens if self.grad_keep == 1 else math.inf):
            part = own[cut]
            batch = make_batch(self.lists, part, *self.sides, self.micro_tokens)
            real, with_padding = batch.tokens()
            record["tokens"] += real
            record["padded_tokens"] += with_padding
            passes = Passes(self.model, batch, self._kept_tokens(int(tokens[cut].sum())))
            self._loss(passes.outputs, batch, part, len(rows), record).backward()  # type: ignore[no-untyped-call]
            record["tokens_again"] += passes.tokens_again
            record["gradient_tokens"] += passes.backward(self.grad_keep)
        return record

    def _kept_tokens(self, tokens: int) -> float:
        """How many tokens of a part that holds about so many keep what the first pass computes."""
        if self.grad_keep < 1:
            return 0
        return math.inf if tokens <= self.micro_tokens else self.micro_tokens

    def _loss(
        self, outputs: Outputs, batch: ListBatch, rows: npt.NDArray[np.int64], count: int, record: dict[str, float]
    ) -> Tensor:
        """The sum of the lists' losses over `count`; what the log should say of them is added to `record`."""
        retriever, reranker = self.model.scores(outputs, batch)
        mask = batch.mask.to(retriever.device)
        terms = loss_terms(retriever, reranker, mask, self.config)
        loss = joint_loss(terms, self.config)
        if not torch.isfinite(loss).all():
            raise FloatingPointError(int(rows[int(torch.argmin(torch.isfinite(loss).int()))]))
        values = {"loss": loss, **terms._asdict()}
        if "rank_correlation" in record:
            values["rank_correlation"] = rank_correlation(retriever, reranker, mask)
        for name, each in values.items():
            record[name] += float(each.detach().sum()) / count
        return loss.sum() / count
