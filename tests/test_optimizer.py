"""The optimiser against AdamW written out in float64, the schedules against transformers', the limit by hand."""

import copy

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from tandemqa.training.config import TrainingConfig
from tandemqa.training.joint import JointModel, LossConfig
from tandemqa.training.listwise import Listwise
from tandemqa.training.loop import fit
from tandemqa.training.optimizer import clip_gradients, make_optimizer, rate_share

pytestmark = pytest.mark.usefixtures("float32")

RATES = {"retriever": 3e-3, "reranker": 2e-3, "head": 5e-3}
CONFIG = TrainingConfig(
    retriever_rate=RATES["retriever"],
    reranker_rate=RATES["reranker"],
    head_rate=RATES["head"],
    weight_decay=0.1,
)


def rate(name: str) -> float:
    return RATES["head" if name.startswith("reranker.head") else name.split(".")[0]]


def put_gradients(model: JointModel, seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    gradients = {name: random.normal(size=p.shape) * scale for name, p in model.learning_parameters()}
    for name, parameter in model.learning_parameters():
        parameter.grad = torch.from_numpy(gradients[name]).float()
    return gradients


def test_three_steps_are_those_of_adamw_with_a_rate_per_model_and_decay_on_matrices_only(models):
    """Loshchilov and Hutter (2019), algorithm 2, in float64."""
    model = JointModel(*models)
    optimizer = make_optimizer(model, CONFIG)
    expected = {name: p.detach().double().numpy().copy() for name, p in model.learning_parameters()}
    first = {name: np.zeros_like(value) for name, value in expected.items()}
    second = {name: np.zeros_like(value) for name, value in expected.items()}
    for step in (1, 2, 3):
        gradients = put_gradients(model, step)
        optimizer.step()
        for name, g in gradients.items():
            decayed = not (name.endswith("bias") or "LayerNorm" in name)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            shrunk = expected[name] * (1 - rate(name) * 0.1 * decayed)
            expected[name] = shrunk - rate(name) * mean / (np.sqrt(square) + 1e-8)
    for name, parameter in model.learning_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedules_are_those_of_transformers(schedule):
    config = TrainingConfig(schedule=schedule, warmup_share=0.2)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
    for step in range(50):
        # In its warm-up theirs begins with a step at rate 0, which learns nothing; ours is one step ahead there.
        wanted = (step + 1) / 10 if step < 10 else theirs.get_last_lr()[0]
        assert rate_share(step, 50, config) == pytest.approx(wanted, abs=1e-12)
        if 0 < step < 10:
            assert rate_share(step - 1, 50, config) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("clip", ["global", "per_model"])
@pytest.mark.parametrize("scale", [1.0, 1e-5], ids=["too long", "short"])
def test_the_gradient_is_cut_to_the_limit_for_both_models_or_for_each(clip, scale, models):
    model = JointModel(*models)
    gradients = put_gradients(model, 1, scale)
    norms = {
        part: np.sqrt(sum((g**2).sum() for name, g in gradients.items() if name.startswith(part)))
        for part in ("retriever", "reranker")
    }
    both = np.hypot(*norms.values())
    told = clip_gradients(model, TrainingConfig(clip=clip, clip_norm=0.5))
    assert told == pytest.approx(norms, rel=1e-5)
    for name, parameter in model.learning_parameters():
        norm = both if clip == "global" else norms[name.split(".")[0]]
        wanted = gradients[name] * min(1.0, 0.5 / norm)
        np.testing.assert_allclose(parameter.grad.numpy(), wanted, rtol=1e-4, atol=1e-9, err_msg=name)


def test_the_loop_gives_each_model_its_rate_at_each_step(models, texts, lists, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (seen.append({g["lr"] for g in self.param_groups}), step(self))[1]
    )
    config = CONFIG.model_copy(update={"epochs": 2, "batch_lists": 4, "warmup_share": 0.34})
    fit(Listwise(*models, texts, texts, lists, LossConfig(), 16384), config, 1, tmp_path, "joint")
    shares = [1 / 2, 1, 4 / 4, 3 / 4, 2 / 4, 1 / 4]
    assert len(seen) == 6
    for rates, share in zip(seen, shares, strict=True):
        assert sorted(rates) == pytest.approx(sorted(share * value for value in RATES.values()))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(models, texts, lists, tmp_path):
    ends = []
    for number, seed in enumerate((1, 1, 2)):
        pair = copy.deepcopy(models)
        pair[1].dropout.p = 0.3
        objective = Listwise(*pair, texts, texts, lists, LossConfig(), 16384)
        fit(objective, TrainingConfig(batch_lists=4), seed, tmp_path / str(number), "joint")
        ends.append(JointModel(*pair).state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert any(not torch.equal(value, ends[2][name]) for name, value in ends[0].items())
