"""The op `gae`: a case worked out by hand, and native code against the reference in float64."""

import pytest
import torch
from torch import Tensor

from lago_fast.kernels.gae import cpp_fused, reference

GAMMA, LAMBDA = 0.5, 0.5


def column(*numbers: float) -> Tensor:
    """Build one environment's rollout [T, 1]."""
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)


def flags(*steps: int, length: int) -> Tensor:
    """Build a [length, 1] mask that is True at the given steps."""
    mask = torch.zeros(length, 1, dtype=torch.bool)
    mask[list(steps)] = True
    return mask


def rollout(n_steps: int, n_envs: int, seed: int) -> dict[str, Tensor]:
    """Draw a rollout in which every end is followed by an autoreset row, as the array lane gives it."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(n_steps, n_envs, generator=generator)

    ended = torch.rand(n_steps, n_envs, generator=generator) < 0.2
    valid = torch.ones(n_steps, n_envs, dtype=torch.bool)
    for t in range(1, n_steps):
        ended[t] &= ~ended[t - 1]
        valid[t] = ~ended[t - 1]
    by_time = torch.rand(n_steps, n_envs, generator=generator) < 0.5
    return {
        "rewards": draw(),
        "values": draw(),
        "next_values": draw(),
        "terminated": ended & ~by_time,
        "truncated": ended & by_time,
        "valid": valid,
    }


def in_float64(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Widen the floating columns, which makes the reference the truth to compare with."""
    return {name: a.double() if a.is_floating_point() else a for name, a in arrays.items()}


@pytest.mark.parametrize("gae", [reference.gae, cpp_fused.gae], ids=["reference", "cpp"])
class TestByHand:
    def test_open_end(self, gae):
        # With half the next value the deltas are 1, 2 and 4; a quarter of what follows is added to each.
        arrays = {
            "rewards": column(1, 2, 4),
            "values": column(1, 2, 4),
            "next_values": column(2, 4, 8),
            "terminated": flags(length=3),
            "truncated": flags(length=3),
            "valid": ~flags(length=3),
        }
        advantages, returns = gae(**arrays, gamma=GAMMA, gae_lambda=LAMBDA)
        torch.testing.assert_close(advantages, column(1 + 0.25 * 3, 2 + 0.25 * 4, 4))
        torch.testing.assert_close(returns, column(2.75, 5, 8))

    def test_termination_truncation_and_autoreset_row(self, gae):
        # step 1 terminates, step 2 is its autoreset row, step 4 is truncated, step 5 is its autoreset row
        arrays = {
            "rewards": column(1, 1, 99, 1, 1, 99, 1),
            "values": column(2, 2, 7, 2, 2, 7, 2),
            "next_values": column(4, 8, 77, 4, 8, 77, 4),
            "terminated": flags(1, length=7),
            "truncated": flags(4, length=7),
            "valid": ~flags(2, 5, length=7),
        }
        advantages, returns = gae(**arrays, gamma=GAMMA, gae_lambda=LAMBDA)
        # The terminated step bootstraps nothing (-1), the truncated one half of 8 (3), others half of 4 (1).
        expected = column(1 + 0.25 * -1, -1, 0, 1 + 0.25 * 3, 3, 0, 1)
        torch.testing.assert_close(advantages, expected)
        torch.testing.assert_close(returns, expected + arrays["values"])

    def test_empty(self, gae):
        arrays = rollout(0, 3, seed=0) if gae is cpp_fused.gae else rollout(1, 0, seed=0)
        advantages, returns = gae(**arrays, gamma=GAMMA, gae_lambda=LAMBDA)
        assert advantages.shape == returns.shape == arrays["rewards"].shape


@pytest.mark.parametrize("n_envs", [1, 3, 8, 17, 64])
@pytest.mark.parametrize("n_steps", [1, 2, 65])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8])
def test_cpp_agrees_with_the_reference(n_steps, n_envs, mask_dtype):
    arrays = rollout(n_steps, n_envs, seed=n_steps * 100 + n_envs)
    truth = reference.gae(**in_float64(arrays), gamma=0.99, gae_lambda=0.95)
    cast = {name: a.to(mask_dtype) if a.dtype == torch.bool else a for name, a in arrays.items()}
    for got, expected in zip(cpp_fused.gae(**cast, gamma=0.99, gae_lambda=0.95), truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_an_invalid_row_holds_reaches_nobody():
    arrays = rollout(40, 9, seed=3)
    clean = cpp_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)
    arrays["rewards"][~arrays["valid"]] = float("nan")
    arrays["next_values"][~arrays["valid"]] = float("nan")
    arrays["next_values"][arrays["terminated"]] = float("nan")
    poisoned = cpp_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)
    assert not arrays["valid"].all()
    for before, after in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert clean.advantages[~arrays["valid"]].abs().max() == 0
    assert torch.equal(clean.returns[~arrays["valid"]], arrays["values"][~arrays["valid"]])


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("rewards", lambda a: a.double()),
        ("values", lambda a: a[:-1]),
        ("next_values", lambda a: a.T.contiguous().T),
        ("terminated", lambda a: a.float()),
        ("truncated", lambda a: a[:, :1].expand_as(a)),
        ("valid", lambda a: a.to("meta")),
    ],
)
def test_cpp_names_the_argument_it_refuses(name, broken):
    arrays = rollout(5, 4, seed=0)
    arrays[name] = broken(arrays[name])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        cpp_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)


def test_cpp_refuses_a_vector():
    arrays = {name: a[0] for name, a in rollout(5, 4, seed=0).items()}
    with pytest.raises(ValueError, match=r"rewards: expected shape \[T, N\]"):
        cpp_fused.gae(**arrays, gamma=0.99, gae_lambda=0.95)
