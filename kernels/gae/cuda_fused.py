"""Generalised advantage estimation by a CUDA kernel; no host synchronisation, one launch.

Native side: gae.cu, in builds with -DLAGO_CUDA=ON.
Test: pytest tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py
"""

from types import ModuleType

import torch
from torch import Tensor

from .reference import Outputs

NUMBERS = ("rewards", "values", "next_values")
FLAGS = ("terminated", "truncated", "valid")


def _readable(name: str, array: Tensor, like: Tensor, *dtypes: torch.dtype) -> Tensor:
    """Return an array as the kernel reads it, contiguous, or refuse it."""
    if array.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as rewards, got one on {array.device}")
    if array.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {array.dtype}; convert it")
    if array.dim() != 2:
        raise ValueError(f"{name}: expected shape [T, N], got {list(array.shape)}")
    if array.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)} as rewards has, got {list(array.shape)}")
    return array.detach().contiguous()


def launch(native: ModuleType, stream: int, arrays: tuple[Tensor, ...], gamma: float, gae_lambda: float) -> Outputs:
    """Check the six arrays and have `native` compute on `stream`, on the device that `rewards` lie on."""
    like = arrays[0]
    readable = [_readable(name, t, like, torch.float32) for name, t in zip(NUMBERS, arrays[:3], strict=True)]
    flags = zip(FLAGS, arrays[3:], strict=True)
    readable += [_readable(name, t, like, torch.bool, torch.uint8) for name, t in flags]
    outputs = Outputs(torch.empty_like(readable[0]), torch.empty_like(readable[0]))
    native.gae(
        [t.data_ptr() for t in (*readable, *outputs)],
        *like.shape,
        gamma,
        gamma * gae_lambda,
        (like.device.index or 0, stream),
    )
    return outputs


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
        ValueError: an array on another device, of another dtype or shape.
    """
    # here, not above: the tests import this file where the module is not built
    from lago_fast import _cuda

    if not rewards.is_cuda:
        raise ValueError(f"rewards: expected a CUDA tensor, got one on {rewards.device}; choose another impl")
    stream = torch.cuda.current_stream(rewards.device).cuda_stream
    return launch(_cuda, stream, (rewards, values, next_values, terminated, truncated, valid), gamma, gae_lambda)
