"""Losses on score matrices: they see scores of shape (B, n) and a mask of real candidates, never a model or a string.

Column 0 holds each list's positive. All return one float32 value per list, shape (B,), so that a batch split in
parts gives exactly the gradient of the whole.
"""

from typing import Literal

import torch
from torch import Tensor

Direction = Literal["retriever_reranker", "reranker_retriever"]
Reduction = Literal["sum", "mean"]


def log_probabilities(scores: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax over each list's real candidates; -inf where there is none (RocketQAv2, equation 3)."""
    return torch.log_softmax((scores.float() / temperature).masked_fill(~mask, -torch.inf), dim=-1)


def supervised_listwise(scores: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the list's softmax with its positive (RocketQAv2, equation 5)."""
    return -log_probabilities(scores, mask, temperature)[:, 0]


def supervised_pointwise(scores: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Binary cross-entropy of each candidate by itself, the mean over the list (RocketQA, equation 4)."""
    target = torch.zeros_like(scores, dtype=torch.float32)
    target[:, 0] = 1.0
    values = torch.nn.functional.binary_cross_entropy_with_logits(
        scores.float() / temperature, target, reduction="none"
    )
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


def listwise_divergence(
    retriever: Tensor,
    reranker: Tensor,
    mask: Tensor,
    direction: Direction = "retriever_reranker",
    reduction: Reduction = "sum",
    reranker_gradient: bool = True,
    retriever_temperature: float = 1.0,
    reranker_temperature: float = 1.0,
) -> Tensor:
    """KL divergence between the two score distributions of each list (RocketQAv2, equation 4).

    direction "retriever_reranker" is KL(retriever ‖ re-ranker), the paper's; the other is the reference code's.
    reduction "sum" adds over the list, "mean" divides by its number of candidates, as the reference code does.
    `reranker_gradient=False` makes the re-ranker's distribution a constant, as in the reference code.
    """
    p = log_probabilities(retriever, mask, retriever_temperature)
    q = log_probabilities(reranker if reranker_gradient else reranker.detach(), mask, reranker_temperature)
    if direction == "reranker_retriever":
        p, q = q, p
    # Padding has probability 0 in both; -inf minus -inf would be NaN there, so it is replaced before subtracting.
    p, q = p.masked_fill(~mask, 0.0), q.masked_fill(~mask, 0.0)
    terms = (p.exp() * (p - q)).masked_fill(~mask, 0.0)
    return terms.sum(-1) if reduction == "sum" else terms.sum(-1) / mask.sum(-1)


@torch.no_grad()
def rank_correlation(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Spearman's correlation of two score matrices over each list's real candidates; 0 for a list of one."""
    ranks = []
    for scores in (first, second):
        order = scores.float().masked_fill(~mask, torch.inf).argsort(-1)
        rank = order.argsort(-1).float()
        count = mask.sum(-1, keepdim=True)
        ranks.append((rank - (count - 1) / 2).masked_fill(~mask, 0.0))
    norm = (ranks[0].square().sum(-1) * ranks[1].square().sum(-1)).sqrt()
    return torch.where(norm > 0, (ranks[0] * ranks[1]).sum(-1) / norm.clamp_min(1e-9), 0.0)
