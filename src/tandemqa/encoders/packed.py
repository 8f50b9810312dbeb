"""The encoder as it is fastest on a CPU without gradients: BERT and its kin, written for oneDNN.

The weights are laid out once as the matrix products read them, query, key and value are one product, GELU and the
residual are part of the product before them, and attention is two batched products around a softmax, which at the
lengths of passages takes half the time of the fused kernel.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel

from tandemqa.encoders.inputs import TokenBatch

# How oneDNN names the variants of GELU.
GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

# A score that leaves no weight to padding.
NEVER = -1e9


class PackedLinear:
    """`x W' + b` for x of shape (T, in), with weights in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
        self.bias = bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def gelu(self, x: Tensor, variant: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], variant)
        return y

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return y


class PackedLayer:
    """One layer of a transformer encoder with LayerNorm behind each half (BERT's)."""

    def __init__(self, layer: Any, heads: int, variant: str, dtype: torch.dtype) -> None:
        self.heads, self.variant = heads, variant
        attention, own = layer.attention, layer.attention.self
        # The scores' factor is part of the query's weights.
        factor = (own.query.weight.shape[0] // heads) ** -0.5
        weight = torch.cat([own.query.weight * factor, own.key.weight, own.value.weight])
        bias = torch.cat([own.query.bias * factor, own.key.bias, own.value.bias])
        self.read = PackedLinear(weight, bias, dtype)
        self.gather = PackedLinear(attention.output.dense.weight, attention.output.dense.bias, dtype)
        self.widen = PackedLinear(layer.intermediate.dense.weight, layer.intermediate.dense.bias, dtype)
        self.narrow = PackedLinear(layer.output.dense.weight, layer.output.dense.bias, dtype)
        self.norms = [_norm(attention.output.LayerNorm, dtype), _norm(layer.output.LayerNorm, dtype)]

    def __call__(self, x: Tensor, count: int, mask: Tensor | None) -> Tensor:
        """States (T, d) of `count` sequences of one length, T = N·L, from those below; `mask` is added to the scores,
        (N·heads, 1, L)."""
        context = self._attend(self.read(x), count, mask)
        x = layer_norm(self.gather.plus(context, x), *self.norms[0])
        above: Tensor = layer_norm(self.narrow.plus(self.widen.gelu(x, self.variant), x), *self.norms[1])
        return above

    def _attend(self, read: Tensor, count: int, mask: Tensor | None) -> Tensor:
        tokens, size = read.shape[0], read.shape[1] // 3
        split = read.view(count, tokens // count, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.reshape(3, count * self.heads, tokens // count, size // self.heads)
        scores = query @ key.mT if mask is None else torch.baddbmm(mask, query, key.mT)
        context: Tensor = scores.softmax(-1) @ value
        return context.view(count, self.heads, tokens // count, -1).transpose(1, 2).reshape(tokens, size)


class PackedEncoder:
    """An encoder's weights as they were when it was packed; what it computes has no gradient."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.embeddings = model.embeddings
        self.heads = int(model.config.num_attention_heads)
        variant = GELU[model.config.hidden_act]
        with torch.no_grad():
            self.layers = [PackedLayer(layer, self.heads, variant, dtype) for layer in model.encoder.layer]

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Last hidden states of a padded batch, shape (N, L, d)."""
        count, length = batch.input_ids.shape
        mask = None
        if not bool(batch.attention_mask.all()):
            added = (batch.attention_mask == 0).to(self.dtype) * NEVER
            mask = added[:, None, None].expand(count, self.heads, 1, length).reshape(-1, 1, length)
        x: Tensor = self.embeddings(input_ids=batch.input_ids, token_type_ids=batch.type_ids)
        x = x.to(self.dtype).view(count * length, -1)
        for layer in self.layers:
            x = layer(x, count, mask)
        return x.view(count, length, -1)


_packed: "WeakKeyDictionary[nn.Module, tuple[object, PackedEncoder]]" = WeakKeyDictionary()


def packed(model: nn.Module, dtype: torch.dtype) -> PackedEncoder:
    """The model packed, anew only if its weights have changed since the last time."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    # A fused optimiser does not count its changes as versions, but it changes every matrix everywhere.
    values = torch.stack([parameter.view(-1)[-1] for parameter in parameters]).tolist()
    state = dtype, values, [(parameter.data_ptr(), parameter._version) for parameter in parameters]
    known = _packed.get(model)
    if known is None or known[0] != state:
        known = _packed[model] = state, PackedEncoder(model, dtype)
    return known[1]


def can_be_packed(model: nn.Module) -> bool:
    """Whether this is an encoder, as it was published, that `PackedEncoder` computes."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not (on_cpu and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if type(model) not in (BertModel, RobertaModel, XLMRobertaModel, CamembertModel):
        return False
    config: Any = model.config
    usual = config.hidden_act in GELU and not config.is_decoder
    # An adapter around a layer would be left out.
    return usual and all(type(layer) is nn.Linear for layer in _linears(model))


def _linears(model: Any) -> Iterator[nn.Module]:
    for layer in model.encoder.layer:
        own = layer.attention.self
        yield from (own.query, own.key, own.value)
        yield from (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, float]:
    return norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps
