"""Exact KL between a policy and a frozen prior, per state: the definition.

Symbols and both directions are derived in kernels/README.md.
Test: pytest tests/kernels/test_prior_kl.py
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["policy_prior", "prior_policy"]
HALF_TYPES = (torch.float16, torch.bfloat16)


class CategoricalInputs(NamedTuple):
    logits: Tensor  # [B, A], gradient; need not be normalised
    prior_log_probs: Tensor  # [B, A], need not be normalised; -inf where the prior excludes an action
    action_mask: Tensor | None = None  # [B, A] bool, True where allowed, at least one per row; None: all are


class GaussianInputs(NamedTuple):
    mean: Tensor  # [B, D], gradient
    log_std: Tensor  # [D] or [B, D], gradient
    prior_mean: Tensor  # [B, D]
    prior_log_std: Tensor  # [D] or [B, D]


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in HALF_TYPES else t


def categorical(inputs: CategoricalInputs, prior_temperature: Tensor, direction: Direction) -> Tensor:
    """Return KL [B] in nats; an action of probability 0 on the left side adds nothing."""
    logits, prior = _wide(inputs.logits), _wide(inputs.prior_log_probs) / prior_temperature
    if inputs.action_mask is not None:
        logits, prior = (t.masked_fill(~inputs.action_mask, -torch.inf) for t in (logits, prior))
    left, right = logits.log_softmax(dim=-1), prior.log_softmax(dim=-1)
    if direction == "prior_policy":
        left, right = right, left
    # masked before the product, so that the gradient is 0 there too
    return (left.exp() * (left - right).masked_fill(left.exp() == 0, 0.0)).sum(dim=-1)


def gaussian(inputs: GaussianInputs, prior_temperature: Tensor, direction: Direction) -> Tensor:
    """Return KL [B] in nats between diagonal Gaussians."""
    m1, s1, m2, s2 = map(_wide, inputs)
    # p^(1/tau) of a Gaussian is the Gaussian with variance tau * sigma^2
    s2 = s2 + 0.5 * prior_temperature.log()
    if direction == "prior_policy":
        m1, s1, m2, s2 = m2, s2, m1, s1
    # sum_d  log(s2/s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2
    scaled = ((2 * s1).exp() + (m1 - m2).square()) * (-2 * s2).exp()
    return (s2 - s1 + 0.5 * scaled - 0.5).sum(dim=-1)
