"""The autograd entry of the fused implementations: gradients are ready after the forward pass; backward scales them.

Test: pytest tests/kernels/test_autograd.py
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from .reference import CategoricalInputs, GaussianInputs


class CategoricalGrads(NamedTuple):
    logits: Tensor  # [B, A], of each row's own KL


class GaussianGrads(NamedTuple):
    mean: Tensor  # [B, D], of each row's own KL
    log_std: Tensor  # [B, D], also where log_std is [D]


class _Scaled(Function):
    """The KL of each row as a function of what it was differentiated by."""

    @staticmethod
    def forward(ctx: Any, kl: Tensor, grads: tuple[Tensor, ...], *differentiated: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.shapes = [t.shape for t in differentiated]
        return kl.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (upstream[:, None].to(grad.dtype) * grad for grad in ctx.saved_tensors)  # [B, A] or [B, D]
        # one log std for all rows collects what each row gives
        return None, None, *(g.sum_to_size(shape) for g, shape in zip(scaled, ctx.shapes, strict=True))


def differentiable(
    inputs: CategoricalInputs | GaussianInputs, kl: Tensor, grads: CategoricalGrads | GaussianGrads
) -> Tensor:
    """Return `kl` [B] such that it backpropagates `grads`, times the upstream gradient [B], to its inputs."""
    return _Scaled.apply(kl, grads, *(getattr(inputs, name) for name in grads._fields))
