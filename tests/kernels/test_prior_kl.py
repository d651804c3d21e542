"""The KL alone, against torch.distributions and the loss ops."""

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from lago_fast import ops


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
def test_gaussian(direction):
    torch.manual_seed(0)
    mean, prior_mean = torch.randn(5, 3), torch.randn(5, 3)
    log_std, prior_log_std = torch.randn(3), torch.randn(5, 3)
    pair = (Normal(mean, log_std.exp()), Normal(prior_mean, prior_log_std.exp()))
    expected = kl_divergence(*(pair if direction == "policy_prior" else pair[::-1])).sum(-1)
    got = ops.prior_kl_gaussian(mean, log_std, prior_mean, prior_log_std, kl_direction=direction)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
def test_categorical(direction):
    torch.manual_seed(0)
    policy, prior = Categorical(logits=torch.randn(5, 4)), Categorical(logits=torch.randn(5, 4))
    expected = kl_divergence(*((policy, prior) if direction == "policy_prior" else (prior, policy)))
    got = ops.prior_kl_categorical(policy.logits, prior.logits, kl_direction=direction)
    torch.testing.assert_close(got, expected)


def test_equal_distributions_have_zero_kl():
    log_probs = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert torch.equal(ops.prior_kl_categorical(log_probs, log_probs), torch.zeros(2))
    assert torch.equal(ops.prior_kl_gaussian(*[torch.ones(2, 3)] * 4), torch.zeros(2))
