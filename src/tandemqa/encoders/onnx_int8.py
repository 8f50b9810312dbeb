"""BERT and its kin in bytes as ONNX: the arithmetic of `quantised.py` in standard operators.

A product is QuantizeLinear, DequantizeLinear and MatMul with weights that are dequantised as well, which runtimes
join to one product of bytes. What a LayerNorm hands to a product is normalised a second time, with the middle and the
step of every channel in its parameters, and those of a context are in the weights of the values: neither takes a pass
of its own.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from tandemqa.encoders.packed import GELU, NEVER
from tandemqa.encoders.quantised import (
    MOST_IN_32_BITS,
    PRODUCTS,
    ZERO,
    Ranges,
    feedforward_bytes,
    in_bytes,
    smoothing,
    split_neurons,
)


class Int8Graph(nn.Module):
    """An encoder with products in bytes, to be exported: its operators compute nothing in torch.

    ranges: of the encoder's activations, as `measure_ranges` gives them.
    """

    def __init__(self, model: Any, ranges: Ranges) -> None:
        super().__init__()
        self.embeddings = copy.deepcopy(model.embeddings)
        norm, self.embeddings.LayerNorm = self.embeddings.LayerNorm, nn.Identity()
        layers = []
        for number, layer in enumerate(model.encoder.layer):
            own = {name: ranges[f"{number}.{name}"] for name in PRODUCTS}
            layers.append(Int8Layer(norm, layer, model.config, own))
            norm = layer.output.LayerNorm
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Last hidden states, shape (N, L, d)."""
        mask = (1 - attention_mask)[:, None, None].float() * NEVER
        x = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        for layer in self.layers:
            x = layer(x, mask)
        states: Tensor = self.norm(x)
        return states


class Int8Layer(nn.Module):
    """One layer, from and to sums (N, L, d) before their LayerNorm; `norm` is that of the sums it is given."""

    def __init__(self, norm: nn.LayerNorm, layer: Any, config: Any, ranges: Ranges) -> None:
        super().__init__()
        own, gather = layer.attention.self, layer.attention.output.dense
        self.heads, self.variant = int(config.num_attention_heads), GELU[config.hidden_act]
        self.norms = nn.ModuleList([norm, layer.attention.output.LayerNorm])
        step, middle = smoothing(gather.weight, ranges["gather"])
        self.gather = Product(gather.weight * step, gather.bias + gather.weight @ middle, 1.0, ZERO)
        # Attention's weights sum to one: what is subtracted from all values is subtracted from the context.
        factor = (own.query.out_features // self.heads) ** -0.5
        weights = own.query.weight * factor, own.key.weight, own.value.weight / step[:, None]
        biases = own.query.bias * factor, own.key.bias, (own.value.bias - middle) / step
        reads = smoothing(torch.cat([*weights[:2], own.value.weight]), ranges["read"])
        self.read_norm, self.read = _behind(norm, torch.cat(weights), torch.cat(biases), *reads)
        weight, bias, out, most = split_neurons(layer.intermediate.dense, layer.output.dense, ranges["narrow"])
        reads = smoothing(weight, ranges["widen"])
        self.widen_norm, self.widen = _behind(layer.attention.output.LayerNorm, weight, bias, *reads)
        self.narrow = Product(out, layer.output.dense.bias, *feedforward_bytes(most))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        below = self.norms[0](x)
        read = self.read(self.read_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (read[0] @ read[1].mT + mask).softmax(-1)
        x = self.gather((weights @ read[2]).transpose(1, 2).flatten(2)) + below
        wide = gelu(self.widen(self.widen_norm(x)), approximate=self.variant)
        above: Tensor = self.narrow(wide) + self.norms[1](x)
        return above


class Product(nn.Module):
    """`x W' + b`, of x rounded to the bytes q that stand for (q - zero) · step, and W to bytes with a scale a row."""

    def __init__(self, weight: Tensor, bias: Tensor, step: float, zero: int) -> None:
        super().__init__()
        rounded, scale = in_bytes(weight.detach(), MOST_IN_32_BITS)
        self.bias = nn.Buffer(bias.detach())
        self.weight, self.scale = nn.Buffer(rounded.T.contiguous()), nn.Buffer(scale)
        self.weight_zero = nn.Buffer(torch.zeros(len(scale), dtype=torch.int8))
        self.step, self.zero = nn.Buffer(torch.tensor(step)), nn.Buffer(torch.tensor(zero, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.onnx.ops.symbolic("QuantizeLinear", (x, self.step, self.zero), dtype=torch.uint8, shape=x.shape)
        x, weight = (
            torch.onnx.ops.symbolic(
                "DequantizeLinear", inputs, {"axis": 1}, dtype=torch.float32, shape=inputs[0].shape
            )
            for inputs in ((q, self.step, self.zero), (self.weight, self.scale, self.weight_zero))
        )
        return x @ weight + self.bias


class Normalised(nn.Module):
    """A LayerNorm of x whose channels are moved by `middle` and divided by `step`."""

    def __init__(self, norm: nn.LayerNorm, step: Tensor, middle: Tensor) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = (
            nn.Buffer(norm.weight.detach() / step),
            nn.Buffer((norm.bias.detach() - middle) / step),
        )

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def _behind(
    norm: nn.LayerNorm, weight: Tensor, bias: Tensor, step: Tensor, middle: Tensor
) -> tuple[Normalised, Product]:
    """A product that reads a LayerNorm, each channel of which has a step and a middle, and what it reads."""
    return Normalised(norm, step, middle), Product(weight * step, bias + weight @ middle, 1.0, ZERO)
