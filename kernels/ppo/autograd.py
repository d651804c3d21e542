"""The autograd entry of the fused losses: gradients are ready after the forward pass; backward scales them.

Test: pytest tests/kernels/test_autograd.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


class _Scaled(Function):
    """The loss as a function of what it was differentiated by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Sequence[Tensor], *differentiated: Tensor) -> Tensor:
        del differentiated  # named so that autograd links them to the loss
        ctx.save_for_backward(*grads)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # a graph of the gradients is wanted: they would be constants of it, which PyTorch's wrapper refuses
        return _scaled_once(ctx, upstream) if torch.is_grad_enabled() else _scaled(ctx, upstream)


def _scaled(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grads = ctx.saved_tensors
    # the rule; to look at the number costs nothing on a CPU, to multiply by it a pass over memory
    if upstream.is_cpu and upstream.item() == 1:
        return None, None, *grads
    return None, None, *(upstream.to(grad.dtype) * grad for grad in grads)


_scaled_once = once_differentiable(_scaled)


def differentiable(loss: Tensor, grads: Sequence[Tensor], *differentiated: Tensor) -> Tensor:
    """Return a loss that backpropagates `grads`, times the upstream gradient.

    Args:
        loss: 0-D, detached.
        grads: of it, one for each tensor of `differentiated`.
        differentiated: what the loss was computed from.
    """
    return _Scaled.apply(loss, grads, *differentiated)
