"""Advantages in Triton against the reference in float64; on a CPU by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lago_fast import ops
from lago_fast.kernels.gae import reference, triton_fused


def rollout(device: torch.device, n_steps: int, n_envs: int) -> dict[str, Tensor]:
    """Draw a rollout in which every end is followed by an autoreset row, as the array lane gives it."""
    ended = torch.rand(n_steps, n_envs) < 0.2
    for t in range(1, n_steps):
        ended[t] &= ~ended[t - 1]
    valid = torch.cat([torch.ones(1, n_envs, dtype=torch.bool), ~ended[:-1]])[:n_steps]
    by_time = torch.rand(n_steps, n_envs) < 0.5
    rewards, values, next_values = torch.randn(3, n_steps, n_envs)
    arrays = {"rewards": rewards, "values": values, "next_values": next_values}
    arrays |= {"terminated": ended & ~by_time, "truncated": ended & by_time, "valid": valid}
    return {name: a.to(device) for name, a in arrays.items()}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize(("n_steps", "n_envs"), [(1, 1), (2, 3), (65, 17), (33, 128), (9, 300)])
def test_agrees_with_the_reference(n_steps, n_envs, mask_dtype, device):
    arrays = rollout(device, n_steps, n_envs)
    wide = {name: a.double() if a.is_floating_point() else a for name, a in arrays.items()}
    truth = reference.gae(**wide, gamma=0.99, gae_lambda=0.95)
    cast = {name: a.to(mask_dtype) if a.dtype == torch.bool else a for name, a in arrays.items()}
    for got, expected in zip(triton_fused.gae(**cast, gamma=0.99, gae_lambda=0.95), truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_an_invalid_row_holds_reaches_nobody(device):
    arrays = rollout(device, 40, 9)
    clean = triton_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)
    arrays["rewards"][~arrays["valid"]] = torch.nan
    arrays["next_values"][~arrays["valid"]] = torch.nan
    arrays["next_values"][arrays["terminated"]] = torch.nan
    assert not arrays["valid"].all()
    for before, after in zip(clean, triton_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(clean.returns[~arrays["valid"]], arrays["values"][~arrays["valid"]])


def test_views_are_read_as_what_they_show(device):
    arrays = rollout(device, 12, 5)
    expected = triton_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)
    strided = {name: a.T.contiguous().T for name, a in arrays.items()}
    for got, same in zip(triton_fused.gae(**strided, gamma=0.99, gae_lambda=0.95), expected, strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize(("n_steps", "n_envs"), [(0, 3), (4, 0)])
def test_empty(n_steps, n_envs, device):
    arrays = {name: a[:n_steps, :n_envs] for name, a in rollout(device, 4, 3).items()}
    advantages, returns = triton_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)
    assert advantages.shape == returns.shape == (n_steps, n_envs)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("rewards", lambda a: a[0]),
        ("rewards", lambda a: a.double()),
        ("values", lambda a: a[:-1]),
        ("terminated", lambda a: a.float()),
        ("valid", lambda a: a.to("meta")),
    ],
)
def test_a_refused_argument_is_named(name, broken, device):
    arrays = rollout(device, 5, 4)
    arrays[name] = broken(arrays[name])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        triton_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)


def test_a_cpu_tensor_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton_fused, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"^rewards: expected a CUDA tensor"):
        triton_fused.gae(**rollout(torch.device("cpu"), 5, 4), gamma=0.99, gae_lambda=0.95)


@pytest.mark.gpu
def test_the_host_never_waits(device):
    arrays = rollout(device, 16, 64)
    ops.gae(**arrays, gamma=0.99, gae_lambda=0.95, impl="triton")  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        ops.gae(**arrays, gamma=0.99, gae_lambda=0.95, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
