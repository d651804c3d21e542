"""The KL of each row and its gradients in native code, on CPU tensors.

Native side: csrc/ops/prior_kl.cc. Test: pytest tests/kernels/test_prior_kl_cpp.py
"""

import torch
from torch import Tensor

from lago_fast import _C

from .autograd import CategoricalGrads, GaussianGrads
from .reference import HALF_TYPES, CategoricalInputs, Direction, GaussianInputs


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an input as native code reads it, of the dtype and contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}; choose another impl")
    if tensor.dtype is not dtype and not (dtype is torch.float32 and tensor.dtype in HALF_TYPES):
        wanted = "float32 or a half type" if dtype is torch.float32 else f"{dtype}"
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}; use impl='reference'")
    return tensor.detach().to(dtype).contiguous()


def _check(prior_temperature: Tensor, direction: Direction) -> None:
    """Refuse what native code would misread."""
    t = prior_temperature
    if t.dtype is not torch.float32 or t.numel() != 1 or not t.is_cpu:
        raise ValueError(
            f"prior_temperature: expected a 0-D float32 CPU tensor, got {t.dtype} {list(t.shape)} on {t.device}"
        )
    if direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"direction: expected 'policy_prior' or 'prior_policy', got {direction!r}")


def categorical(
    inputs: CategoricalInputs,
    prior_temperature: Tensor,
    *,
    direction: Direction,
    needs_grad: bool,
    lanes: int = 16,
) -> tuple[Tensor, CategoricalGrads | None]:
    """Return KL [B] in nats, and where it is asked for d KL / d logits of each row.

    Args:
        inputs: shapes at the fields of `CategoricalInputs`; float32, or half types, which are computed in float32.
        prior_temperature: 0-D float32.
        direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        needs_grad: whether the gradient is wanted; it has its input's dtype.
        lanes: floats at once, at most: 16 (AVX-512), 8 (AVX2) or 4, as a processor that has no more.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    _check(prior_temperature, direction)
    shape = inputs.logits.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"logits: expected shape [B, A] with A at least 1, got {list(shape)}")
    logits = _readable("logits", inputs.logits, shape)
    prior = _readable("prior_log_probs", inputs.prior_log_probs, shape)
    mask = None if inputs.action_mask is None else _readable("action_mask", inputs.action_mask, shape, torch.bool)
    kl = torch.empty(shape[0], dtype=torch.float32, device="cpu")
    grad = torch.empty_like(logits) if needs_grad else None
    _C.prior_kl_categorical(
        logits.data_ptr(),
        prior.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        kl.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        *shape,
        prior_temperature.data_ptr(),
        direction == "prior_policy",
        lanes,
    )
    return kl, None if grad is None else CategoricalGrads(grad.to(inputs.logits.dtype))


def gaussian(
    inputs: GaussianInputs,
    prior_temperature: Tensor,
    *,
    direction: Direction,
    needs_grad: bool,
    lanes: int = 16,
) -> tuple[Tensor, GaussianGrads | None]:
    """Return KL [B] in nats, and where it is asked for d KL / d (mean, log_std) of each row, [B, D] both.

    Args and Raises: as for `categorical`.
    """
    _check(prior_temperature, direction)
    shape = inputs.mean.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"mean: expected shape [B, D] with D at least 1, got {list(shape)}")
    x = GaussianInputs(
        mean=_readable("mean", inputs.mean, shape),
        log_std=_readable("log_std", inputs.log_std, shape if inputs.log_std.dim() == 2 else shape[1:]),
        prior_mean=_readable("prior_mean", inputs.prior_mean, shape),
        prior_log_std=_readable(
            "prior_log_std", inputs.prior_log_std, shape if inputs.prior_log_std.dim() == 2 else shape[1:]
        ),
    )
    kl = torch.empty(shape[0], dtype=torch.float32, device="cpu")
    grads = GaussianGrads(torch.empty_like(x.mean), torch.empty_like(x.mean)) if needs_grad else None
    _C.prior_kl_gaussian(
        tuple(t.data_ptr() for t in x),
        kl.data_ptr(),
        0 if grads is None else grads.mean.data_ptr(),
        0 if grads is None else grads.log_std.data_ptr(),
        *shape,
        x.log_std.dim() == 2,
        x.prior_log_std.dim() == 2,
        prior_temperature.data_ptr(),
        direction == "prior_policy",
        lanes,
    )
    if grads is not None:
        grads = GaussianGrads(grads.mean.to(inputs.mean.dtype), grads.log_std.to(inputs.log_std.dtype))
    return kl, grads
