"""The autograd entry of the fused implementations: gradients are ready after the forward pass; backward scales them.

Test: pytest tests/kernels/test_autograd.py
"""

from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from .eager import Grads
from .reference import Inputs, Outputs


class _Scaled(Function):
    """The loss as a function of what it was differentiated by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Grads, *differentiated: Tensor) -> Tensor:
        del differentiated  # named so that autograd links them to the loss
        ctx.save_for_backward(*grads)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        # the rule; to look at the number costs nothing on a CPU, to multiply by it a pass over memory
        if upstream.is_cpu and upstream.item() == 1:
            return None, None, *grads
        return None, None, *(upstream.to(grad.dtype) * grad for grad in grads)


def differentiable(inputs: Inputs, outputs: Outputs, grads: Grads) -> Outputs:
    """Return `outputs` with a loss that backpropagates `grads`, times the upstream gradient, to its inputs.

    Args:
        inputs: what the loss was computed from.
        outputs, grads: of `loss_and_grads`, detached.
    """
    differentiated = tuple(getattr(inputs, name) for name in Grads._fields)
    return outputs._replace(loss=_Scaled.apply(outputs.loss, grads, *differentiated))
