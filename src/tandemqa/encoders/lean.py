"""BERT and its kin as they are leanest in training on a CPU: a layer is one function with a backward pass of its own.

What a layer keeps for the way back is three fifths of what autograd would, and the way back is its matrix products
with little around them. The weights are converted once a step, for all threads and parts, and gradients are taken of
these copies: `LeanEncoder.backward` hands their sums on to the parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from torch.utils.checkpoint import checkpoint

from tandemqa.encoders.inputs import TokenBatch, first_position
from tandemqa.encoders.packed import GELU, added_mask, by_heads, can_be_packed, packed, together
from tandemqa.encoders.step import Gradients, StepEncoder, WordTable, add_gradient, draws


class Copy:
    """A working copy of parameters, stacked, the first of them times a factor; its gradient is taken in its stead."""

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype, learns: bool, factor: float = 1.0) -> None:
        self.parameters, self.factor = parameters, factor
        first, *others = (parameter.detach() for parameter in parameters)
        # Never the parameters themselves: their own gradients are gathered elsewhere.
        self.leaf = torch.cat([first * factor, *others]).to(dtype).requires_grad_(learns)

    def backward(self, gradients: Gradients) -> None:
        """Hand the copy's gradient on to the parameters."""
        own = torch.split(gradients[self.leaf], [len(parameter) for parameter in self.parameters])
        if self.factor != 1:
            own[0].mul_(self.factor)
        for parameter, gradient in zip(self.parameters, own, strict=True):
            add_gradient(parameter, gradient)


class LeanEncoder:
    """An encoder for the time of one training step, like `StepEncoder`; `dtype` is what it computes in."""

    def __init__(self, model: Any, batches: Sequence[TokenBatch], learns: bool, dtype: torch.dtype) -> None:
        self.model = model
        self.embeddings, self.config = model.embeddings, model.config
        self.dtype = dtype
        self.keeps_layers = not model.is_activation_checkpointing
        self.words = WordTable(model.embeddings.word_embeddings, batches, learns)
        own = self.embeddings
        self.parameters = [
            own.position_embeddings.weight,
            own.token_type_embeddings.weight,
            *own.LayerNorm.parameters(),
        ]
        heads = int(self.config.num_attention_heads)
        self.layers = [_copies(layer, heads, dtype, learns) for layer in model.encoder.layer]
        copies = [copy.leaf for layer in self.layers for copy in layer]
        self.leaves = [*self.parameters, self.words.vectors, *copies] if learns else []

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Last hidden states, shape (N, L, d)."""
        count, length = batch.input_ids.shape
        heads, eps = int(self.config.num_attention_heads), float(self.config.layer_norm_eps)
        mask = added_mask(batch, heads, self.dtype)
        x = self._embed(batch).to(self.dtype).view(count * length, -1)
        for layer in self.layers:
            inputs = (x, mask, count, heads, eps, GELU[self.config.hidden_act], *(copy.leaf for copy in layer))
            if self.keeps_layers:
                x = _Layer.apply(*inputs)  # type: ignore[no-untyped-call]
            else:
                x = checkpoint(_Layer.apply, *inputs, use_reentrant=False, preserve_rng_state=False)
        return x.view(count, length, -1)

    def reader(self) -> Callable[[TokenBatch], Tensor]:
        """What gives the same states, but for their rounding, where no gradient is taken of them."""
        return packed(self.model, self.dtype) if self.dtype in (torch.bfloat16, torch.float32) else self

    def _embed(self, batch: TokenBatch) -> Tensor:
        """What the first layer reads, float32 (N, L, d). Padding stands at the end, so that positions are places."""
        own = self.embeddings
        first = first_position(self.config)
        positions = own.position_embeddings.weight[first : first + batch.input_ids.shape[1]]
        types = own.token_type_embeddings.weight
        with torch.autocast("cpu", enabled=False):
            if batch.type_ids is None:
                typed = types[0]
            else:
                # A product: its gradient is faster than a lookup's.
                typed = nn.functional.one_hot(batch.type_ids, len(types)).to(types.dtype) @ types
            embedded: Tensor = own.LayerNorm(self.words[batch.input_ids] + positions + typed)
        return embedded

    def backward(self, gradients: Gradients) -> None:
        """Add the sums of the leaves' gradients to those of the parameters; there are none where nothing was read."""
        if self.words.vectors not in gradients:
            return
        for parameter in self.parameters:
            add_gradient(parameter, gradients[parameter])
        for layer in self.layers:
            for copy in layer:
                copy.backward(gradients)
        self.words.backward(gradients)


def for_step(
    model: nn.Module, batches: Sequence[TokenBatch], learns: bool, dtype: torch.dtype
) -> StepEncoder | LeanEncoder:
    """An encoder for a step that reads `batches`: lean if it can be."""
    if can_be_lean(model):
        return LeanEncoder(model, batches, learns, dtype)
    return StepEncoder(model, batches, learns)


def can_be_lean(model: Any) -> bool:
    """Whether this is an encoder that `LeanEncoder` computes, as it stands: without dropout, all of it learning."""
    if not can_be_packed(model):
        return False
    parts = (model.embeddings, model.encoder)
    return not draws(model) and all(parameter.requires_grad for part in parts for parameter in part.parameters())


def _copies(layer: Any, heads: int, dtype: torch.dtype, learns: bool) -> list[Copy]:
    """What `_Layer` takes of a layer's parameters, in its order."""
    own, gather, widen, narrow = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    factor = (own.query.weight.shape[0] // heads) ** -0.5

    def linear(module: nn.Linear) -> list[Copy]:
        return [Copy([values], dtype, learns) for values in (module.weight, module.bias)]

    def norm(module: nn.LayerNorm) -> list[Copy]:
        return [Copy([values], values.dtype, learns) for values in (module.weight, module.bias)]

    return [
        Copy([own.query.weight, own.key.weight, own.value.weight], dtype, learns, factor),
        Copy([own.query.bias, own.key.bias, own.value.bias], dtype, learns, factor),
        *linear(gather.dense),
        *norm(gather.LayerNorm),
        *linear(widen.dense),
        *linear(narrow.dense),
        *norm(narrow.LayerNorm),
    ]


class _Layer(torch.autograd.Function):
    """A layer of a transformer encoder with LayerNorm behind each half: states (T, d) from those below, of `count`
    sequences of one length, T = count·L. `mask` (count·heads, 1, L) is added to the scores of attention."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, count: int, heads: int, eps: float, variant: str, *weights: Tensor
    ) -> Tensor:
        (read, read_bias, gather, gather_bias, norm1, norm1_bias, widen, widen_bias, narrow, narrow_bias,
         norm2, norm2_bias) = weights  # fmt: skip
        query, key, value = split = by_heads(linear(x, read, read_bias), 3, count, heads)
        scores = query @ key.mT if mask is None else torch.baddbmm(mask, query, key.mT)
        attention = scores.softmax(-1)
        context = together(attention @ value, count)
        before1 = linear(context, gather, gather_bias).add_(x)
        size = [x.shape[1]]
        y, mean1, deviation1 = torch.native_layer_norm(before1, size, norm1, norm1_bias, eps)
        wide = linear(y, widen, widen_bias)
        before2 = linear(gelu(wide, approximate=variant), narrow, narrow_bias).add_(y)
        above, mean2, deviation2 = torch.native_layer_norm(before2, size, norm2, norm2_bias, eps)
        ctx.save_for_backward(
            x, split, attention, context, before1, mean1, deviation1, y, wide, before2, mean2, deviation2, *weights
        )
        ctx.count, ctx.heads, ctx.variant = count, heads, variant
        return above

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        x, split, attention, context, before1, mean1, deviation1, y, wide, before2, mean2, deviation2, *weights = (
            ctx.saved_tensors
        )
        read, _, gather, _, norm1, norm1_bias, widen, _, narrow, _, *norm2 = weights
        all_three = [True, True, True]
        size = [x.shape[1]]
        outer, *from_norm2 = torch.ops.aten.native_layer_norm_backward(
            above.contiguous(), before2, size, mean2, deviation2, *norm2, all_three
        )
        from_narrow = _of_weights(outer, gelu(wide, approximate=ctx.variant))
        from_wide = torch.ops.aten.gelu_backward(outer @ narrow, wide, approximate=ctx.variant)
        from_widen = _of_weights(from_wide, y)
        inner, *from_norm1 = torch.ops.aten.native_layer_norm_backward(
            torch.addmm(outer, from_wide, widen), before1, size, mean1, deviation1, norm1, norm1_bias, all_three
        )
        from_gather = _of_weights(inner, context)
        query, key, value = split
        from_context = by_heads(inner @ gather, 1, ctx.count, ctx.heads)[0]
        from_scores = torch.ops.aten._softmax_backward_data(from_context @ value.mT, attention, -1, attention.dtype)
        from_split = torch.stack([from_scores @ key, from_scores.mT @ query, attention.mT @ from_context])
        from_read_all = together(from_split.view(3 * ctx.count * ctx.heads, -1, value.shape[-1]), ctx.count, 3)
        below = torch.addmm(inner, from_read_all, read)
        from_read = _of_weights(from_read_all, x)
        return (
            below, None, None, None, None, None, *from_read, *from_gather, *from_norm1, *from_widen, *from_narrow,
            *from_norm2,
        )  # fmt: skip


def _of_weights(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a linear layer's weight and bias."""
    return above.mT @ below, above.sum(0)
