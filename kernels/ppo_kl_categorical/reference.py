"""PPO's clipped surrogate + value loss + entropy + exact KL to a prior, categorical policy: the definition.

Sources: Schulman et al., arXiv 1707.06347, equations 7 and 9 (the value loss without the half, as in
Stable-Baselines3); the KL term is LaGO's stage 2 (arXiv 2606.24669) in the form of arXiv 2410.07927.
Derivation: kernels/README.md.
Test: pytest tests/kernels/test_ppo_kl_categorical.py
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["policy_prior", "prior_policy"]
HALF_TYPES = (torch.float16, torch.bfloat16)


class Inputs(NamedTuple):
    logits: Tensor  # [B, A], gradient; need not be normalised
    values: Tensor  # [B], gradient
    actions: Tensor  # [B] int64
    old_log_prob: Tensor  # [B]
    advantages: Tensor  # [B]
    returns: Tensor  # [B]
    old_values: Tensor  # [B]
    weight: Tensor  # [B], 0 on invalid rows (whose other entries must still be finite), else 1
    prior_log_probs: Tensor  # [B, A], need not be normalised; -inf where the prior excludes an action
    action_mask: Tensor | None = None  # [B, A] bool, True where allowed, at least one per row; None: all are
    kl_weight: Tensor | None = None  # [B], finite, of each row's KL in the loss; None: 1


class Coefficients(NamedTuple):
    clip_range: Tensor  # 0-D, as all of these: a captured graph must not freeze a schedule
    ent_coef: Tensor
    vf_coef: Tensor
    kl_coef: Tensor
    prior_temperature: Tensor
    clip_range_vf: Tensor | None = None  # None: the value is not clipped


class Outputs(NamedTuple):
    loss: Tensor  # 0-D, as all of these
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    prior_kl: Tensor  # nats per state, multiplied neither by kl_coef nor by kl_weight
    approx_kl: Tensor  # old policy to new, k3 estimator
    clip_fraction: Tensor


def ppo_kl_categorical(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
) -> Outputs:
    """Return the loss and its statistics as means over rows of weight 1."""
    x = inputs._replace(
        **{k: t.float() for k, t in inputs._asdict().items() if t is not None and t.dtype in HALF_TYPES}
    )
    c = coefficients
    count = x.weight.sum()
    rows = count.clamp(min=1)

    def mean(row: Tensor) -> Tensor:  # [B] -> 0-D
        return (row * x.weight).sum() / rows

    advantages = x.advantages
    if normalize_advantage:
        centred = advantages - mean(advantages)
        std = ((centred.square() * x.weight).sum() / (count - 1).clamp(min=1)).sqrt()
        advantages = torch.where(count > 1, centred / (std + 1e-8), advantages)

    # policy and prior are both restricted to the allowed actions and renormalised; the prior to the power of 1 / tau
    logits, prior = x.logits, x.prior_log_probs / c.prior_temperature
    if x.action_mask is not None:
        logits, prior = (t.masked_fill(~x.action_mask, -torch.inf) for t in (logits, prior))
    log_probs, prior = logits.log_softmax(dim=-1), prior.log_softmax(dim=-1)  # [B, A]
    log_prob = log_probs.gather(-1, x.actions[:, None]).squeeze(-1)
    log_ratio = log_prob - x.old_log_prob
    ratio = log_ratio.exp()
    clipped = torch.clamp(ratio, 1 - c.clip_range, 1 + c.clip_range)
    policy_loss = -mean(torch.min(advantages * ratio, advantages * clipped))

    values = x.values
    if c.clip_range_vf is not None:
        values = x.old_values + torch.clamp(values - x.old_values, -c.clip_range_vf, c.clip_range_vf)
    value_loss = mean((x.returns - values).square())

    probs = log_probs.exp()
    # 0 log 0 = 0, and so is its gradient: the -inf must not enter the product
    entropy = mean(-(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(dim=-1))

    left, right = (log_probs, prior) if kl_direction == "policy_prior" else (prior, log_probs)
    kl = (left.exp() * (left - right).masked_fill(left.exp() == 0, 0.0)).sum(dim=-1)
    prior_kl = mean(kl)
    weighted_kl = prior_kl if x.kl_weight is None else mean(kl * x.kl_weight)

    loss = policy_loss + c.vf_coef * value_loss - c.ent_coef * entropy + c.kl_coef * weighted_kl
    with torch.no_grad():
        approx_kl = mean(torch.expm1(log_ratio) - log_ratio)
        clip_fraction = mean(((ratio - 1).abs() > c.clip_range).to(ratio.dtype))
    return Outputs(loss, policy_loss, value_loss, entropy, prior_kl, approx_kl, clip_fraction)
