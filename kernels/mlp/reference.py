"""Multilayer perceptrons that read the same rows, such as an actor and a critic: the definition.

Between two layers stands an activation; the last layer is linear. PyTorch's autograd gives the gradients.
Test: pytest tests/kernels/test_mlp.py
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["tanh", "relu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


class Layer(NamedTuple):
    weight: Tensor  # [O, I]
    bias: Tensor  # [O]
    weight_grad: Tensor | None  # [O, I], written by `backward`; None where it is never called
    bias_grad: Tensor | None  # [O]


def mlp(x: Tensor, layers: Sequence[Layer], activation: Activation) -> Tensor:
    """Return the output [B, O] for rows x [B, I], differentiable."""
    for number, layer in enumerate(layers):
        x = torch.nn.functional.linear(x, layer.weight, layer.bias)
        if number + 1 < len(layers):
            x = ACTIVATIONS[activation](x)
    return x


class Networks:
    """Several networks on the same rows, forward and backward."""

    def __init__(self, networks: Sequence[Sequence[Layer]], activation: Activation) -> None:
        self.activation = activation
        self.layers = [
            [Layer(layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_(), *layer[2:])
             for layer in layers]
            for layers in networks
        ]  # fmt: skip
        self._outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each network's output [B, O], detached, for rows x [B, I]."""
        with torch.enable_grad():
            self._outputs = [mlp(x, layers, self.activation) for layers in self.layers]
        return [output.detach() for output in self._outputs]

    def backward(self, output_grads: Sequence[Tensor]) -> None:
        """Write the parameters' gradients, given those of the last outputs, [B, O] each."""
        trained = [layer for layers in self.layers for layer in layers]
        grads = torch.autograd.grad(self._outputs, [t for layer in trained for t in layer[:2]], list(output_grads))
        for target, grad in zip([t for layer in trained for t in layer[2:]], grads, strict=True):
            assert target is not None
            target.copy_(grad)
