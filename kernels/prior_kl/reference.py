"""Exact KL between a policy and a frozen prior, per state: the definition.

Symbols and both directions are derived in kernels/README.md.
Test: pytest tests/kernels/test_prior_kl.py
"""

from typing import Literal

from torch import Tensor

Direction = Literal["policy_prior", "prior_policy"]


def gaussian(
    mean: Tensor,  # [B, D]
    log_std: Tensor,  # [D] or [B, D]
    prior_mean: Tensor,  # [B, D]
    prior_log_std: Tensor,  # [D] or [B, D]
    direction: Direction = "policy_prior",
) -> Tensor:
    """Return KL [B] in nats between diagonal Gaussians, in the chosen direction."""
    if direction == "prior_policy":
        mean, log_std, prior_mean, prior_log_std = prior_mean, prior_log_std, mean, log_std
    # sum_d  log(s2/s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2
    scaled = ((2 * log_std).exp() + (mean - prior_mean).square()) * (-2 * prior_log_std).exp()
    return (prior_log_std - log_std + 0.5 * scaled - 0.5).sum(dim=-1)


def categorical(
    log_probs: Tensor,  # [B, A], normalised
    prior_log_probs: Tensor,  # [B, A], normalised
    direction: Direction = "policy_prior",
) -> Tensor:
    """Return KL [B] in nats; an action of probability 0 on the left side adds nothing."""
    left, right = (log_probs, prior_log_probs) if direction == "policy_prior" else (prior_log_probs, log_probs)
    # masked before the product, so that the gradient is 0 there too
    return (left.exp() * (left - right).masked_fill(left.exp() == 0, 0.0)).sum(dim=-1)
