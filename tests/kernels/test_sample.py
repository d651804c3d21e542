"""Sampling: the generator against its published vectors, the draws against their distribution."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from lago_fast import ops
from lago_fast.kernels.sample.reference import philox, uniform

STATE = torch.tensor([7, 3])


@pytest.mark.parametrize(
    ("row", "block", "step", "seed", "expected"),
    [
        (0, 0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, 0xFFFFFFFF, -1, -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x243F6A88, 0x85A308D3, 0x0370734413198A2E, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(row, block, step, seed, expected):
    # Random123's known answers; a counter is (row, block, step low, step high), a key (seed low, seed high)
    words = philox(torch.tensor([row]), torch.tensor([block]), torch.tensor([seed, step]))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_uniform_numbers_lie_inside_of_0_and_1():
    ends = uniform(torch.tensor([0, 0xFFFFFFFF]), torch.float32)
    assert 0 < ends[0] < 1e-6
    assert 1 - 1e-6 < ends[1] < 1


def test_a_row_does_not_depend_on_the_batch():
    mean, log_std = torch.randn(9, 5), torch.randn(5)
    whole = ops.sample_gaussian(mean, log_std, STATE, impl="reference")
    part = ops.sample_gaussian(mean[:4], log_std, STATE, impl="reference")
    assert torch.equal(whole.actions[:4], part.actions)
    assert not torch.equal(whole.actions, ops.sample_gaussian(mean, log_std, STATE + 1, impl="reference").actions)


def test_gaussian_draws_have_the_mean_and_the_std():
    n = 40_000
    drawn = ops.sample_gaussian(
        torch.full((n, 3), 2.0), torch.tensor([-1.0, 0.0, 1.0]), STATE, impl="reference"
    ).actions
    std = torch.tensor([-1.0, 0.0, 1.0]).exp()
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 2.0), rtol=0, atol=5 * float(std.max()) / math.sqrt(n))
    torch.testing.assert_close(drawn.std(0), std, rtol=5 / math.sqrt(2 * n), atol=0)
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)


def test_categorical_draws_have_the_probabilities():
    n, probs = 40_000, torch.tensor([0.1, 0.0, 0.6, 0.3])
    drawn = ops.sample_categorical(probs.log().expand(n, 4), STATE, impl="reference").actions
    counts = torch.bincount(drawn, minlength=4) / n
    assert counts[1] == 0
    torch.testing.assert_close(counts, probs, rtol=0, atol=5 * 0.5 / math.sqrt(n))


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
def test_gaussian_figures_are_torchs(direction):
    mean, prior_mean, prior_log_std = torch.randn(3, 11, 4, dtype=torch.float64)
    log_std = torch.randn(4, dtype=torch.float64)
    temperature = torch.tensor(1.7, dtype=torch.float64)
    out = ops.sample_gaussian(
        mean,
        log_std,
        STATE,
        prior_mean=prior_mean,
        prior_log_std=prior_log_std,
        prior_temperature=temperature,
        kl_direction=direction,
        impl="reference",
    )
    policy = Independent(Normal(mean, log_std.exp()), 1)
    prior = Independent(Normal(prior_mean, prior_log_std.exp() * temperature.sqrt()), 1)
    torch.testing.assert_close(out.log_prob, policy.log_prob(out.actions))
    torch.testing.assert_close(out.entropy, policy.entropy())
    pair = (policy, prior) if direction == "policy_prior" else (prior, policy)
    torch.testing.assert_close(out.prior_kl, kl_divergence(*pair))


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
def test_categorical_figures_are_torchs_over_the_allowed_actions(direction):
    logits, prior_logits = torch.randn(2, 11, 6, dtype=torch.float64)
    mask = torch.rand(11, 6) < 0.6
    mask[:, 2] = True
    out = ops.sample_categorical(
        logits,
        STATE,
        prior_log_probs=prior_logits,
        action_mask=mask,
        prior_temperature=torch.tensor(0.5, dtype=torch.float64),
        kl_direction=direction,
        impl="reference",
    )
    assert mask.gather(1, out.actions[:, None]).all()
    for i in range(11):
        policy, prior = (Categorical(logits=t[i, mask[i]]) for t in (logits, prior_logits / 0.5))
        torch.testing.assert_close(out.log_prob[i], policy.log_prob(mask[i, : out.actions[i]].sum()))
        torch.testing.assert_close(out.entropy[i], policy.entropy())
        pair = (policy, prior) if direction == "policy_prior" else (prior, policy)
        torch.testing.assert_close(out.prior_kl[i], kl_divergence(*pair))


def test_without_a_prior_there_is_no_kl():
    assert ops.sample_categorical(torch.zeros(2, 3), STATE, impl="reference").prior_kl is None
    assert ops.sample_gaussian(torch.zeros(2, 3), torch.zeros(3), STATE, impl="reference").prior_kl is None
