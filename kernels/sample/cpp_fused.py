"""Actions with log-probability, entropy and KL to a prior in native code, on CPU tensors; as the reference.

Native side: csrc/ops/sample.cc. Test: pytest tests/kernels/test_sample_cpp.py
"""

import torch
from torch import Tensor

from lago_fast import _C

from .reference import HALF_TYPES, CategoricalInputs, Direction, GaussianInputs, Outputs


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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def categorical(inputs: CategoricalInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row by inverting the cumulative distribution at the row's uniform number.

    Args:
        inputs: shapes at the fields of `CategoricalInputs`; float32, or half types, which are computed in float32.
        prior_temperature: 0-D float32.
        state: [2] int64, seed and step.
        direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    _check(prior_temperature, direction)
    shape = inputs.logits.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"logits: expected shape [B, A] with A at least 1, got {list(shape)}")
    logits = _readable("logits", inputs.logits, shape)
    prior = inputs.prior_log_probs
    prior = None if prior is None else _readable("prior_log_probs", prior, shape)
    mask = None if inputs.action_mask is None else _readable("action_mask", inputs.action_mask, shape, torch.bool)
    state = _readable("state", state, (2,), torch.int64)
    rows = shape[0]
    out = Outputs(
        actions=torch.empty(rows, dtype=torch.int64, device="cpu"),
        log_prob=torch.empty(rows, dtype=torch.float32, device="cpu"),
        entropy=torch.empty(rows, dtype=torch.float32, device="cpu"),
        prior_kl=None if prior is None else torch.empty(rows, dtype=torch.float32, device="cpu"),
    )
    _C.sample_categorical(
        (logits.data_ptr(), _address(prior), _address(mask)),
        tuple(map(_address, out)),
        *shape,
        state.data_ptr(),
        prior_temperature.data_ptr(),
        direction == "prior_policy",
    )
    return out


def gaussian(inputs: GaussianInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row: mean + std * z, by Box and Muller.

    Args and Raises: as for `categorical`.
    """
    _check(prior_temperature, direction)
    shape = inputs.mean.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"mean: expected shape [B, D] with D at least 1, got {list(shape)}")
    mean = _readable("mean", inputs.mean, shape)
    log_std = _readable("log_std", inputs.log_std, shape if inputs.log_std.dim() == 2 else shape[1:])
    prior_mean, prior_log_std = inputs.prior_mean, inputs.prior_log_std
    if prior_mean is None or prior_log_std is None:
        prior_mean = prior_log_std = None
    else:
        prior_mean = _readable("prior_mean", prior_mean, shape)
        prior_log_std = _readable("prior_log_std", prior_log_std, shape if prior_log_std.dim() == 2 else shape[1:])
    state = _readable("state", state, (2,), torch.int64)
    rows = shape[0]
    out = Outputs(
        actions=torch.empty_like(mean),
        log_prob=torch.empty(rows, dtype=torch.float32, device="cpu"),
        entropy=torch.empty(rows, dtype=torch.float32, device="cpu"),
        prior_kl=None if prior_mean is None else torch.empty(rows, dtype=torch.float32, device="cpu"),
    )
    _C.sample_gaussian(
        (mean.data_ptr(), log_std.data_ptr(), _address(prior_mean), _address(prior_log_std)),
        tuple(map(_address, out)),
        *shape,
        log_std.dim() == 2,
        prior_log_std is not None and prior_log_std.dim() == 2,
        state.data_ptr(),
        prior_temperature.data_ptr(),
        direction == "prior_policy",
    )
    return out
