"""The categorical loss and its gradients in one pass of native code, on CPU tensors.

Native side: csrc/ops/ppo_kl_categorical.cc. Test: pytest tests/kernels/test_ppo_kl_categorical_cpp.py
"""

import torch
from torch import Tensor

from lago_fast import _C

from .eager import Grads
from .reference import HALF_TYPES, Coefficients, Direction, Inputs, Outputs

FLOAT = torch.float32
DTYPES = (FLOAT, FLOAT, torch.int64, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, torch.bool)


def _readable(inputs: Inputs) -> Inputs:
    """Return the inputs as native code reads them, or refuse one. Minibatches are small: what fits costs little."""
    element = inputs.logits.shape
    if len(element) != 2 or element[1] == 0:
        raise ValueError(f"logits: expected shape [B, A] with A at least 1, got {list(element)}")
    row = element[:1]
    changed = {}
    shapes = (element, row, row, row, row, row, row, row, element, element)
    for name, t, dtype, shape in zip(Inputs._fields, inputs, DTYPES, shapes, strict=True):
        if t is None or (t.dtype is dtype and t.shape == shape and t.is_cpu and t.is_contiguous()):
            continue
        changed[name] = _converted(name, t, dtype, shape)
    return inputs._replace(**changed) if changed else inputs


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of the dtype, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}; choose another impl")
    if tensor.dtype is not dtype and not (dtype is FLOAT and tensor.dtype in HALF_TYPES):
        wanted = "float32 or a half type" if dtype is FLOAT else f"{dtype}"
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}; use impl='reference'")
    return tensor.detach().to(dtype).contiguous()


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
    for name, grad, like in zip(Grads._fields, out, (inputs.logits, inputs.values), strict=True):
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
    """Return the outputs, and d loss / d (logits, values).

    Args:
        inputs: shapes at the fields of `Inputs`; float32, or half types, which are computed in float32.
        coefficients: 0-D float32.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        out: gradients of an earlier call with the same shapes and dtypes, to be overwritten and returned.
        portable: compute without AVX2, as a processor that lacks it does.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape, or an action that is none.
    """
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"kl_direction: expected 'policy_prior' or 'prior_policy', got {kl_direction!r}")
    x = _readable(inputs)
    if out is not None:
        _check_buffers(out, inputs)
    # native code writes float32
    if out is not None and out.logits.dtype is FLOAT and out.values.dtype is FLOAT:
        grads = out
    else:
        grads = Grads(torch.empty_like(x.logits), torch.empty_like(x.values))
    statistics = torch.empty(7)
    rows, actions = x.logits.shape
    mask = x.action_mask
    _C.ppo_kl_categorical(
        (*[t.data_ptr() for t in x[:9]], 0 if mask is None else mask.data_ptr()),
        _addresses(coefficients),
        (statistics.data_ptr(), grads.logits.data_ptr(), grads.values.data_ptr()),
        rows,
        actions,
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
        return Grads(grads.logits.to(inputs.logits.dtype), grads.values.to(inputs.values.dtype))
    for buffer, grad in zip(out, grads, strict=True):
        buffer.copy_(grad)
    return out
