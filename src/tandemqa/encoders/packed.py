"""The encoder as it is fastest on a CPU without gradients: BERT and its kin, written for oneDNN.

The weights are laid out once as the matrix products read them, query, key and value are one product, GELU and the
residual are part of the product before them. In bfloat16, attention is two batched products around a softmax, which
at the lengths of passages takes half the time of the fused kernel; in float32 that kernel is faster. In int8, all
products but those of attention are in bytes (`quantised.py`).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel

from tandemqa.encoders.inputs import TokenBatch
from tandemqa.encoders.quantised import PRODUCTS, Int8Feedforward, Ranges, SmoothedLinear

# How oneDNN names the variants of GELU.
GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

# A score that leaves no weight to padding.
NEVER = -1e9
# Sums of a softmax's powers within which nothing of weight has been lost to overflow or underflow.
SAFE = (2.0**-60, 2.0**100)

Attention = Callable[[Tensor, int, int, Tensor | None], Tensor]
"""Contexts (T, d) of queries, keys and values (T, 3d), of so many sequences of one length and so many heads. The
weight of a value is two to the power of its score. A mask, (N·heads, 1, L), is added to the scores; all of one dtype.
"""


class PackedLinear:
    """`x W' + b` for x of shape (T, in), with weights in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
        self.bias = bias.detach().to(dtype, copy=True)

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
        attention = layer.attention
        read = _read_by_attention(attention.self, heads)
        self.read, self.attend = PackedLinear(*read, dtype), attention_for(*read, dtype)
        self.gather = PackedLinear(attention.output.dense.weight, attention.output.dense.bias, dtype)
        self.widen = PackedLinear(layer.intermediate.dense.weight, layer.intermediate.dense.bias, dtype)
        self.narrow = PackedLinear(layer.output.dense.weight, layer.output.dense.bias, dtype)
        self.norms = [_norm(attention.output.LayerNorm, dtype), _norm(layer.output.LayerNorm, dtype)]

    def __call__(self, x: Tensor, count: int, mask: Tensor | None) -> Tensor:
        """States (T, d) of `count` sequences of one length, T = N·L, from those below; `mask` is added to the scores,
        (N·heads, 1, L)."""
        context = self.attend(self.read(x), count, self.heads, mask)
        x = layer_norm(self.gather.plus(context, x), *self.norms[0])
        above: Tensor = layer_norm(self.narrow.plus(self.widen.gelu(x, self.variant), x), *self.norms[1])
        return above


class Int8Layer:
    """The same layer with products in bytes, for float32 states; `dtype` is attention's."""

    def __init__(self, layer: Any, heads: int, variant: str, dtype: torch.dtype, ranges: Ranges) -> None:
        self.heads, self.dtype = heads, dtype
        attention, out = layer.attention, layer.attention.output.dense
        read = _read_by_attention(attention.self, heads)
        self.read, self.attend = SmoothedLinear(*read, ranges["read"]), attention_for(*read, dtype)
        self.gather = SmoothedLinear(out.weight, out.bias, ranges["gather"])
        self.feedforward = Int8Feedforward(
            layer.intermediate.dense, layer.output.dense, ranges["widen"], ranges["narrow"], variant
        )
        self.norms = [_norm(norm, torch.float32) for norm in (attention.output.LayerNorm, layer.output.LayerNorm)]

    def __call__(self, x: Tensor, count: int, mask: Tensor | None) -> Tensor:
        context = self.attend(self.read(x, self.dtype), count, self.heads, mask)
        x = layer_norm(self.gather(context, torch.float32).add_(x), *self.norms[0])
        above: Tensor = layer_norm(self.feedforward(x).add_(x), *self.norms[1])
        return above


def _read_by_attention(own: Any, heads: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of query, key and value as one; the scores' factor, for powers of two, in the query's."""
    factor = (own.query.weight.shape[0] // heads) ** -0.5 * math.log2(math.e)
    weight = torch.cat([own.query.weight * factor, own.key.weight, own.value.weight])
    return weight, torch.cat([own.query.bias * factor, own.key.bias, own.value.bias])


def attention_for(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Attention:
    """The faster form of attention in a dtype, for queries, keys and values that this weight and bias give.

    The fused kernel makes finite contexts of scores that are not, and a broken model would go unnoticed.
    """
    if dtype == torch.float32 and weight.isfinite().all() and bias.isfinite().all():
        return fused
    return unfused


def fused(read: Tensor, count: int, heads: int, mask: Tensor | None) -> Tensor:
    """`Attention` in one kernel."""
    query, key, value = read.view(count, -1, 3, heads, read.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)
    added = None if mask is None else mask.view(count, heads, 1, -1)
    context = scaled_dot_product_attention(query, key, value, attn_mask=added, scale=math.log(2))
    return context.transpose(1, 2).reshape(len(read), -1)


def unfused(read: Tensor, count: int, heads: int, mask: Tensor | None) -> Tensor:
    """`Attention` as two batched products.

    The softmax between them does not look for each row's largest score first, which takes half its time; where a sum
    shows that it should have, it is done again.
    """
    query, key, value = by_heads(read, 3, count, heads)
    weights = _scores(query, key, mask).exp2_()
    total = weights.sum(-1, keepdim=True)
    least, most = total.aminmax()
    if SAFE[0] < least and most < SAFE[1]:
        context = (weights @ value).div_(total)
    else:
        context = (_scores(query, key, mask) * math.log(2)).softmax(-1) @ value
    return together(context, count)


def by_heads(x: Tensor, parts: int, count: int, heads: int) -> Tensor:
    """(parts, count·heads, L, d/heads) from (count·L, parts·d), of `count` sequences of one length."""
    size = x.shape[1] // parts // heads
    split = x.view(count, -1, parts, heads, size).permute(2, 0, 3, 1, 4)
    return split.reshape(parts, count * heads, -1, size)


def together(x: Tensor, count: int, parts: int = 1) -> Tensor:
    """The reverse of `by_heads`, of (parts·count·heads, L, d/heads)."""
    length, size = x.shape[1:]
    split = x.view(parts, count, -1, length, size).permute(1, 3, 0, 2, 4)
    return split.reshape(count * length, -1)


def added_mask(batch: TokenBatch, heads: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to attention's scores, (N·heads, 1, L), so that none goes to padding; None where none is."""
    if bool(batch.attention_mask.all()):
        return None
    count, length = batch.input_ids.shape
    added = (batch.attention_mask == 0).to(dtype) * NEVER
    return added[:, None, None].expand(count, heads, 1, length).reshape(-1, 1, length)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    return query @ key.mT if mask is None else torch.baddbmm(mask, query, key.mT)


class PackedEncoder:
    """An encoder's weights as they were when it was packed, but for the embeddings, which it shares; no gradient."""

    def __init__(self, model: Any, dtype: torch.dtype, ranges: Ranges | None = None) -> None:
        """`dtype` is what it computes in; with `ranges`, attention alone does, and the other products are in int8."""
        self.dtype, self.ranges = dtype, ranges
        self.embeddings = model.embeddings
        self.heads = int(model.config.num_attention_heads)
        self.layers: list[PackedLayer | Int8Layer] = []
        variant = GELU[model.config.hidden_act]
        with torch.no_grad():
            for number, layer in enumerate(model.encoder.layer):
                if ranges is None:
                    self.layers.append(PackedLayer(layer, self.heads, variant, dtype))
                else:
                    own = {name: ranges[f"{number}.{name}"] for name in PRODUCTS}
                    self.layers.append(Int8Layer(layer, self.heads, variant, dtype, own))

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Last hidden states of a padded batch, shape (N, L, d)."""
        count, length = batch.input_ids.shape
        mask = added_mask(batch, self.heads, self.dtype)
        x: Tensor = self.embeddings(input_ids=batch.input_ids, token_type_ids=batch.type_ids)
        x = x.to(self.dtype if self.ranges is None else torch.float32).view(count * length, -1)
        for layer in self.layers:
            x = layer(x, count, mask)
        return x.view(count, length, -1)


# Of each model: the state of its weights, and what that was packed to by dtype and ranges.
_packed: "WeakKeyDictionary[nn.Module, tuple[object, dict[tuple[torch.dtype, int], PackedEncoder]]]"
_packed = WeakKeyDictionary()


def packed(model: nn.Module, dtype: torch.dtype, ranges: Ranges | None = None) -> PackedEncoder:
    """The model packed for a dtype and ranges, anew only if its weights have changed since the last time."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    # A fused optimiser does not count its changes as versions, but it changes every matrix everywhere.
    values = torch.stack([parameter.reshape(-1)[-1] for parameter in parameters]).tolist()
    state = values, [(parameter.data_ptr(), parameter._version) for parameter in parameters]
    known = _packed.get(model)
    if known is None or known[0] != state:
        known = _packed[model] = state, {}  # nothing of the old weights is kept while the new are packed
    # The packed encoder keeps its ranges, so that no others can have their number.
    form = dtype, id(ranges)
    if form not in known[1]:
        known[1][form] = PackedEncoder(model, dtype, ranges)
    return known[1][form]


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
    weight, bias = (values.detach().to(dtype, copy=True) for values in (norm.weight, norm.bias))
    return norm.normalized_shape, weight, bias, norm.eps
