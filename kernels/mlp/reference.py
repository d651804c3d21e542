"""Multilayer perceptrons that read the same rows, such as an actor and a critic: the definition.

Between two layers stands an activation; the last layer is linear. PyTorch's autograd gives the gradients.
Test: pytest tests/kernels/test_mlp.py
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
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


class GaussianColumns(NamedTuple):
    """Where a rollout keeps what an actor with a diagonal Gaussian sees and says; T steps of N envs."""

    observations: Tensor  # [T, N, I]
    mean: Tensor  # [T, N, D]
    log_std: Tensor  # [T, N, D]
    actions: Tensor  # [T, N, D]
    values: Tensor  # [T, N]
    log_prob: Tensor  # [T, N]


class CategoricalColumns(NamedTuple):
    """The same of an actor that chooses among A actions."""

    observations: Tensor  # [T, N, I]
    logits: Tensor  # [T, N, A]
    actions: Tensor  # [T, N] int64
    values: Tensor  # [T, N]
    log_prob: Tensor  # [T, N]


class GaussianActor:
    """Acts for some envs at a step whose observations are stored, and stores what it says there.

    Args:
        networks: the actor's mean and the critic.
        columns: of the rollout.
        log_std: [D], of all states.
    """

    def __init__(self, networks: Networks, columns: GaussianColumns, log_std: Tensor) -> None:
        self.networks, self.columns, self.log_std = networks, columns, log_std.detach()

    def act(self, t: int, rows: slice, generator: torch.Generator | None = None) -> None:
        """Act for the envs `rows` at step t; None: noise of torch's own generator."""
        c = self.columns
        mean, values = self.networks.forward(c.observations[t, rows])
        noise = torch.empty_like(mean).normal_(generator=generator)
        log_prob = (-0.5 * noise.square() - self.log_std - HALF_LOG_TWO_PI).sum(dim=-1)
        said = (mean, self.log_std, mean + self.log_std.exp() * noise, values.flatten(), log_prob)
        for column, answer in zip(c[1:], said, strict=True):
            column[t, rows] = answer


class CategoricalActor:
    """The same for a categorical policy.

    Args:
        networks: the actor's logits and the critic.
        columns: of the rollout.
    """

    def __init__(self, networks: Networks, columns: CategoricalColumns) -> None:
        self.networks, self.columns = networks, columns

    def act(self, t: int, rows: slice, generator: torch.Generator | None = None) -> None:
        """Act for the envs `rows` at step t; None: noise of torch's own generator.

        Raises ValueError where a row's logits are no distribution.
        """
        c = self.columns
        logits, values = self.networks.forward(c.observations[t, rows])
        c.logits[t, rows] = logits
        log_probs = logits.log_softmax(dim=-1)
        bad = log_probs.isnan().any(dim=-1)
        if bad.any():
            raise ValueError(no_distribution(int(bad.int().argmax())))
        noise = torch.empty_like(logits).exponential_(generator=generator)
        actions = (log_probs.exp() / noise).argmax(dim=-1)
        said = (actions, values.flatten(), log_probs.gather(1, actions[:, None]).squeeze(1))
        for column, answer in zip(c[2:], said, strict=True):
            column[t, rows] = answer


def no_distribution(row: int) -> str:
    """Return what is wrong with a policy that cannot choose in that row."""
    return f"logits: NaN, +inf or nothing but -inf in row {row}; look at the policy's weights"
