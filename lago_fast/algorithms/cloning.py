"""Behaviour cloning of a Stable-Baselines3 policy: the start of the control arm `bc_ppo`.

Test: pytest tests/algorithms/test_cloning.py
"""

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy

from lago_fast.algorithms.networks import latents
from lago_fast.errors import DemonstrationError


def clone_policy(
    policy: ActorCriticPolicy,
    observations: np.ndarray,
    actions: np.ndarray,
    *,
    epochs: int = 40,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> float:
    """Fit the mean of a Gaussian policy to demonstrated actions by least squares; its std stays as it is.

    Args:
        policy: with a Box action space; changed in place, its own optimiser untouched.
        observations: [n, O], as the policy sees them.
        actions: [n, D].
        epochs, batch_size, learning_rate: of Adam.
        seed: of the order.

    Returns:
        The mean squared error of the last epoch.

    Raises:
        DemonstrationError: the widths are not the policy's.
    """
    expected = (policy.observation_space.shape, policy.action_space.shape)
    if (observations.shape[1:], actions.shape[1:]) != expected:
        raise DemonstrationError(
            f"observations, actions: rows of shape {observations.shape[1:]} and {actions.shape[1:]}, "
            f"the policy has {expected[0]} and {expected[1]}; record demonstrations of this env"
        )
    obs = torch.as_tensor(observations, dtype=torch.float32, device=policy.device)
    target = torch.as_tensor(actions, dtype=torch.float32, device=policy.device)
    actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimizer = torch.optim.Adam(actor, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    error = 0.0
    for _ in range(epochs):
        total = torch.zeros((), device=policy.device)
        for rows in torch.randperm(len(obs), generator=generator).to(policy.device).split(batch_size):
            loss = (policy.action_net(latents(policy, obs[rows])[0]) - target[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        error = float(total) / len(obs)
    return error
