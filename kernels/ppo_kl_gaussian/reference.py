"""PPO's clipped surrogate + value loss + entropy + exact KL to a prior, diagonal Gaussian policy: the definition.

Sources: Schulman et al., arXiv 1707.06347, equations 7 and 9 (the value loss without the half, as in
Stable-Baselines3); the KL term is LaGO's stage 2 (arXiv 2606.24669) in the form of arXiv 2410.07927.
Derivation: kernels/README.md.
Test: pytest tests/kernels/test_ppo_kl_gaussian.py
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["policy_prior", "prior_policy"]
HALF_TYPES = (torch.float16, torch.bfloat16)
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Inputs(NamedTuple):
    mean: Tensor  # [B, D], gradient
    log_std: Tensor  # [D] or [B, D], gradient
    values: Tensor  # [B], gradient
    actions: Tensor  # [B, D]
    old_log_prob: Tensor  # [B]
    advantages: Tensor  # [B]
    returns: Tensor  # [B]
    old_values: Tensor  # [B]
    weight: Tensor  # [B], 0 on invalid rows (whose other entries must still be finite), else 1
    prior_mean: Tensor  # [B, D]
    prior_log_std: Tensor  # [D] or [B, D]
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


def ppo_kl_gaussian(
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

    # log N(a; mean, std), summed over action dimensions
    z = (x.actions - x.mean) * (-x.log_std).exp()
    log_prob = (-0.5 * z.square() - x.log_std - HALF_LOG_2PI).sum(dim=-1)
    log_ratio = log_prob - x.old_log_prob
    ratio = log_ratio.exp()
    clipped = torch.clamp(ratio, 1 - c.clip_range, 1 + c.clip_range)
    policy_loss = -mean(torch.min(advantages * ratio, advantages * clipped))
    values = x.values
    if c.clip_range_vf is not None:
        values = x.old_values + torch.clamp(values - x.old_values, -c.clip_range_vf, c.clip_range_vf)
    value_loss = mean((x.returns - values).square())

    entropy = mean((x.log_std + 0.5 + HALF_LOG_2PI).expand_as(x.mean).sum(dim=-1))

    # p^(1/tau) of a Gaussian is the Gaussian with variance tau * sigma^2
    m1, s1 = x.mean, x.log_std
    m2, s2 = x.prior_mean, x.prior_log_std + 0.5 * c.prior_temperature.log()
    if kl_direction == "prior_policy":
        m1, s1, m2, s2 = m2, s2, m1, s1
    scaled = ((2 * s1).exp() + (m1 - m2).square()) * (-2 * s2).exp()
    kl = (s2 - s1 + 0.5 * scaled - 0.5).sum(dim=-1)
    prior_kl = mean(kl)
    weighted_kl = prior_kl if x.kl_weight is None else mean(kl * x.kl_weight)

    loss = policy_loss + c.vf_coef * value_loss - c.ent_coef * entropy + c.kl_coef * weighted_kl
    with torch.no_grad():
        approx_kl = mean(torch.expm1(log_ratio) - log_ratio)
        clip_fraction = mean(((ratio - 1).abs() > c.clip_range).to(ratio.dtype))
    return Outputs(loss, policy_loss, value_loss, entropy, prior_kl, approx_kl, clip_fraction)
