"""The packed encoder gives the states of the encoder that it was made of, and notices when that changes."""

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from tandemqa.encoders.backbone import for_inference, has_bfloat16, hidden_states
from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.packed import PackedEncoder, can_be_packed, packed
from tandemqa.encoders.quantised import has_int8, measure_ranges

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(CPU), reason="this processor has no AVX512-BF16")

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "initializer_range": 0.3,
}

KIN = {
    "roberta": (RobertaModel, RobertaConfig),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig),
    "camembert": (CamembertModel, CamembertConfig),
}


def bert(**settings: Any) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES | settings)).eval()
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def roberta(kind: str, **settings: Any) -> Any:
    """An encoder of RoBERTa's kind: positions counted from behind the padding's number, one type of token."""
    make, config = KIN[kind]
    torch.manual_seed(0)
    model = make(config(**SIZES, type_vocab_size=1, **settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch_of(lengths: list[int], types: bool = True) -> TokenBatch:
    ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    segments = (torch.arange(max(lengths))[None] >= 3).long() * mask
    return TokenBatch(torch.where(mask == 1, ids, 1), mask, segments if types else None)


@pytest.mark.parametrize("lengths", [[7, 7], [9, 4, 1], [1]])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_states_of_real_tokens_are_those_of_transformers(lengths: list[int], act: str) -> None:
    model, batch = bert(hidden_act=act), batch_of(lengths)
    expected, found = hidden_states(model, batch), packed(model, torch.float32)(batch)
    real = batch.attention_mask == 1
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
@torch.no_grad()
def test_an_encoder_that_counts_positions_its_own_way_is_computed_its_own_way(kind: str) -> None:
    model, batch = roberta(kind), batch_of([9, 4, 1], types=False)
    assert can_be_packed(model) and isinstance(for_inference(model, "fp32"), PackedEncoder)
    real = batch.attention_mask == 1
    expected, found = hidden_states(model, batch), packed(model, torch.float32)(batch)
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=2e-5)


@needs_bfloat16
@torch.no_grad()
def test_in_bfloat16_states_differ_by_its_rounding_alone() -> None:
    model, batch = bert(), batch_of([9, 4, 6])
    real = batch.attention_mask == 1
    expected = hidden_states(model.double(), batch)[real]
    found = packed(model.float(), torch.bfloat16)(batch)[real].double()
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999


def test_a_step_of_the_optimiser_is_noticed() -> None:
    model, batch = bert(), batch_of([5, 2])
    before = packed(model, torch.float32)
    assert packed(model, torch.float32) is before
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    hidden_states(model, batch).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        expected = hidden_states(model, batch)
        after = packed(model, torch.float32)
        assert after is not before
        torch.testing.assert_close(after(batch)[0], expected[0], atol=2e-5, rtol=2e-5)


def test_each_precision_is_packed_once_and_none_of_them_outlives_its_weights() -> None:
    model = bert()
    ranges = measure_ranges(model, [batch_of([9, 4])], hidden_states)
    forms: list[tuple[torch.dtype, Any]] = [(torch.float32, None)]
    if has_bfloat16(CPU):
        forms += [(torch.bfloat16, None)]
    if has_int8():
        forms += [(torch.float32, ranges), (torch.float32, dict(ranges))]
    once = [packed(model, *form) for form in forms]
    assert len(set(map(id, once))) == len(forms)
    assert all(each.dtype == dtype and each.ranges is own for each, (dtype, own) in zip(once, forms, strict=True))
    again = [packed(model, *form) for form in forms]
    assert all(new is old for new, old in zip(again, once, strict=True))
    left = [weakref.ref(each) for each in once]
    del once, again
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    packed(model, torch.float32)
    gc.collect()
    assert all(each() is None for each in left)


@pytest.mark.parametrize("weight", ["query.weight", "key.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_do_not_hide(weight: str, value: float) -> None:
    model = bert()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.get_parameter(weight).view(-1)[3] = value
        assert not packed(model, torch.float32)(batch_of([9])).isfinite().any()


def test_loaded_weights_are_noticed() -> None:
    model, batch = bert(), batch_of([5])
    before = packed(model, torch.float32)(batch)
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    with torch.no_grad():
        found = packed(model, torch.float32)(batch)
        assert (found - before).abs().max() > 0.01
        torch.testing.assert_close(found, hidden_states(model, batch), atol=2e-5, rtol=2e-5)


def test_what_is_not_known_is_left_to_transformers() -> None:
    distilled = DistilBertModel(DistilBertConfig(vocab_size=50, dim=24, n_layers=1, n_heads=3, hidden_dim=40))
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), bert())
    assert can_be_packed(bert())
    assert not can_be_packed(bert(is_decoder=True))
    assert not can_be_packed(bert(hidden_act="relu"))
    assert not can_be_packed(adapted)
    assert not can_be_packed(distilled)
    assert not isinstance(for_inference(adapted, "fp32"), PackedEncoder)
