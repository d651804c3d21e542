"""The definition's gradients, by PyTorch's own autograd: what every fused implementation is compared with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Coefficients, Direction, Inputs, Outputs, ppo_kl_gaussian


class Grads(NamedTuple):
    mean: Tensor  # [B, D]
    log_std: Tensor  # the shape of the input
    values: Tensor  # [B]


def gradients(
    loss: Callable[..., Outputs],
    inputs: Inputs,
    coefficients: Coefficients,
    out: tuple[Outputs, Grads] | None,
    **options: Any,
) -> tuple[Outputs, Grads]:
    """Return what `loss` returns, detached, and its gradients by autograd, both written to `out` where it is given."""
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in Grads._fields]
    with torch.enable_grad():
        outputs = loss(inputs._replace(**dict(zip(Grads._fields, leaves, strict=True))), coefficients, **options)
        grads = torch.autograd.grad(outputs.loss, leaves)
    if out is None:
        return Outputs(*(t.detach() for t in outputs)), Grads(*grads)
    for buffer, t in zip((*out[0], *out[1]), (*outputs, *grads), strict=True):
        buffer.copy_(t.detach())
    return out


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    out: tuple[Outputs, Grads] | None = None,
) -> tuple[Outputs, Grads]:
    """Return the outputs, detached, and d loss / d (mean, log_std, values), all written to `out` where it is given."""
    options: dict[str, Any] = {"kl_direction": kl_direction, "normalize_advantage": normalize_advantage}
    return gradients(ppo_kl_gaussian, inputs, coefficients, out, **options)
