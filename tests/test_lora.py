"""Adapters: peft's own arithmetic, nothing else learns, and what is saved is an ordinary bundle."""

import copy
import sys

import numpy as np
import one_pass
import peft
import pytest
import torch
from conftest import counted_steps
from sentence_transformers import CrossEncoder as TheirReranker
from sentence_transformers import SentenceTransformer

from tandemqa.data.dataset import load_dataset
from tandemqa.errors import TandemError
from tandemqa.recipe.config import load_recipe
from tandemqa.recipe.train import train
from tandemqa.training import loop
from tandemqa.training.batch import make_batch
from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import JointModel, LossConfig, joint_loss, loss_terms
from tandemqa.training.listwise import Listwise
from tandemqa.training.loop import fit

pytestmark = pytest.mark.usefixtures("float32")

RANK = 3
LOSS = LossConfig(kl_weight=1.0, reranker_weight=0.7, retriever_weight=0.3)
CONFIG = TrainingConfig(epochs=3, batch_lists=4, retriever_rate=1e-2, reranker_rate=1e-2)


@pytest.fixture
def adapted(models):
    for model in models:
        model.config = model.config.model_copy(update={"lora_rank": RANK})
    return models


def run(models, texts, lists, folder, config=CONFIG):
    fit(Listwise(*models, texts, texts, lists, LOSS, config.micro_tokens), config, 9, folder, "joint")


def test_only_adapters_and_the_head_learn_and_end_inside_the_weights(adapted, texts, lists, tmp_path):
    before = copy.deepcopy(JointModel(*adapted).state_dict())
    learning = [parameter.requires_grad for parameter in JointModel(*adapted).parameters()]
    run(adapted, texts, lists, tmp_path)
    model = JointModel(*adapted)
    after = model.state_dict()
    assert before.keys() == after.keys(), "the encoders are the plain ones they were"
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    linear = {
        f"{name}.weight"
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, torch.nn.Linear) and "pooler" not in name and "head" not in name
    }
    assert len(linear) == 3 * 2 * 6  # two names of one tower and the re-ranker, two layers, six matrices
    for name in before:
        change = (after[name] - before[name]).double()
        if name in linear:
            size = torch.linalg.svdvals(change)
            assert size[RANK - 1] > 1e-3 and size[RANK] < 1e-5, name
        else:
            assert (name == "reranker.head.weight") == bool(change.any()) or name == "reranker.head.bias", name


def test_a_step_is_that_of_peft_itself(adapted, texts, lists, tmp_path):
    """By hand: peft's model, torch's AdamW, one step on all lists."""
    retriever, reranker = copy.deepcopy(adapted)
    run(adapted, texts, lists, tmp_path, TrainingConfig(batch_lists=10, warmup_share=0, clip_norm=1e9))
    torch.manual_seed(9)
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": r"encoder\.layer\..*(query|key|value|dense)"}
    tower = peft.get_peft_model(retriever.query_tower, peft.LoraConfig(**config))
    encoder = peft.get_peft_model(reranker.encoder, peft.LoraConfig(**config))
    groups = [(tower.parameters(), 5e-5), (encoder.parameters(), 1e-4), (reranker.head.parameters(), 1e-3)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.requires_grad], "lr": rate, "weight_decay": 0.01}
            for parameters, rate in groups
        ]
    )
    batch = make_batch(lists, np.arange(10), (retriever, texts), (reranker, texts))
    scores = one_pass.scores(JointModel(retriever, reranker).train(), batch)
    joint_loss(loss_terms(*scores, batch.mask, LOSS), LOSS).mean().backward()
    optimizer.step()
    expected = tower.merge_and_unload(), encoder.merge_and_unload()
    for ours, theirs in zip((adapted[0].query_tower, adapted[1].encoder), expected, strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("towers", ["shared", "untied"])
def test_resuming_gives_the_weights_of_the_uninterrupted_run(towers, adapted, texts, lists, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    if towers == "untied":
        adapted[0].passage_tower = copy.deepcopy(adapted[0].query_tower)
    straight, killed, again = (copy.deepcopy(adapted) for _ in range(3))
    run(straight, texts, lists, tmp_path / "a")
    whole, made = loop._step, []

    def step(*arguments):
        if len(made) == 4:
            raise RuntimeError("killed")
        made.append(1)
        return whole(*arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop, "_step", step)
        run(killed, texts, lists, tmp_path / "b")
    done = counted_steps(monkeypatch)
    run(again, texts, lists, tmp_path / "b")
    assert done == list(range(4, 9)), "what was saved is not made again"
    for name, value in JointModel(*straight).state_dict().items():
        assert torch.equal(value, JointModel(*again).state_dict()[name]), name


def test_the_bundle_is_an_ordinary_one(tiny_model, tiny_dataset, tmp_path):
    settings = [
        "data.questions=12",
        "lists.size=3",
        "warm_lists.size=2",
        "warm_retriever.epochs=1",
        "refresh_steps=2",
    ]
    settings += [f"retriever.model={tiny_model}", f"reranker.model={tiny_model}", "evaluation.split=null"]
    settings += [f"retriever.lora_rank={RANK}", f"reranker.lora_rank={RANK}", "joint.validate_steps=2"]
    bundle = train(
        tiny_dataset,
        tmp_path,
        load_recipe("quick", [*settings, "joint.patience=9", "joint.gradient_checkpointing=true"]),
    )
    names = {path.name for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    assert not any("adapter" in name for name in names)
    dataset = load_dataset(tiny_dataset)
    questions, passages = [*dataset.queries.values()][:4], [passage.full for passage in dataset.passages][:4]
    vectors = bundle.retriever.encode(bundle.retriever.tokenize(passages), "passage", precision="fp32")
    theirs = SentenceTransformer(str(tmp_path / "bundle" / "retriever")).encode(passages)
    np.testing.assert_allclose(vectors, theirs, atol=1e-5)
    pairs = np.stack([np.arange(4), np.arange(4)], axis=1)
    tokens = bundle.reranker.tokenize(questions), bundle.reranker.tokenize(passages)
    scores = bundle.reranker.score(*tokens, pairs, precision="fp32")
    predicted = TheirReranker(str(tmp_path / "bundle" / "reranker")).predict(
        list(zip(questions, passages, strict=True))
    )
    np.testing.assert_allclose(scores, predicted, atol=1e-5)


def test_without_peft_it_is_said_before_any_training(tiny_model, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    models = [f"retriever.model={tiny_model}", f"reranker.model={tiny_model}"]
    message = r"lora_rank needs the package peft, which is not installed; run: pip install 'tandemqa\[lora\]'"
    with pytest.raises(TandemError, match=message):
        train(tiny_dataset, tmp_path / "run", load_recipe("quick", [*models, "reranker.lora_rank=4"]))
    assert not (tmp_path / "run").exists()
