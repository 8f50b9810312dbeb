"""The retriever's contrastive warm-up: the loss by hand, and the same gradient however large the batch."""

import copy

import numpy as np
import one_pass
import pytest
import torch
from conftest import held_at_most_by

from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.lists.build import NO_PASSAGE, TrainingLists
from tandemqa.training.config import TrainingConfig
from tandemqa.training.contrastive import Contrastive, contrastive_loss
from tandemqa.training.loop import fit
from tandemqa.training.passes import Passes

pytestmark = pytest.mark.usefixtures("float32")


def objective(retriever, texts, micro_tokens=10**9, same_text=None, positives=None):
    passages = np.array([[0, 9], [1, 8], [2, NO_PASSAGE], [3, 0], [4, 1], [0, 7]], dtype=np.int32)
    lists = TrainingLists(np.array([0, 1, 2, 3, 4, 0], dtype=np.int32), passages)
    positives = positives or [[0, 5], [1], [2], [3], [4]]
    same_text = np.arange(40, dtype=np.int64) if same_text is None else same_text
    return Contrastive(retriever, texts, lists, positives, same_text, 0.05, micro_tokens)


def load(tiny_model, **settings):
    return DualEncoder.load(RetrieverConfig(model=str(tiny_model), **settings))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_loss_is_that_of_float64_by_hand():
    generator = np.random.default_rng(0)
    queries, passages = generator.normal(size=(3, 5)), generator.normal(size=(4, 5))
    target = np.array([2, 0, 3])
    allowed = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=bool)
    expected = []
    for q in range(3):
        scores = queries[q] @ passages.T / 0.7
        expected.append(np.log(np.exp(scores[allowed[q]]).sum()) - scores[target[q]])
    loss = contrastive_loss(
        torch.tensor(queries), torch.tensor(passages), torch.tensor(target), torch.tensor(allowed), 0.7
    )
    np.testing.assert_allclose(loss.numpy(), expected, atol=1e-5)


def test_every_passage_of_the_batch_is_a_negative_but_no_positive_and_no_copy_of_one(tiny_model, texts):
    retriever = load(tiny_model)
    same_text = np.arange(40, dtype=np.int64)
    same_text[8] = same_text[2]  # passage 8 reads like passage 2, the positive of question 2
    record = objective(retriever, texts, same_text=same_text).backward(np.arange(6))

    def alone(text, tower):
        return one_pass.vectors(retriever, retriever.format.pad([retriever.frame(text, tower)]), tower)[0]

    with torch.no_grad():
        q = {i: alone(texts.queries[i], "query") for i in range(5)}
        p = {i: alone(texts.passages[i], "passage") for i in (0, 1, 2, 3, 4, 7, 8, 9)}
    columns = [0, 1, 2, 3, 4, 7, 8, 9]
    forbidden = {0: {0, 5}, 1: {1}, 2: {2, 8}, 3: {3}, 4: {4}}
    losses = []
    for question, positive in zip([0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0], strict=True):
        seen = [c for c in columns if c == positive or c not in forbidden[question]]
        scores = torch.stack([q[question] @ p[c] for c in seen]) / 0.05
        losses.append(float(torch.logsumexp(scores, 0) - scores[seen.index(positive)]))
    assert record["loss"] == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("towers", ["shared", "untied"])
def test_a_cut_batch_gives_the_gradient_of_the_whole(towers, dropout, tiny_model, texts, monkeypatch):
    # Parts of a few texts each: with dropout, the whole must be cut alike to draw the same masks.
    monkeypatch.setattr("tandemqa.training.batch.TOKEN_BUDGET", 40)
    whole = load(tiny_model, towers=towers, dropout=dropout)
    cut = copy.deepcopy(whole)
    results = []
    for retriever, micro_tokens in ((whole, 10**9), (cut, 40)):
        task = objective(retriever, texts, micro_tokens)
        task.model.train()
        torch.manual_seed(3)
        record = task.backward(np.arange(6))
        results.append((record["loss"], gradients(retriever), torch.get_rng_state()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4)
    assert torch.equal(results[0][2], results[1][2]), "what follows draws the same random numbers"


def test_processes_add_up_vectors_alone(tiny_model, texts, monkeypatch):
    """Not what is missing for the re-ranker, which is on no GPU: NCCL would refuse it."""
    summed = []
    monkeypatch.setattr("tandemqa.processes.add_up", lambda tensors: summed.extend(map(len, tensors)))
    objective(load(tiny_model), texts).backward(np.arange(6))
    assert summed == [5, 8]


def test_a_large_batch_holds_the_activations_of_one_part_at_a_time(tiny_model, texts, monkeypatch):
    monkeypatch.setattr("tandemqa.training.batch.TOKEN_BUDGET", 40)
    retriever = load(tiny_model)

    def saved_bytes(micro_tokens: int) -> int:
        return held_at_most_by(lambda: objective(retriever, texts, micro_tokens).backward(np.arange(6)))

    assert saved_bytes(1) < 0.5 * saved_bytes(10**9)


@pytest.mark.parametrize(("tower", "row", "guilty"), [("passage", 8, 1), ("passage", 4, 4), ("query", 2, 2)])
def test_a_text_that_is_not_finite_is_that_of_the_list_that_is_named(
    tower, row, guilty, tiny_model, texts, monkeypatch
):
    """Though no question's loss is finite where a passage is not; and nothing of it reaches a gradient."""
    retriever = load(tiny_model, towers="untied")
    task = objective(retriever, texts)
    word = 5
    own = {"passage": texts.passages, "query": texts.queries}
    own[tower] = [ids.copy() for ids in own[tower]]
    for number, ids in enumerate(own[tower]):
        ids[ids == word] = word + 1
        ids[0] = word if number == row else ids[0]
    task.texts = task.texts._replace(passages=own["passage"], queries=own["query"])
    with torch.no_grad():
        retriever.tower(tower).get_input_embeddings().weight[word] = float("nan")
    with pytest.raises(FloatingPointError) as told:
        task.backward(np.arange(6))
    assert told.value.args == (guilty,)
    assert gradients(retriever) == {}


def test_training_puts_the_positive_first(tiny_model, texts, tmp_path):
    retriever = load(tiny_model)
    task = objective(retriever, texts, positives=[[0], [1], [2], [3], [4]])
    fit(task, TrainingConfig(epochs=60, batch_lists=6, retriever_rate=1e-3), 1, tmp_path, "warm")
    vectors = retriever.encode(texts.queries[:5], "query"), retriever.encode(texts.passages[:10], "passage")
    assert (vectors[0] @ vectors[1].T).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_less_than_all_of_the_gradient_reads_less(tiny_model, texts, monkeypatch):
    retriever = load(tiny_model)
    read = []

    def count(self, keep=1.0, backward=Passes.backward):
        read.append((keep, backward(self, keep)))
        return read[-1][1]

    monkeypatch.setattr(Passes, "backward", count)
    for keep, micro_tokens in ((1.0, 1), (0.7, 10**9)):
        task = objective(retriever, texts, micro_tokens)
        task.grad_keep = keep
        task.backward(np.arange(6))
    (_, everything), (keep, less) = read
    assert keep == 0.7 and 0 < less < everything
