"""The definition's gradients, by PyTorch's own autograd: what every fused implementation is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Coefficients, Direction, Inputs, Outputs, ppo_kl_gaussian


class Grads(NamedTuple):
    mean: Tensor  # [B, D]
    log_std: Tensor  # the shape of the input
    values: Tensor  # [B]


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
) -> tuple[Outputs, Grads]:
    """Return the outputs, detached, and d loss / d (mean, log_std, values)."""
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in Grads._fields]
    with torch.enable_grad():
        outputs = ppo_kl_gaussian(
            inputs._replace(**dict(zip(Grads._fields, leaves, strict=True))),
            coefficients,
            kl_direction=kl_direction,
            normalize_advantage=normalize_advantage,
        )
        grads = torch.autograd.grad(outputs.loss, leaves)
    return Outputs(*(t.detach() for t in outputs)), Grads(*grads)
