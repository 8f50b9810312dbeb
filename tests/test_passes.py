"""Part by part, once or twice, on one thread or several: the gradient of the whole; and what
stands for the whole where not all is carried back."""

import copy
import math

import numpy as np
import one_pass
import pytest
import torch
from conftest import held_at_most_by
from hypothesis import given
from hypothesis import strategies as st

from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.encoders.threads import shares
from tandemqa.lists.build import NO_PASSAGE, TrainingLists
from tandemqa.training.batch import make_batch
from tandemqa.training.joint import JointModel, LossConfig, joint_loss, loss_terms
from tandemqa.training.listwise import Listwise
from tandemqa.training.passes import Passes, _weights

LOSS = LossConfig(kl_weight=1.0, reranker_weight=0.7, retriever_weight=0.3)
ROWS = np.arange(6)


@pytest.fixture(autouse=True)
def small_parts_in_full_precision(monkeypatch):
    monkeypatch.setattr("tandemqa.encoders.backbone.has_bfloat16", lambda device: False)
    monkeypatch.setattr("tandemqa.training.batch.TOKEN_BUDGET", 64)


@pytest.fixture(scope="module")
def lists():
    generator = np.random.default_rng(4)
    passages = np.stack([generator.permutation(40)[:12] for _ in ROWS]).astype(np.int32)
    passages[2, 5:] = NO_PASSAGE
    return TrainingLists(np.arange(len(ROWS), dtype=np.int32), passages)


def pair(tiny_model, dropout=0.0, towers="shared"):
    torch.manual_seed(5)
    retriever = DualEncoder.load(RetrieverConfig(model=str(tiny_model), dropout=dropout, towers=towers))
    reranker = CrossEncoder.load(
        RerankerConfig(model=str(tiny_model), head_dropout=dropout, dropout=dropout, pair_length=48)
    )
    return retriever, reranker


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole_pass(model, batch):
    """The gradient by a single backward pass through everything, and the loss's gradient of all outputs."""
    outputs = one_pass.outputs(model, batch)
    for output in outputs:
        output.retain_grad()
    terms = loss_terms(*model.scores(outputs, batch), batch.mask, LOSS)
    joint_loss(terms, LOSS).mean().backward()
    return gradients(model), [output.grad.clone() for output in outputs]


def by_parts(model, batch, keep=1.0, kept_tokens=0):
    passes = Passes(model, batch, kept_tokens)
    terms = loss_terms(*model.scores(passes.outputs, batch), batch.mask, LOSS)
    joint_loss(terms, LOSS).mean().backward()
    tokens = passes.backward(keep)
    return gradients(model), tokens


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def everything_in_float64(monkeypatch):
    """The program computes pooled states and losses in float32; here nothing may round."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("kept_tokens", [math.inf, 1000, 0], ids=["one pass", "some parts twice", "two passes"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("towers", ["shared", "untied"])
def test_part_by_part_gives_the_gradient_of_the_whole(
    towers, dropout, kept_tokens, tiny_model, texts, lists, everything_in_float64, three_threads
):
    models = pair(tiny_model, dropout, towers)
    results = []
    for run in (whole_pass, lambda model, batch: by_parts(model, batch, kept_tokens=kept_tokens)):
        model = JointModel(*copy.deepcopy(models)).double().train()
        batch = make_batch(lists, ROWS, (model.retriever, texts), (model.reranker, texts))
        assert len(batch.pairs) > 3
        torch.manual_seed(3)
        results.append((run(model, batch)[0], torch.get_rng_state()))
    (whole, after_whole), (cut, after_cut) = results
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(cut[name], gradient, rtol=1e-11, atol=1e-14)
    assert torch.equal(after_whole, after_cut), "what follows draws the same random numbers"


def test_where_not_all_is_read_again_dropout_falls_on_each_part_by_itself(tiny_model, texts, lists, monkeypatch):
    model = JointModel(*pair(tiny_model, dropout=0.3)).train()
    batch = make_batch(lists, ROWS, (model.retriever, texts), (model.reranker, texts))
    drawn = []

    def vectors(self, piece, read, compute=Passes._vectors):
        drawn.append(torch.get_rng_state())
        return compute(self, piece, read)

    monkeypatch.setattr(Passes, "_vectors", vectors)
    by_parts(model, batch, keep=0.9)
    assert len(drawn) > 6
    assert len({bytes(state.numpy()) for state in drawn}) == len(drawn)


def test_an_error_in_a_thread_reaches_the_caller_and_the_next_step_works(tiny_model, texts, lists, three_threads):
    model = JointModel(*pair(tiny_model)).train()
    batch = make_batch(lists, ROWS, (model.retriever, texts), (model.reranker, texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "_vectors", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Passes(model, batch, math.inf)
    assert by_parts(model, batch)[1] > 0


def test_threads_that_train_together_give_the_same_bits_each_time(tiny_model, texts, lists, three_threads):
    models = pair(tiny_model)
    results = []
    for _ in range(5):
        model = JointModel(*copy.deepcopy(models)).train()
        batch = make_batch(lists, ROWS, (model.retriever, texts), (model.reranker, texts))
        results.append(by_parts(model, batch, kept_tokens=1000)[0])
    for name, gradient in results[0].items():
        assert all(torch.equal(other[name], gradient) for other in results[1:])


@given(st.lists(st.integers(1, 4096), max_size=40), st.integers(1, 8))
def test_work_is_shared_out_whole_and_evenly(costs, threads):
    made = shares(costs, threads)
    assert sorted(number for share in made for number in share) == list(range(len(costs)))
    assert len(made) == min(threads, len(costs)) and all(made)
    totals = [sum(costs[number] for number in share) for share in made]
    if len(costs) > threads:
        assert max(totals) <= sum(costs) / threads + max(costs)


def test_the_rows_that_hold_the_share_of_the_squares_count_once_and_all_others_in_expectation():
    gradient = torch.from_numpy(np.random.default_rng(3).lognormal(sigma=2, size=(200, 1)) * np.ones((1, 8)) / 8)
    gradient[7] = 0
    norms = np.linalg.norm(gradient.numpy(), axis=1)
    order = np.argsort(-norms)
    sure = order[: 1 + int(np.searchsorted(np.cumsum(norms[order] ** 2), 0.9 * np.sum(norms**2)))]
    torch.manual_seed(0)
    drawn = np.stack([_weights(gradient, 0.9).numpy() for _ in range(4000)])
    assert (drawn[:, sure] == 1).all() and (drawn[:, 7] == 0).all()
    chances = np.minimum(1, norms / norms[sure].min())
    others = np.setdiff1d(np.flatnonzero(norms), sure)
    assert len(others) > 100 and chances.sum() < 60
    weighed = drawn[:, others]
    assert np.allclose(np.where(weighed > 0, weighed * chances[others], 1), 1)
    # Four standard errors of a mean of draws; the whole sum, too.
    assert (np.abs(weighed.mean(0) - 1) < 4 * np.sqrt((1 / chances[others] - 1) / 4000) + 1e-9).all()
    error = np.sqrt(np.sum(norms[others] ** 2 * (1 / chances[others] - 1)) / 4000)
    assert abs(float((drawn @ norms).mean() - norms.sum())) < 4 * error


def test_what_is_carried_back_is_the_gradient_of_the_rows_by_their_weights(tiny_model, texts, lists, monkeypatch):
    """Against the gradient of a weighted sum of all outputs, by a single backward pass."""
    model = JointModel(*pair(tiny_model)).train()
    batch = make_batch(lists, ROWS, (model.retriever, texts), (model.reranker, texts))
    _, sensitivities = whole_pass(model, batch)
    used = []

    def weights(gradient, keep):
        used.append(_weights(gradient, keep))
        return used[-1]

    monkeypatch.setattr("tandemqa.training.passes._weights", weights)
    for keep in (0.9, 0.5):
        model.zero_grad()
        used.clear()
        torch.manual_seed(1)
        actual, tokens = by_parts(model, batch, keep)
        assert tokens < batch.tokens()[1]
        model.zero_grad()
        outputs = one_pass.outputs(model, batch)
        sums = [(o * s * w[:, None]).sum() for o, s, w in zip(outputs, sensitivities, used, strict=True)]
        sum(sums).backward()
        assert len(used) == 3 and any((w == 0).any() for w in used) and any((w > 1).any() for w in used)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_frozen_re_ranker_is_not_read_a_second_time(tiny_model, texts, lists):
    model = JointModel(*pair(tiny_model), reranker_learns=False).train()
    batch = make_batch(lists, ROWS, (model.retriever, texts), (model.reranker, texts))
    found, tokens = by_parts(model, batch)
    assert all(name.startswith("retriever") for name in found)
    assert tokens == sum(part.attention_mask.numel() for _, part in [*batch.queries, *batch.passages])


def test_what_does_not_fit_of_a_long_list_is_read_twice_and_the_gradient_is_the_same(tiny_model, texts, lists):
    results = []
    for micro_tokens in (10**9, 300, 64):
        objective = Listwise(*pair(tiny_model), texts, texts, lists, LOSS, micro_tokens)
        objective.model.train()
        record = objective.backward(ROWS)
        results.append((record, gradients(objective.model)))
    (whole, expected), *others = results
    assert whole["tokens_again"] == 0
    assert 0 < others[0][0]["tokens_again"] < others[1][0]["tokens_again"]
    assert all(record["gradient_tokens"] == record["padded_tokens"] for record, _ in results)
    for record, actual in others:
        for name in ("loss", "kl", "reranker", "retriever", "rank_correlation"):
            assert record[name] == pytest.approx(whole[name], abs=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_share_of_the_gradient_reads_less_and_is_near_the_whole(tiny_model, texts, lists):
    results = []
    for keep in (1.0, 0.9):
        objective = Listwise(*pair(tiny_model), texts, texts, lists, LOSS, 10**9, grad_keep=keep)
        objective.model.train()
        record = objective.backward(ROWS)
        whole = torch.cat([gradient.flatten() for gradient in gradients(objective.model).values()])
        results.append((record, whole))
    (dense, exact), (sparse, near) = results
    assert sparse["gradient_tokens"] < sparse["padded_tokens"] == dense["gradient_tokens"]
    assert torch.cosine_similarity(exact, near, dim=0) > 0.9


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_a_process_without_a_list_in_a_step_adds_nothing(keep, tiny_model, texts, lists, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    objective = Listwise(*pair(tiny_model), texts, texts, lists, LOSS, 10**9, grad_keep=keep)
    assert set(objective.backward(ROWS[:1]).values()) == {0}
    assert gradients(objective.model) == {}


def test_memory_does_not_grow_with_the_length_of_the_lists(tiny_model, texts, monkeypatch):
    """Bytes that the backward pass holds on to, lists of 32 against lists of 4, with parts as large as they come."""
    monkeypatch.setattr("tandemqa.training.batch.TOKEN_BUDGET", 4096)
    generator = np.random.default_rng(4)

    def held_at_most(size):
        passages = np.stack([generator.permutation(40)[:size] for _ in range(4)]).astype(np.int32)
        lists = TrainingLists(np.arange(4, dtype=np.int32), passages)
        objective = Listwise(*pair(tiny_model), texts, texts, lists, LOSS, micro_tokens=400)
        objective.model.train()
        return held_at_most_by(lambda: objective.backward(np.arange(4)))

    assert held_at_most(32) < 1.3 * held_at_most(4)
