"""The lean encoder gives the states and the gradients that transformers and autograd give, and keeps less for it."""

from typing import Any

import pytest
import torch
from conftest import held_at_most_by
from peft import LoraConfig, inject_adapter_in_model
from test_packed import KIN, SIZES, batch_of, bert, needs_bfloat16, roberta
from torch import Tensor, nn

from tandemqa.encoders.backbone import hidden_states
from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.lean import LeanEncoder, can_be_lean, for_step
from tandemqa.encoders.step import StepEncoder

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def weighted(states: Tensor, batch: TokenBatch) -> Tensor:
    """A function of the states of real tokens that depends on each otherwise."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (states * weights * batch.attention_mask[..., None]).sum()


def by_autograd(model: nn.Module, batches: list[TokenBatch]) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        weighted(hidden_states(model, batch), batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_step(model: nn.Module, batches: list[TokenBatch], dtype: torch.dtype, lean: bool = True) -> dict[str, Tensor]:
    """The same through an encoder of a step, its gradients gathered as `Passes` does it."""
    model.zero_grad()
    encoder = for_step(model, batches, True, dtype)
    assert isinstance(encoder, LeanEncoder) == lean
    total = {
        leaf: torch.zeros(leaf.shape, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in encoder.leaves
    }
    for batch in batches:
        found = torch.autograd.grad(weighted(encoder(batch), batch), encoder.leaves, allow_unused=True)
        for leaf, gradient in zip(encoder.leaves, found, strict=True):
            if gradient is not None:
                total[leaf] += gradient
    encoder.backward(total)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("model", "types"),
    [
        pytest.param(bert(**NO_DROPOUT), True, id="BERT"),
        pytest.param(bert(hidden_act="gelu_new", **NO_DROPOUT), False, id="BERT, tanh"),
        *(pytest.param(roberta(kind, **NO_DROPOUT), False, id=kind) for kind in KIN),
    ],
)
def test_states_and_gradients_are_those_of_autograd(model: Any, types: bool, checkpointing: bool) -> None:
    model = model.double().train()
    model.set_attn_implementation("eager")
    batches = [batch_of([9, 4, 1], types), batch_of([7, 7], types)]
    encoder = for_step(model, batches, False, torch.float64)
    for batch in batches:
        real = batch.attention_mask == 1
        expected = hidden_states(model, batch)
        torch.testing.assert_close(encoder(batch)[real], expected[real], rtol=1e-12, atol=1e-12)
    expected = by_autograd(model, batches)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    found = by_step(model, batches, torch.float64)
    model.activation_checkpointing_disable()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_its_reader_gives_the_same_states_and_those_of_the_weights_as_they_are(dtype: torch.dtype) -> None:
    model, batch = bert(**NO_DROPOUT).train(), batch_of([9, 4, 6])
    real = batch.attention_mask == 1
    for factor in (1, 3):
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight *= factor
            expected = hidden_states(model, batch)[real]
            states = for_step(model, [batch], True, dtype).reader()(batch)
        torch.testing.assert_close(
            states[real].float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
        )


def test_in_float64_it_reads_by_itself() -> None:
    encoder = for_step(bert(**NO_DROPOUT).double(), [batch_of([3])], True, torch.float64)
    assert encoder.reader() is encoder


def test_in_bfloat16_gradients_are_as_near_as_those_of_autocast() -> None:
    model, batches = bert(**NO_DROPOUT).train(), [batch_of([9, 4, 6]), batch_of([8, 8, 7, 5])]
    model.set_attn_implementation("eager")
    exact = by_autograd(model.double(), batches)
    exact = {name: gradient.clone() for name, gradient in exact.items()}
    model.float()
    lean = by_step(model, batches, torch.bfloat16)
    lean = {name: gradient.clone() for name, gradient in lean.items()}
    with torch.autocast("cpu", torch.bfloat16):
        usual = by_autograd(model, batches)

    def error(found: dict[str, Tensor]) -> float:
        return float(sum((found[name] - exact[name]).square().sum() for name in exact).sqrt())

    assert 0 < error(lean) < 1.5 * error(usual)


def test_it_keeps_two_thirds_of_what_autograd_keeps_at_most() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 4}
    model: Any = bert(**SIZES | sizes | NO_DROPOUT).train()
    model.set_attn_implementation("eager")
    batch = batch_of([40] * 8)
    lean = for_step(model, [batch], True, torch.bfloat16)
    plain = StepEncoder(model, [batch], True)

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(batch)

    assert held_at_most_by(lambda: lean(batch)) < 2 / 3 * held_at_most_by(autocast)


def test_what_is_not_known_or_not_learnt_whole_is_left_to_transformers() -> None:
    frozen = bert(**NO_DROPOUT)
    frozen.encoder.layer[0].output.dense.weight.requires_grad_(False)
    assert can_be_lean(bert(**NO_DROPOUT).train())
    assert can_be_lean(bert()), "dropout sleeps in evaluation mode"
    assert not can_be_lean(bert().train())
    assert not can_be_lean(frozen)
    assert not can_be_lean(inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), bert(**NO_DROPOUT)))


def test_what_is_left_to_transformers_gives_the_same_gradients() -> None:
    model, batches = bert(hidden_act="relu", **NO_DROPOUT).double().train(), [batch_of([9, 4, 1]), batch_of([7, 7])]
    expected = {name: gradient.clone() for name, gradient in by_autograd(model, batches).items()}
    found = by_step(model, batches, torch.float64, lean=False)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-12)
