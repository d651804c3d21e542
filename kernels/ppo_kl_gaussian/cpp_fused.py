"""The Gaussian loss and its gradients in one pass of native code, on CPU tensors.

Native side: csrc/ops/ppo_kl_gaussian.cc. Test: pytest tests/kernels/test_ppo_kl_gaussian_cpp.py
"""

import torch
from torch import Tensor

from lago_fast import _C

from .eager import Grads
from .reference import HALF_TYPES, Coefficients, Direction, Inputs, Outputs

FLOAT = torch.float32


def _readable(inputs: Inputs) -> Inputs:
    """Return the inputs as native code reads them, or refuse one. Minibatches are small: what fits costs little."""
    element = inputs.mean.shape
    if len(element) != 2 or element[1] == 0:
        raise ValueError(f"mean: expected shape [B, D] with D at least 1, got {list(element)}")
    row, dims = element[:1], element[1:]
    log_std = element if inputs.log_std.dim() == 2 else dims
    prior_log_std = element if inputs.prior_log_std.dim() == 2 else dims
    changed = {}
    shapes = (element, log_std, row, element, row, row, row, row, row, element, prior_log_std)
    for name, t, shape in zip(Inputs._fields, inputs, shapes, strict=True):
        if t.dtype is not FLOAT or t.shape != shape or not t.is_cpu or not t.is_contiguous():
            changed[name] = _converted(name, t, shape)
    return inputs._replace(**changed) if changed else inputs


def _converted(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor in float32, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}; choose another impl")
    if tensor.dtype is not FLOAT and tensor.dtype not in HALF_TYPES:
        raise ValueError(f"{name}: expected float32 or a half type, got {tensor.dtype}; use impl='reference'")
    return tensor.detach().float().contiguous()


def _addresses(coefficients: Coefficients) -> tuple[int, ...]:
    """Return where each coefficient lies, 0 for None."""
    addresses = []
    for name, c in zip(Coefficients._fields, coefficients, strict=True):
        if c is not None and (c.dtype is not FLOAT or c.numel() != 1 or not c.is_cpu):
            raise ValueError(
                f"{name}: expected a 0-D float32 CPU tensor, got {c.dtype} {list(c.shape)} on {c.device}; "
                "see ops.coefficients_on"
            )
        addresses.append(0 if c is None else c.data_ptr())
    return tuple(addresses)


def _check_buffers(out: Grads, inputs: Inputs) -> None:
    """Refuse gradients that do not fit the inputs."""
    for name, grad, like in zip(Grads._fields, out, inputs[:3], strict=True):
        if grad.dtype is not like.dtype or grad.shape != like.shape or not (grad.is_cpu and grad.is_contiguous()):
            raise ValueError(
                f"out.{name}: expected contiguous {like.dtype} {list(like.shape)} on the CPU, "
                f"got {grad.dtype} {list(grad.shape)} on {grad.device}"
            )


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
        out: gradients of an earlier call with the same shapes and dtypes, to be overwritten and returned.
        portable: compute without AVX2, as a processor that lacks it does.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"kl_direction: expected 'policy_prior' or 'prior_policy', got {kl_direction!r}")
    x = _readable(inputs)
    if out is not None:
        _check_buffers(out, inputs)
    # native code writes float32
    if out is not None and out.mean.dtype is FLOAT and out.log_std.dtype is FLOAT and out.values.dtype is FLOAT:
        grads = out
    else:
        grads = Grads(torch.empty_like(x.mean), torch.empty_like(x.log_std), torch.empty_like(x.values))
    statistics = torch.empty(7)
    rows, dims = x.mean.shape
    _C.ppo_kl_gaussian(
        tuple([t.data_ptr() for t in x]),
        _addresses(coefficients),
        (statistics.data_ptr(), grads.mean.data_ptr(), grads.log_std.data_ptr(), grads.values.data_ptr()),
        rows,
        dims,
        x.log_std.dim() == 2,
        x.prior_log_std.dim() == 2,
        kl_direction == "prior_policy",
        normalize_advantage,
        portable,
        torch.get_num_threads(),
    )
    if grads is not out:
        grads = _narrowed(grads, inputs, out)
    return Outputs(*statistics.unbind()), grads


def _narrowed(grads: Grads, inputs: Inputs, out: Grads | None) -> Grads:
    """Return the gradients in their inputs' dtypes, in `out` where it is given."""
    if out is None:
        return Grads(*(grad.to(like.dtype) for grad, like in zip(grads, inputs[:3], strict=True)))
    for buffer, grad in zip(out, grads, strict=True):
        buffer.copy_(grad)
    return out
