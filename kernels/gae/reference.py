"""Generalised advantage estimation over a rollout with autoreset rows: the definition.

Source: Schulman et al., arXiv 1506.02438, equation 16; truncation is bootstrapped (Pardo et al., arXiv 1712.00378).
Test: pytest tests/kernels/test_gae.py
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    advantages: Tensor  # [T, N]
    returns: Tensor  # [T, N]


def gae(
    rewards: Tensor,  # [T, N]
    values: Tensor,  # [T, N], V of the observation acted on
    next_values: Tensor,  # [T, N], V of the observation that the step returned (the true last one at an end)
    terminated: Tensor,  # [T, N] bool
    truncated: Tensor,  # [T, N] bool
    valid: Tensor,  # [T, N] bool, False on autoreset rows
    gamma: float,
    gae_lambda: float,
) -> Outputs:
    """Return advantages and returns; an invalid row has advantage 0 and passes nothing on."""
    alive = valid & ~(terminated | truncated)
    # selected, not multiplied: what follows a termination may be anything
    deltas = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    advantages = torch.zeros_like(deltas)
    carry = torch.zeros_like(deltas[0])
    for t in range(deltas.shape[0] - 1, -1, -1):
        # A_t = delta_t + gamma * lambda * A_{t+1}, cut where the episode ended
        carry = torch.where(valid[t], deltas[t] + gamma * gae_lambda * torch.where(alive[t], carry, 0.0), 0.0)
        advantages[t] = carry
    return Outputs(advantages, advantages + values)
