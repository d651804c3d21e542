"""The op `adam`: norm, scale and step, against PyTorch's own optimiser and by hand."""

import math

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.adam import cpp_fused, reference
from lago_fast.kernels.adam.reference import Block, Settings

SETTINGS = Settings(1e-2, 0.9, 0.999, 1e-5)


def draw(n, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameter, exp_avg, exp_avg_sq = torch.randn(3, n, generator=generator)
    return Block(parameter, torch.empty(n), 0.1 * exp_avg, 0.01 * exp_avg_sq.abs(), torch.tensor(3.0))


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("n", [1, 7, 64, 9033, 60001])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_steps_are_torchs(n, lanes, max_norm):
    ours, theirs = draw(n), draw(n)
    for number in range(4):
        grad = 3 * torch.randn(n, generator=torch.Generator().manual_seed(number))
        for block in (ours, theirs):
            block.grad.copy_(grad)
        cpp_fused.clipped_step(ours, SETTINGS, max_norm, lanes=lanes)
        reference.clipped_step(theirs, SETTINGS, max_norm)
    for name, a, b in zip(Block._fields, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_by_hand():
    # the first step from rest moves by lr * sign(g), but for eps; a gradient of (3, 4) has the norm 5
    block = Block(torch.zeros(2), torch.tensor([3.0, -4.0]), torch.zeros(2), torch.zeros(2), torch.tensor(0.0))
    cpp_fused.clipped_step(block, Settings(0.1, 0.9, 0.999, 0.0), 1.0)
    torch.testing.assert_close(block.parameter, torch.tensor([-0.1, 0.1]), rtol=1e-5, atol=0)
    torch.testing.assert_close(block.grad, torch.tensor([0.6, -0.8]), rtol=1e-5, atol=0)
    torch.testing.assert_close(block.exp_avg, torch.tensor([0.06, -0.08]), rtol=1e-5, atol=0)
    assert block.step == 1


def test_a_nan_gradient_reaches_the_parameters():
    block = draw(40)
    block.grad[3] = torch.nan
    cpp_fused.clipped_step(block, SETTINGS, 0.5)
    assert block.parameter.isnan().all()  # its norm is NaN, as it is in torch


def test_refusals_and_the_door():
    block = draw(4)
    for name, bad in (("grad", torch.empty(5)), ("exp_avg", torch.empty(4).double())):
        with pytest.raises(ValueError, match=f"{name}: expected contiguous float32"):
            cpp_fused.clipped_step(block._replace(**{name: bad}), SETTINGS, 1.0)
    before = block.parameter.clone()
    block.grad.fill_(1.0)
    ops.clipped_adam(block, SETTINGS, 1.0)
    assert not torch.equal(block.parameter, before)
