"""Generalised advantage estimation in native code, on CPU tensors; the same signature as the reference.

Native side: csrc/ops/gae.cc. Test: pytest tests/kernels/test_gae.py
"""

import torch
from torch import Tensor

from lago_fast import _C
from lago_fast.kernels.gae.reference import Outputs


def _check(name: str, array: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what the native code would misread."""
    if array.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got one on {array.device}; use another impl there")
    if array.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: expected dtype {wanted}, got {array.dtype}; convert it")
    if len(shape) != 2:
        raise ValueError(f"{name}: expected shape [T, N], got {list(array.shape)}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} as rewards has, got {list(array.shape)}")
    if not array.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor; call .contiguous() on it")


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Outputs:
    """Return advantages and returns; an invalid row has advantage 0 and passes nothing on.

    Args:
        rewards: [T, N] float32.
        values: [T, N] float32, V of the observation acted on.
        next_values: [T, N] float32, V of the observation that the step returned.
        terminated: [T, N] bool or uint8.
        truncated: [T, N] bool or uint8.
        valid: [T, N] bool or uint8, False on autoreset rows.
        gamma: discount per step.
        gae_lambda: decay of the exponential average.

    Raises:
        ValueError: an array on another device, of another dtype or shape, or not contiguous.
    """
    shape = rewards.shape
    for name, array in (("rewards", rewards), ("values", values), ("next_values", next_values)):
        _check(name, array, shape, (torch.float32,))
    for name, array in (("terminated", terminated), ("truncated", truncated), ("valid", valid)):
        _check(name, array, shape, (torch.bool, torch.uint8))
    outputs = Outputs(torch.empty_like(rewards), torch.empty_like(rewards))
    _C.gae(
        rewards.data_ptr(),
        values.data_ptr(),
        next_values.data_ptr(),
        terminated.data_ptr(),
        truncated.data_ptr(),
        valid.data_ptr(),
        outputs.advantages.data_ptr(),
        outputs.returns.data_ptr(),
        n_steps=shape[0],
        n_envs=shape[1],
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    return outputs
