"""The Gaussian loss and its gradients in one pass of native code, on CPU tensors.

Native side: csrc/ops/ppo_kl_gaussian.cc. Test: pytest tests/kernels/test_ppo_kl_gaussian_cpp.py
"""

import torch
from torch import Tensor

from lago_fast import _C

from .eager import Grads
from .reference import Coefficients, Direction, Inputs, Outputs

HALF_TYPES = (torch.bfloat16, torch.float16)


def _expected_shapes(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """Return the shape that each input must have, given `mean`'s; both log stds may also be [B, D]."""
    element = inputs.mean.shape
    if len(element) != 2 or element[1] == 0:
        raise ValueError(f"mean: expected shape [B, D] with D at least 1, got {list(element)}")
    row, dims = element[:1], element[1:]
    log_std = element if inputs.log_std.dim() == 2 else dims
    prior_log_std = element if inputs.prior_log_std.dim() == 2 else dims
    return element, log_std, row, element, row, row, row, row, row, element, prior_log_std


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an input as native code reads it, float32 and contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}; choose another impl")
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    if tensor.dtype is not torch.float32 and tensor.dtype not in HALF_TYPES:
        raise ValueError(f"{name}: expected float32 or a half type, got {tensor.dtype}; use impl='reference'")
    return tensor.detach().float().contiguous()


def _scalar_address(name: str, coefficient: Tensor | None) -> int:
    """Return where a coefficient lies, 0 for None."""
    if coefficient is None:
        return 0
    if coefficient.dtype is not torch.float32 or coefficient.numel() != 1 or not coefficient.is_cpu:
        raise ValueError(
            f"{name}: expected a 0-D float32 CPU tensor, got {coefficient.dtype} {list(coefficient.shape)} "
            f"on {coefficient.device}; see ops.coefficients_on"
        )
    return coefficient.data_ptr()


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    out: Grads | None = None,
    portable: bool = False,
) -> tuple[Outputs, Grads]:
    """Return the outputs, and d loss / d (mean, log_std, values).

    Args:
        inputs: shapes at the fields of `Inputs`; float32, or half types, which are computed in float32.
        coefficients: 0-D float32.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        out: float32 gradients of an earlier call with the same shapes, to be overwritten and returned.
        portable: compute without AVX2, as a processor that lacks it does.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"kl_direction: expected 'policy_prior' or 'prior_policy', got {kl_direction!r}")
    x = Inputs(*map(_readable, Inputs._fields, inputs, _expected_shapes(inputs)))
    if out is None:
        grads = Grads(torch.empty_like(x.mean), torch.empty_like(x.log_std), torch.empty_like(x.values))
    else:
        grads = _writable(out, x)
    statistics = torch.empty(len(Outputs._fields))
    _C.ppo_kl_gaussian(
        tuple(t.data_ptr() for t in x),
        tuple(map(_scalar_address, Coefficients._fields, coefficients)),
        (statistics.data_ptr(), grads.mean.data_ptr(), grads.log_std.data_ptr(), grads.values.data_ptr()),
        x.mean.shape[0],
        x.mean.shape[1],
        x.log_std.dim() == 2,
        x.prior_log_std.dim() == 2,
        kl_direction == "prior_policy",
        normalize_advantage,
        portable,
    )
    if out is None and inputs.mean.dtype in HALF_TYPES:
        grads = Grads(*(g.to(t.dtype) for g, t in zip(grads, inputs[:3], strict=True)))
    return Outputs(*statistics.unbind()), grads


def _writable(out: Grads, x: Inputs) -> Grads:
    """Return `out` if native code can write the gradients there."""
    for name, grad, like in zip(Grads._fields, out, x[:3], strict=True):
        fits = grad.shape == like.shape and grad.dtype is torch.float32 and grad.is_cpu
        if not fits or not grad.is_contiguous():
            raise ValueError(
                f"out.{name}: expected contiguous float32 {list(like.shape)} on the CPU, "
                f"got {grad.dtype} {list(grad.shape)} on {grad.device}"
            )
    return out
