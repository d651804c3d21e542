"""Generalised advantage estimation in Triton, on CUDA tensors; on CPU tensors by Triton's interpreter.

One program takes a block of envs and walks back through time.
Test: pytest tests/kernels/test_triton_gae_sample.py tests/kernels/test_triton_aot.py
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# (a kernel's parameters have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Outputs

BLOCK_N = 128  # envs of a one-warp program: four neighbours a thread, whose flags come in one load
STAGES = 4  # steps that are loaded ahead, as each waits for its successor
# the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}


@triton.jit(do_not_specialize=["n_steps"])
def gae_kernel(
    rewards_ptr,
    values_ptr,
    next_values_ptr,
    terminated_ptr,
    truncated_ptr,
    valid_ptr,
    advantages_ptr,
    returns_ptr,
    gamma,
    decay,
    n_steps,
    n_envs,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write advantages and returns of the envs of one block."""
    o_env = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = o_env < n_envs
    carry = tl.zeros([BLOCK_N], tl.float32)
    for back in tl.range(0, n_steps, num_stages=STAGES):
        o = (n_steps - 1 - back).to(tl.int64) * n_envs + o_env
        value = tl.load(values_ptr + o, mask=m, other=0.0)
        terminated = tl.load(terminated_ptr + o, mask=m, other=0) != 0
        ended = terminated | (tl.load(truncated_ptr + o, mask=m, other=0) != 0)
        valid = tl.load(valid_ptr + o, mask=m, other=0) != 0
        # selected, not multiplied: what follows a termination may be anything
        after = tl.where(terminated, 0.0, tl.load(next_values_ptr + o, mask=m, other=0.0))
        delta = tl.load(rewards_ptr + o, mask=m, other=0.0) + gamma * after - value
        carry = tl.where(valid, delta + decay * tl.where(ended, 0.0, carry), 0.0)
        tl.store(advantages_ptr + o, carry, mask=m)
        tl.store(returns_ptr + o, carry + value, mask=m)


INTERPRETED = not isinstance(gae_kernel, triton.JITFunction)


def _readable(name: str, array: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Return an array as the kernel reads it, contiguous, or refuse it."""
    if array.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)} as rewards has, got {list(array.shape)}")
    if array.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, as rewards is, got one on {array.device}")
    if array.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {array.dtype}; convert it")
    return array.detach().contiguous()


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
    if rewards.dim() != 2:
        raise ValueError(f"rewards: expected shape [T, N], got {list(rewards.shape)}")
    if rewards.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"rewards: expected a CUDA tensor, got one on {rewards.device}; choose another impl")
    numbers = {"rewards": rewards, "values": values, "next_values": next_values}
    flags = {"terminated": terminated, "truncated": truncated, "valid": valid}
    arrays = [_readable(name, array, rewards, (torch.float32,)) for name, array in numbers.items()]
    arrays += [_readable(name, array, rewards, (torch.bool, torch.uint8)) for name, array in flags.items()]
    outputs = Outputs(torch.empty_like(arrays[0]), torch.empty_like(arrays[0]))
    n_steps, n_envs = rewards.shape
    if rewards.numel() > 0:
        scales = float(gamma), float(gamma) * gae_lambda
        with torch.cuda.device_of(rewards):
            gae_kernel[(triton.cdiv(n_envs, BLOCK_N),)](
                *arrays, *outputs, *scales, n_steps, n_envs, BLOCK_N, STAGES, num_warps=1, **OPTIONS
            )
    return outputs
