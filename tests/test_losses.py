"""The losses against float64 arithmetic by hand, finite differences and sentence-transformers' own loss."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

from tandemqa.training.joint import LossConfig, joint_loss, loss_terms
from tandemqa.training.losses import (
    listwise_divergence,
    rank_correlation,
    supervised_listwise,
    supervised_pointwise,
)

RETRIEVER = [[0.9, 0.4, -0.3, 0.1], [0.2, 0.25, 0.7, 0.0]]
RERANKER = [[2.0, -1.0, 0.5, 0.3], [-0.4, 1.5, 0.2, 9.9]]
MASK = [[True, True, True, True], [True, True, True, False]]


def softmax_by_hand(scores, mask, temperature):
    powers = [math.exp(s / temperature) if m else 0.0 for s, m in zip(scores, mask, strict=True)]
    return [p / sum(powers) for p in powers]


def kl_by_hand(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("direction", ["retriever_reranker", "reranker_retriever"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.05, 2.0)])
def test_divergence_equals_arithmetic_by_hand(direction, reduction, temperatures):
    ours = listwise_divergence(
        torch.tensor(RETRIEVER),
        torch.tensor(RERANKER),
        torch.tensor(MASK),
        direction,
        reduction,
        True,
        *temperatures,
    )
    for row in range(2):
        p = softmax_by_hand(RETRIEVER[row], MASK[row], temperatures[0])
        q = softmax_by_hand(RERANKER[row], MASK[row], temperatures[1])
        expected = kl_by_hand(p, q) if direction == "retriever_reranker" else kl_by_hand(q, p)
        expected /= 1 if reduction == "sum" else sum(MASK[row])
        assert float(ours[row]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_supervised_loss_equals_arithmetic_by_hand():
    ours = supervised_listwise(torch.tensor(RERANKER), torch.tensor(MASK), temperature=0.7)
    for row in range(2):
        expected = -math.log(softmax_by_hand(RERANKER[row], MASK[row], 0.7)[0])
        assert float(ours[row]) == pytest.approx(expected, rel=1e-5)


def test_divergence_equals_sentence_transformers_where_the_forms_coincide():
    """DistillKLDivLoss is KL(teacher ‖ student), batch mean, times the square of its temperature."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    queries = torch.eye(5)
    passages = [student[:, column : column + 1] * queries for column in range(8)]

    class Identity(torch.nn.Module):
        def forward(self, features):
            return features

    for temperature in (1.0, 2.0):
        loss = DistillKLDivLoss(Identity(), temperature=temperature)
        embeddings = [queries, *passages]
        theirs = loss([{"sentence_embedding": e} for e in embeddings], teacher)
        ours = listwise_divergence(
            student,
            teacher,
            torch.ones(5, 8, dtype=torch.bool),
            "reranker_retriever",
            retriever_temperature=temperature,
            reranker_temperature=temperature,
        )
        assert float(ours.mean()) * temperature**2 == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(retriever_weight=0.5),
        LossConfig(kl_direction="reranker_retriever", kl_reduction="mean", retriever_temperature=0.3),
        LossConfig(reranker_weight=2.0, reranker_temperature=1.7),
    ],
    ids=["paper-with-supervised-retriever", "reference-code", "temperatures-and-weights"],
)
def test_gradient_equals_finite_differences(config):
    scores = np.array([RETRIEVER, RERANKER])
    mask = torch.tensor(MASK)

    def loss_by_hand(values):
        """The whole loss in float64, without torch."""
        total = 0.0
        for row in range(2):
            p = softmax_by_hand(values[0][row], MASK[row], config.retriever_temperature)
            q = softmax_by_hand(values[1][row], MASK[row], config.reranker_temperature)
            kl = kl_by_hand(p, q) if config.kl_direction == "retriever_reranker" else kl_by_hand(q, p)
            kl /= 1 if config.kl_reduction == "sum" else sum(MASK[row])
            total += config.kl_weight * kl
            total -= config.reranker_weight * math.log(q[0]) + config.retriever_weight * math.log(p[0])
        return total

    retriever = torch.tensor(scores[0], dtype=torch.float32, requires_grad=True)
    reranker = torch.tensor(scores[1], dtype=torch.float32, requires_grad=True)
    joint_loss(loss_terms(retriever, reranker, mask, config), config).sum().backward()
    for model, gradient in enumerate((retriever.grad, reranker.grad)):
        for place in np.ndindex(2, 4):
            step = 1e-5
            up, down = scores.copy(), scores.copy()
            up[(model, *place)] += step
            down[(model, *place)] -= step
            expected = (loss_by_hand(up) - loss_by_hand(down)) / (2 * step)
            assert float(gradient[place]) == pytest.approx(expected, abs=2e-4)


def test_the_reranker_feels_no_divergence_when_it_is_a_constant():
    config = LossConfig(reranker_weight=0.0, kl_reranker_gradient=False)
    retriever = torch.tensor(RETRIEVER, requires_grad=True)
    reranker = torch.tensor(RERANKER, requires_grad=True)
    joint_loss(loss_terms(retriever, reranker, torch.tensor(MASK), config), config).sum().backward()
    assert torch.count_nonzero(reranker.grad) == 0
    assert torch.count_nonzero(retriever.grad) > 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_padding_a_list_changes_neither_loss_nor_gradient(reduction):
    config = LossConfig(retriever_weight=1.0, kl_reduction=reduction)
    results = []
    for padding in (0, 3):
        retriever = torch.tensor([[*row, *[7.7] * padding] for row in RETRIEVER], requires_grad=True)
        reranker = torch.tensor([[*row, *[-3.3] * padding] for row in RERANKER], requires_grad=True)
        mask = torch.tensor([[*row, *[False] * padding] for row in MASK])
        loss = joint_loss(loss_terms(retriever, reranker, mask, config), config)
        loss.sum().backward()
        assert torch.isfinite(retriever.grad).all() and torch.isfinite(reranker.grad).all()
        results.append((loss.detach(), retriever.grad[:, :4], reranker.grad[:, :4]))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded)


def test_extreme_scores_give_finite_losses():
    retriever = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    reranker = torch.tensor([[-90.0, 90.0, 0.0]], requires_grad=True)
    config = LossConfig(retriever_weight=1.0)
    loss = joint_loss(loss_terms(retriever, reranker, torch.ones(1, 3, dtype=torch.bool), config), config)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(retriever.grad).all()


def test_the_pointwise_loss_is_the_mean_of_float64_binary_cross_entropies():
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(4, 6)) * 3
    mask = np.ones((4, 6), dtype=bool)
    mask[1, 4:] = mask[3, 1:] = False
    expected = []
    for row, real in zip(scores, mask, strict=True):
        p = 1 / (1 + np.exp(-row[real] / 0.7))
        target = np.arange(real.sum()) == 0
        expected.append(np.mean(-np.log(np.where(target, p, 1 - p))))
    loss = supervised_pointwise(torch.tensor(scores), torch.tensor(mask), 0.7)
    np.testing.assert_allclose(loss.numpy(), expected, atol=1e-6)


def test_rank_correlation_is_scipys_over_the_real_candidates():
    generator = np.random.default_rng(4)
    first, second = generator.normal(size=(2, 5, 8))
    mask = np.ones((5, 8), dtype=bool)
    mask[2, 5:] = False
    mask[4, 1:] = False
    values = rank_correlation(torch.tensor(first), torch.tensor(second), torch.tensor(mask))
    for row in range(4):
        expected = spearmanr(first[row, mask[row]], second[row, mask[row]]).statistic
        assert float(values[row]) == pytest.approx(expected, abs=1e-6)
    assert float(values[4]) == 0.0
