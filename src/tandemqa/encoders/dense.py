"""Linear layers behind the pooling, as sentence-transformers' Dense modules have them."""

from typing import Literal

from torch import Tensor, nn

Activation = Literal["identity", "tanh", "relu", "gelu", "sigmoid"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}


class Dense(nn.Module):
    """`activation(W x + b)`, on vectors of shape (N, in_features)."""

    def __init__(self, linear: nn.Linear, activation: Activation) -> None:
        super().__init__()
        self.linear = linear
        self.name: Activation = activation
        self.activation = ACTIVATIONS[activation]()

    def forward(self, vectors: Tensor) -> Tensor:
        values: Tensor = self.activation(self.linear(vectors))
        return values
