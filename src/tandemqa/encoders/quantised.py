"""Matrix products in bytes: activations as unsigned ones, weights as signed ones, sums in int32.

A byte q of channel c stands for the activation (q - zero) · step_c + middle_c. Each channel has a step of its own,
because a few channels reach ten times as far as the rest; `step_c` is multiplied into the weights (SmoothQuant, Xiao
et al., ICML 2023) and `middle_c` goes into the bias, so that the product needs neither. The ranges of channels are
measured once, on texts like those to be encoded.

Processors with AVX512-VNNI sum products of bytes in 32 bits. Others (AVX2) first add two of them in 16 bits, which
hold that much of weights up to 64: there, a weight has seven bits.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tandemqa.encoders.inputs import TokenBatch

Ranges = dict[str, Tensor]
"""The smallest and the largest value of every channel that a product reads, float32 of shape (2, d), under the layer
and the product's name: "0.read"."""

PRODUCTS = ("read", "gather", "widen", "narrow")
# SmoothQuant's alpha: 1 gives every channel its whole byte, 0 gives it to the weights.
ALPHA = 0.8
# The byte that stands for the middle of a channel.
ZERO = 128
# The smallest value of GELU.
GELU_LOW = -0.17
# Neurons that may be added to a layer, as a share of those it has.
ADDED_SHARE = 1 / 96
# oneDNN's products are fastest where rows come in sixteens.
BLOCK = 16
TINY = 1e-6
# The largest byte of a weight, with VNNI and without: 2 · 255 · 64 < 2^15.
MOST_IN_32_BITS, MOST_IN_16_BITS = 127, 64


def has_int8() -> bool:
    """Whether the processor multiplies bytes faster than floats: x86 from AVX2 on."""
    return bool(torch.cpu._is_avx2_supported())


def has_vnni() -> bool:
    """Whether the processor sums products of bytes in 32 bits (AVX512-VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


def most_in_weights() -> int:
    """The largest byte of a weight that this processor multiplies exactly."""
    return MOST_IN_32_BITS if has_vnni() else MOST_IN_16_BITS


def in_bytes(weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) as signed bytes up to `most`, and the scale of each row, (out,)."""
    scale = weight.abs().amax(1).clamp_min(TINY) / most
    return (weight / scale[:, None]).round().to(torch.int8), scale


def smoothing(weight: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """The step and the middle of each channel that a product (out, in) reads, both (in,), for bytes around ZERO;
    `ranges` are the channels', (2, in)."""
    middle, half = (ranges[0] + ranges[1]) / 2, ((ranges[1] - ranges[0]) / 2).clamp_min(TINY)
    factor = half**ALPHA / weight.abs().amax(0).clamp_min(TINY) ** (1 - ALPHA)
    return factor * (half / factor).max() / (255 - ZERO), middle


class Int8Linear:
    """`x W' + b`, for x as bytes; `step` and `middle` are those of the module's docstring, of shape (d,)."""

    def __init__(self, weight: Tensor, bias: Tensor, step: Tensor, middle: Tensor, zero: int) -> None:
        self.zero = zero
        self.bias = bias + weight @ middle
        rounded, self.scale = in_bytes(weight * step, most_in_weights())
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int64)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The product in `dtype`, of bytes of shape (T, in)."""
        return self._product(x, 1.0, 0, dtype, "none", "")

    def gelu(self, x: Tensor, variant: str, step: float, zero: int) -> Tensor:
        """GELU of the product, as bytes with this step and zero."""
        return self._product(x, step, zero, torch.uint8, "gelu", variant)

    def _product(self, x: Tensor, step: float, zero: int, dtype: torch.dtype, post: str, variant: str) -> Tensor:
        weights = self.weight, self.scale, self.weight_zero, self.bias
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, self.zero, *weights, step, zero, dtype, post, [], variant
        )
        return y


class SmoothedLinear:
    """`x W' + b` for floats x, which it turns into bytes by the ranges of its channels, float32 of shape (2, d)."""

    def __init__(self, weight: Tensor, bias: Tensor, ranges: Tensor) -> None:
        step, middle = smoothing(weight, ranges)
        self.times = 1 / step
        # The half is for rounding: what follows cuts fractions off.
        self.plus = ZERO + 0.5 - middle / step
        self.linear = Int8Linear(weight, bias, step, middle, ZERO)

    def bytes_of(self, x: Tensor) -> Tensor:
        # By way of int16, because torch has no fast conversion of floats to unsigned bytes.
        return torch.addcmul(self.plus, x.float(), self.times).clamp_(0, 255).to(torch.int16).to(torch.uint8)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear(self.bytes_of(x), dtype)


def ranges_fingerprint(ranges: Ranges) -> str:
    """Sixteen hexadecimal digits that identify measured ranges."""
    digest = hashlib.sha256()
    for name in sorted(ranges):
        digest.update(name.encode() + ranges[name].numpy().tobytes())
    return digest.hexdigest()[:16]


class Int8Feedforward:
    """`GELU(x W1' + b1) W2' + b2`; between the products are bytes with one step for all neurons.

    That step would be wasted on the few neurons that reach far. Of a neuron that reaches beyond `most`, GELU is cut
    off there, and what is above comes from a second one whose bias is lower by `most` (a third, ...), with the same
    outgoing weights: for values well above it, GELU(x) = most + GELU(x - most). Nearer to it, each added neuron is
    off by at most 0.17.
    """

    def __init__(self, widen: nn.Linear, narrow: nn.Linear, reads: Tensor, wide: Tensor, variant: str) -> None:
        self.variant = variant
        weight, bias, out, most = split_neurons(widen, narrow, wide)
        self.step, self.zero = feedforward_bytes(most)
        self.widen = SmoothedLinear(weight, bias, reads)
        step = torch.full((len(weight),), self.step)
        self.narrow = Int8Linear(out, narrow.bias, step, torch.zeros_like(step), self.zero)

    def __call__(self, x: Tensor) -> Tensor:
        wide = self.widen.linear.gelu(self.widen.bytes_of(x), self.variant, self.step, self.zero)
        return self.narrow(wide, torch.float32)


def split_neurons(widen: nn.Linear, narrow: nn.Linear, wide: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """The neurons as `Int8Feedforward` splits them, by what GELU's ranges (2, in) are: the weight and bias of the
    product before it, the weight of the one behind it, and `most`, where each is cut off."""
    most, copies = _split(wide[1])
    neurons = torch.arange(len(wide[1])).repeat_interleave(copies)
    first = torch.cumsum(copies, 0) - copies
    lower = (torch.arange(len(neurons)) - first[neurons]) * most
    weight, bias, out = widen.weight[neurons], widen.bias[neurons] - lower, narrow.weight[:, neurons]
    blank = -len(neurons) % BLOCK
    pads = (weight, (0, 0, 0, blank)), (bias, (0, blank)), (out, (0, blank))
    weight, bias, out = (nn.functional.pad(values, pad) for values, pad in pads)
    return weight, bias, out, most


def feedforward_bytes(most: float) -> tuple[float, int]:
    """The step and the zero of bytes that reach from GELU's smallest value to `most`."""
    step = (most - GELU_LOW) / 255
    return step, round(-GELU_LOW / step)


def _split(high: Tensor) -> tuple[float, Tensor]:
    """The smallest reach that few added neurons allow, and how many each neuron becomes, int64 of shape (d,)."""
    allowed = len(high) * (1 + ADDED_SHARE)
    for most in torch.linspace(1.0, max(float(high.max()), 1.0), 256).tolist():
        copies = (high / most).ceil().clamp_min(1).long()
        if copies.sum() <= allowed:
            break
    return most, copies


@torch.inference_mode()
def measure_ranges(model: Any, batches: Iterable[TokenBatch], states: Callable[[Any, TokenBatch], object]) -> Ranges:
    """The ranges of a BERT's channels over the real tokens of `batches`; `states` computes a batch in float32."""
    ranges: Ranges = {}
    real = torch.empty(0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].reshape(*real.shape, -1)[real]
            found = torch.stack([values.amin(0), values.amax(0)])
            known = ranges.get(name, found)
            ranges[name] = torch.stack([torch.minimum(known[0], found[0]), torch.maximum(known[1], found[1])])

        return look

    with ExitStack() as stack:
        for name, linear in _products(model):
            stack.callback(linear.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            real = batch.attention_mask == 1
            states(model, batch)
    return ranges


def _products(model: Any) -> Iterator[tuple[str, nn.Module]]:
    for number, layer in enumerate(model.encoder.layer):
        attention = layer.attention
        # Query, key and value read the same.
        linears = attention.self.query, attention.output.dense, layer.intermediate.dense, layer.output.dense
        yield from ((f"{number}.{name}", linear) for name, linear in zip(PRODUCTS, linears, strict=True))
