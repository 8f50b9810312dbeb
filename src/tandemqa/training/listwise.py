"""The objective of the joint training and of the re-ranker's warm-up: losses on the score matrices of lists."""

import numpy as np
import numpy.typing as npt
import torch

from tandemqa import processes
from tandemqa.encoders.backbone import Precision
from tandemqa.encoders.cross import CrossEncoder
from tandemqa.encoders.dual import DualEncoder
from tandemqa.lists.build import TrainingLists
from tandemqa.training.batch import Sides, Texts, make_batch, split_rows
from tandemqa.training.joint import JointModel, LossConfig, joint_loss, loss_terms
from tandemqa.training.losses import rank_correlation


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

    def __len__(self) -> int:
        return len(self.lists)

    def backward(self, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Add this process's part of the gradient of the mean loss over the lists at `rows`, and return its part of
        the mean of each term, and its tokens: the sums over the processes are those of all lists.

        With both models there is also "rank_correlation", Spearman's between their scores of a list.
        """
        sums = dict.fromkeys(("loss", "kl", "reranker", "retriever"), 0.0)
        if None not in self.sides:
            sums["rank_correlation"] = 0.0
        tokens = padded = 0
        own = rows[processes.rank() :: processes.count()]
        for part in split_rows(self.lists, own, self.sides, self.micro_tokens):
            batch = make_batch(self.lists, part, *self.sides)
            scores = self.model(batch)
            mask = batch.mask.to(scores[0].device)
            terms = loss_terms(scores[0], scores[1], mask, self.config)
            loss = joint_loss(terms, self.config)
            if not torch.isfinite(loss).all():
                raise FloatingPointError(int(part[int(torch.argmin(torch.isfinite(loss).int()))]))
            # Every list of a step counts the same, however the step is cut.
            (loss.sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
            sums["loss"] += float(loss.detach().sum())
            for term, values in terms._asdict().items():
                sums[term] += float(values.detach().sum())
            if "rank_correlation" in sums:
                sums["rank_correlation"] += float(rank_correlation(scores[0], scores[1], mask).sum())
            real, with_padding = batch.tokens()
            tokens, padded = tokens + real, padded + with_padding
        means = {term: value / len(rows) for term, value in sums.items()}
        return {**means, "tokens": tokens, "padded_tokens": padded}
