"""PPO's clipped surrogate + value loss + entropy for any distribution, without a prior: the definition.

What the fused ops do for the two distributions that have a closed KL, this does for the others (MultiDiscrete,
MultiBinary, state-dependent exploration), whose log-probabilities and entropy the policy computes itself.
Source: Schulman et al., arXiv 1707.06347, equations 7 and 9, as in Stable-Baselines3. Derivation: kernels/README.md.
Test: pytest tests/kernels/test_ppo.py
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    log_prob: Tensor  # [B] of the stored actions, gradient
    entropy: Tensor  # [B], gradient
    values: Tensor  # [B], gradient
    old_log_prob: Tensor  # [B]
    advantages: Tensor  # [B]
    returns: Tensor  # [B]
    old_values: Tensor  # [B]
    weight: Tensor  # [B], 0 on invalid rows (whose other entries must still be finite), else 1


class Coefficients(NamedTuple):
    clip_range: Tensor  # 0-D, as all of these
    ent_coef: Tensor
    vf_coef: Tensor
    clip_range_vf: Tensor | None = None  # None: the value is not clipped


class Outputs(NamedTuple):
    loss: Tensor  # 0-D, as all of these
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    prior_kl: Tensor  # 0: there is no prior
    approx_kl: Tensor  # old policy to new, k3 estimator
    clip_fraction: Tensor


class Grads(NamedTuple):
    log_prob: Tensor  # [B]
    entropy: Tensor  # [B]
    values: Tensor  # [B]


def ppo(x: Inputs, c: Coefficients, *, normalize_advantage: bool = True) -> Outputs:
    """Return the loss and its statistics as means over rows of weight 1."""
    count = x.weight.sum()
    rows = count.clamp(min=1)

    def mean(row: Tensor) -> Tensor:  # [B] -> 0-D
        return (row * x.weight).sum() / rows

    advantages = x.advantages
    if normalize_advantage:
        centred = advantages - mean(advantages)
        std = ((centred.square() * x.weight).sum() / (count - 1).clamp(min=1)).sqrt()
        advantages = torch.where(count > 1, centred / (std + 1e-8), advantages)
    log_ratio = x.log_prob - x.old_log_prob
    ratio = log_ratio.exp()
    clipped = torch.clamp(ratio, 1 - c.clip_range, 1 + c.clip_range)
    policy_loss = -mean(torch.min(advantages * ratio, advantages * clipped))
    values = x.values
    if c.clip_range_vf is not None:
        values = x.old_values + torch.clamp(values - x.old_values, -c.clip_range_vf, c.clip_range_vf)
    value_loss = mean((x.returns - values).square())
    entropy = mean(x.entropy)
    loss = policy_loss + c.vf_coef * value_loss - c.ent_coef * entropy
    with torch.no_grad():
        approx_kl = mean(torch.expm1(log_ratio) - log_ratio)
        clip_fraction = mean(((ratio - 1).abs() > c.clip_range).to(ratio.dtype))
    return Outputs(loss, policy_loss, value_loss, entropy, torch.zeros_like(loss), approx_kl, clip_fraction)


def loss_and_grads(x: Inputs, c: Coefficients, *, normalize_advantage: bool = True) -> tuple[Outputs, Grads]:
    """Return the outputs, detached, and d loss / d (log_prob, entropy, values)."""
    leaves = [getattr(x, name).detach().requires_grad_() for name in Grads._fields]
    with torch.enable_grad():
        outputs = ppo(
            x._replace(**dict(zip(Grads._fields, leaves, strict=True))), c, normalize_advantage=normalize_advantage
        )
        grads = torch.autograd.grad(outputs.loss, leaves)
    return Outputs(*(t.detach() for t in outputs)), Grads(*grads)
