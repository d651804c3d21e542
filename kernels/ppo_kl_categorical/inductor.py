"""The definition, compiled by torch.compile with its inductor backend; forward and backward are one graph each.

Test: pytest tests/kernels/test_inductor.py
"""

from functools import cache
from typing import Any

import torch

from .eager import Grads, gradients
from .reference import Coefficients, Direction, Inputs, Outputs
from .reference import ppo_kl_categorical as definition


@cache
def _compiled() -> Any:
    # shapes are specialised: a training run has one or two
    return torch.compile(definition, dynamic=False)


def ppo_kl_categorical(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
) -> Outputs:
    """Return the loss, which is differentiable, and its statistics; arguments as the definition's."""
    return _compiled()(inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage)


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    out: tuple[Outputs, Grads] | None = None,
) -> tuple[Outputs, Grads]:
    """Return the outputs, detached, and the gradients, all written to `out` where it is given."""
    options: dict[str, Any] = {"kl_direction": kl_direction, "normalize_advantage": normalize_advantage}
    return gradients(_compiled(), inputs, coefficients, out, **options)
