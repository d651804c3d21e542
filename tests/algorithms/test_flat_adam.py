"""FlatAdam against torch.optim.Adam: the same weights, the same state, whichever of them saved it."""

import copy

import pytest
import torch
from torch import nn

from lago_fast.algorithms.flat_adam import FlatAdam


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def train(model, optimizer, steps, *, max_norm=0.5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        (10 * model(torch.randn(4, 5, generator=generator)).square().sum()).backward()
        if isinstance(optimizer, FlatAdam):
            optimizer.clipped_step(max_norm)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_same_weights_as_torch_while_the_rate_falls():
    ours, theirs = net(), net()
    flat, plain = FlatAdam(ours.parameters(), lr=1e-2, eps=1e-5), torch.optim.Adam(theirs.parameters(), 1e-2, eps=1e-5)
    for rate in (1e-2, 3e-3):
        for optimizer in (flat, plain):
            optimizer.param_groups[0]["lr"] = rate
        train(ours, flat, 5, seed=int(1e4 * rate))
        train(theirs, plain, 5, seed=int(1e4 * rate))
    assert_same(ours, theirs)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gradients_are_clipped_as_torch_clips_them(max_norm):
    ours, theirs = net(), net()
    flat = FlatAdam(ours.parameters())
    for model in (ours, theirs):
        model(torch.ones(2, 5)).square().sum().backward()
    flat.clipped_step(max_norm)
    nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_step_alone_does_not_clip():
    ours, theirs = net(), net()
    flat, plain = FlatAdam(ours.parameters(), lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for model, optimizer in ((ours, flat), (theirs, plain)):
        (1e3 * model(torch.ones(2, 5)).square().sum()).backward()
        optimizer.step()
    assert_same(ours, theirs)


def test_a_state_moves_to_torchs_adam_and_back():
    ours = net()
    flat = FlatAdam(ours.parameters(), lr=1e-2)
    train(ours, flat, 4)
    theirs = copy.deepcopy(ours)
    plain = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    plain.load_state_dict(copy.deepcopy(flat.state_dict()))  # torch's own loading shares the tensors
    train(theirs, plain, 4, seed=2)
    again = net()
    again.load_state_dict(ours.state_dict())
    flat_again = FlatAdam(again.parameters(), lr=1e-2)
    flat_again.load_state_dict(flat.state_dict())
    train(again, flat_again, 4, seed=2)
    assert_same(again, theirs)
    train(again, flat_again, 3, seed=3)
    train(theirs, plain, 3, seed=3)
    assert_same(again, theirs)


def test_a_reassigned_parameter_and_a_new_gradient_are_found():
    ours, theirs = net(), net()
    flat, plain = FlatAdam(ours.parameters(), lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for model, optimizer in ((ours, flat), (theirs, plain)):
        train(model, optimizer, 3)
        model[0].weight.data = model[0].weight.data.clone() + 1
        model.zero_grad(set_to_none=True)
        train(model, optimizer, 3, seed=2)
    assert_same(ours, theirs)


def test_the_weights_that_a_module_saves_are_the_ones_in_the_block():
    ours = net()
    flat = FlatAdam(ours.parameters(), lr=1e-2)
    train(ours, flat, 2)
    saved = {name: t.clone() for name, t in ours.state_dict().items()}
    train(ours, flat, 2)
    assert not torch.equal(saved["0.weight"], ours.state_dict()["0.weight"])
    ours.load_state_dict(saved)  # in place, as Stable-Baselines3 loads
    assert torch.equal(flat.param_groups[0]["params"][0], saved["0.weight"])
