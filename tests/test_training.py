"""The joint step and the loop: the same gradient however the work is cut, both models updated, exact resume."""

import copy
import json
import signal

import numpy as np
import one_pass
import pytest
import torch
from conftest import counted_steps

from tandemqa.encoders.cross import CrossEncoder, RerankerConfig
from tandemqa.encoders.dual import DualEncoder, RetrieverConfig
from tandemqa.errors import TandemError
from tandemqa.lists.build import NO_PASSAGE, TrainingLists
from tandemqa.training import loop
from tandemqa.training.batch import Texts, list_tokens, make_batch, split_lists
from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import JointModel, LossConfig, joint_loss, loss_terms
from tandemqa.training.listwise import Listwise
from tandemqa.training.loop import Refresh, fit
from tandemqa.training.optimizer import rate_share

ALL_TERMS = LossConfig(kl_weight=1.0, reranker_weight=0.7, retriever_weight=0.3)


pytestmark = pytest.mark.usefixtures("float32")


def train(models, texts, lists, config, loss, seed, folder):
    fit(Listwise(*models, texts, texts, lists, loss, config.micro_tokens), config, seed, folder, "joint")


def scores_one_by_one(models, texts, lists, rows):
    """Every pair alone in a batch of its own: no padding, nothing shared."""
    retriever, reranker = models
    de = torch.zeros(len(rows), lists.passages.shape[1])
    ce = torch.zeros_like(de)
    for i, row in enumerate(rows):
        query = texts.queries[int(lists.query_rows[row])]
        q = one_pass.vectors(retriever, retriever.format.pad([retriever.frame(query, "query")]), "query")[0]
        for j, passage_row in enumerate(lists.passages[row]):
            if passage_row == NO_PASSAGE:
                continue
            passage = texts.passages[int(passage_row)]
            p = one_pass.vectors(retriever, retriever.format.pad([retriever.frame(passage, "passage")]), "passage")[0]
            ids, start = reranker.frame(query, passage)
            de[i, j] = q @ p
            ce[i, j] = one_pass.pair_scores(reranker, reranker.format.pad([ids], [start]))[0]
    return de, ce


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_forward_equals_scoring_every_pair_alone(models, texts, lists, monkeypatch):
    monkeypatch.setattr("tandemqa.training.batch.TOKEN_BUDGET", 64)
    model = JointModel(*models).eval()
    rows = np.arange(10)
    with torch.no_grad():
        ours = one_pass.scores(model, make_batch(lists, rows, (models[0], texts), (models[1], texts)))
        expected = scores_one_by_one(models, texts, lists, rows)
    for matrix, by_hand in zip(ours, expected, strict=True):
        torch.testing.assert_close(matrix, by_hand, atol=2e-5, rtol=1e-5)


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(models, texts, lists, monkeypatch):
    sides = ((models[0], texts), (models[1], texts))
    model = JointModel(*models).train()
    tokens = list_tokens(lists, np.arange(10), sides)
    results = []
    for micro_tokens, budget in ((10**6, 4096), (1, 4096), (300, 64)):
        monkeypatch.setattr("tandemqa.training.batch.TOKEN_BUDGET", budget)
        model.zero_grad()
        for cut in split_lists(tokens, micro_tokens):
            batch = make_batch(lists, np.arange(10)[cut], *sides)
            scores = one_pass.scores(model, batch)
            (joint_loss(loss_terms(*scores, batch.mask, ALL_TERMS), ALL_TERMS).sum() / 10).backward()
        results.append(gradients(model))
    assert len(list(split_lists(tokens, 1))) == 10
    for other in results[1:]:
        for name, gradient in results[0].items():
            torch.testing.assert_close(gradient, other[name], atol=1e-6, rtol=1e-4)


def test_a_text_in_several_lists_is_encoded_once(models, texts, lists):
    lists = TrainingLists(np.array([3, 1, 3], dtype=np.int32), lists.passages[[4, 5, 6]])
    batch = make_batch(lists, np.arange(3), (models[0], texts), None)
    rows = sum(len(part.input_ids) for _, part in batch.passages)
    assert rows == len(np.unique(lists.passages)) < lists.passages.size
    assert sum(len(part.input_ids) for _, part in batch.queries) == 2
    assert batch.pairs == []
    with torch.no_grad():
        ours, _ = one_pass.scores(JointModel(models[0], None).eval(), batch)
        expected, _ = scores_one_by_one(models, texts, lists, np.arange(3))
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 32])
def test_less_than_a_twentieth_of_what_is_read_is_padding(size, tiny_model):
    """Passages of about a hundred tokens, cut at 128, in steps of sixteen lists."""
    retriever = DualEncoder.load(RetrieverConfig(model=str(tiny_model), passage_length=128))
    reranker = CrossEncoder.load(RerankerConfig(model=str(tiny_model), pair_length=160))
    generator = np.random.default_rng(size)

    def drawn(count, tokens):
        return [np.full(max(3, int(n)), 7, dtype=np.int32) for n in generator.lognormal(np.log(tokens), 0.4, count)]

    texts = Texts(drawn(64, 12), drawn(2000, 100))
    passages = np.stack([generator.permutation(2000)[:size] for _ in range(64)]).astype(np.int32)
    lists = TrainingLists(np.arange(64, dtype=np.int32), passages)
    sides, read = ((retriever, texts), (reranker, texts)), np.zeros(2)
    for rows in np.arange(64).reshape(4, 16):
        for cut in split_lists(list_tokens(lists, rows, sides), 8192):
            read += make_batch(lists, rows[cut], *sides, 8192).tokens()
    real, padded = read
    assert 0.95 < real / padded < 1


def test_one_step_updates_both_models_and_every_weight_that_takes_part(models, texts, lists, tmp_path):
    before = copy.deepcopy(JointModel(*models).state_dict())
    config = TrainingConfig(batch_lists=10, warmup_share=0)
    train(models, texts, lists, config, ALL_TERMS, 1, tmp_path)
    after = JointModel(*models).state_dict()
    for name in before:
        # A bias that shifts all scores of a list alike has no gradient, nor has a word that is in no text.
        still = "pooler" in name or "embeddings" in name or name.endswith(("key.bias", "head.bias"))
        assert still or not torch.equal(before[name], after[name]), name
    assert torch.equal(before["reranker.encoder.pooler.dense.weight"], after["reranker.encoder.pooler.dense.weight"])


@pytest.mark.parametrize(
    ("loss", "moves"),
    [
        (LossConfig(kl_weight=0, reranker_weight=1, retriever_weight=0), {"reranker"}),
        (LossConfig(kl_weight=0, reranker_weight=0, retriever_weight=1), {"retriever"}),
    ],
    ids=["re-ranker alone", "retriever alone"],
)
def test_a_model_that_no_term_needs_is_left_alone(loss, moves, models, texts, lists, tmp_path):
    before = copy.deepcopy(JointModel(*models).state_dict())
    train(models, texts, lists, TrainingConfig(batch_lists=5), loss, 1, tmp_path)
    after = JointModel(*models).state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == moves


def test_training_puts_the_positive_first(models, texts, lists, tmp_path):
    config = TrainingConfig(epochs=40, batch_lists=5, retriever_rate=1e-3, reranker_rate=1e-3)
    train(models, texts, lists, config, ALL_TERMS, 1, tmp_path)
    with torch.no_grad():
        batch = make_batch(lists, np.arange(10), (models[0], texts), (models[1], texts))
        for scores in one_pass.scores(JointModel(*models).eval(), batch):
            best = scores.masked_fill(~batch.mask, -torch.inf).argmax(1)
            assert int((best == 0).sum()) >= 9


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_resuming_gives_the_weights_of_the_uninterrupted_run(step, models, texts, lists, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    config = TrainingConfig(epochs=3, batch_lists=4)
    straight, interrupted = copy.deepcopy(models), copy.deepcopy(models)
    for pair in (straight, interrupted):
        pair[1].dropout.p = 0.3  # randomness in the step must be resumed too
    train(straight, texts, lists, config, ALL_TERMS, 9, tmp_path / "a")
    whole, made = loop._step, []

    def step_or_die(*arguments):
        if len(made) == step:
            raise Killed
        made.append(whole(*arguments))
        return made[-1]

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_step", step_or_die)
        train(interrupted, texts, lists, config, ALL_TERMS, 9, tmp_path / "b")
    fresh = copy.deepcopy(models)
    fresh[1].dropout.p = 0.3
    done = counted_steps(monkeypatch)
    train(fresh, texts, lists, config, ALL_TERMS, 9, tmp_path / "b")
    for name, value in JointModel(*straight).state_dict().items():
        assert torch.equal(value, JointModel(*fresh).state_dict()[name]), name
    assert done == list(range(step, 9)), "what was saved is not made again"
    logs = [(tmp_path / folder / "log.jsonl").read_text().splitlines() for folder in "ab"]
    assert len(logs[0]) == len(logs[1]) == 9


def cut_off(content):
    return content[:1000]


def with_zeros(content):
    middle = len(content) // 2
    return content[:middle] + bytes(512) + content[middle + 512 :]


@pytest.mark.parametrize("damage", [cut_off, with_zeros])
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damaged, damage, models, texts, lists, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    straight, again = copy.deepcopy(models), copy.deepcopy(models)
    config = TrainingConfig(epochs=2, batch_lists=4)
    train(straight, texts, lists, config, ALL_TERMS, 9, tmp_path)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert [path.stem for path in checkpoints] == ["checkpoint-00000005", "checkpoint-00000006"]
    for path in checkpoints[-damaged:]:
        path.write_bytes(damage(path.read_bytes()))
    done = counted_steps(monkeypatch)
    train(again, texts, lists, config, ALL_TERMS, 9, tmp_path)
    assert done == ([5] if damaged == 1 else list(range(6)))
    assert capsys.readouterr().err.count("is damaged; training goes on from the one before it") == damaged
    for name, value in JointModel(*straight).state_dict().items():
        assert torch.equal(value, JointModel(*again).state_dict()[name]), name
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(6))


def test_ctrl_c_finishes_the_step_and_saves(models, texts, lists, tmp_path, monkeypatch):
    config = TrainingConfig(epochs=2, batch_lists=4)
    straight, again = copy.deepcopy(models), copy.deepcopy(models)
    train(straight, texts, lists, config, ALL_TERMS, 9, tmp_path / "a")
    whole, steps = loop._step, []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return whole(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="3 of 6 steps of joint are made and"):
        patch.setattr(loop, "_step", step)
        train(models, texts, lists, config, ALL_TERMS, 9, tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-00000003.safetensors"]
    done = counted_steps(monkeypatch)
    train(again, texts, lists, config, ALL_TERMS, 9, tmp_path / "b")
    assert done == [3, 4, 5]
    for name, value in JointModel(*straight).state_dict().items():
        assert torch.equal(value, JointModel(*again).state_dict()[name]), name


def test_a_signal_while_lists_are_made_anew_ends_the_training_behind_that(
    models, texts, lists, tmp_path, monkeypatch, capfd
):
    config = TrainingConfig(epochs=2, batch_lists=4)

    def run(pair, folder, signals=()):
        task = Listwise(*pair, texts, texts, lists, ALL_TERMS, config.micro_tokens)
        left = iter(signals)

        def made(folder):
            for number in next(left, ()):
                signal.raise_signal(number)
            return task

        fit(task, config, 9, folder, "joint", Refresh(2, made))

    straight, again = copy.deepcopy(models), copy.deepcopy(models)
    run(straight, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt, match="4 of 6 steps of joint are made and saved"):
        run(models, tmp_path / "b", [[], [signal.SIGTERM]])
    said = "Stopping after this step; once more stops at once, without saving.\n"
    assert capfd.readouterr().err.count(said) == 1
    done = counted_steps(monkeypatch)
    with pytest.raises(KeyboardInterrupt) as told:
        run(copy.deepcopy(models), tmp_path / "b", [[signal.SIGINT, signal.SIGINT]])
    assert not told.value.args and capfd.readouterr().err.count(said) == 1
    run(again, tmp_path / "b")
    assert done == [4, 5]
    for name, value in JointModel(*straight).state_dict().items():
        assert torch.equal(value, JointModel(*again).state_dict()[name]), name


def test_a_loss_that_is_not_finite_names_the_list(models, texts, lists, tmp_path):
    with torch.no_grad():
        models[1].head.weight.fill_(float("nan"))
    with pytest.raises(
        TandemError, match=r"loss of question row \d+ with its passages row \d+, .* not finite at step 0"
    ):
        train(models, texts, lists, TrainingConfig(), ALL_TERMS, 1, tmp_path)


def test_computing_activations_again_takes_less_memory_and_gives_the_same_weights(models, texts, lists, tmp_path):
    ends, held = [], []
    for number, again in enumerate((False, True)):
        pair = copy.deepcopy(models)
        for dropout in (
            module for model in pair for module in model.modules() if isinstance(module, torch.nn.Dropout)
        ):
            dropout.p = 0.2
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            config = TrainingConfig(epochs=2, batch_lists=5, gradient_checkpointing=again)
            train(pair, texts, lists, config, ALL_TERMS, 9, tmp_path / str(number))
        ends.append(JointModel(*pair).state_dict())
        held.append(sum(kept))
    assert held[1] < 0.5 * held[0]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_each_epoch_is_a_new_order_of_all_lists():
    steps = list(loop._steps(10, 4, 6, seed=3))
    assert [len(rows) for rows in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()


def test_the_rate_rises_and_falls_as_the_schedule_says():
    config = TrainingConfig(warmup_share=0.2)
    shares = [rate_share(step, 10, config) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0] and shares[-1] == pytest.approx(1 / 8)
    assert rate_share(9, 10, TrainingConfig(warmup_share=0.2, schedule="constant")) == 1.0
    cosine = TrainingConfig(warmup_share=0, schedule="cosine")
    assert [rate_share(step, 4, cosine) for step in range(5)] == pytest.approx(
        [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]
    )
