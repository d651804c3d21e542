"""Behaviour cloning of a Stable-Baselines3 policy: the start of the control arm `bc_ppo`.

Test: pytest tests/algorithms/test_cloning.py
"""

import numpy as np
import torch
from gymnasium.spaces import Discrete
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.nn.functional import cross_entropy

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
    """Fit a policy to demonstrated actions: the mean of a Gaussian by least squares, a categorical by cross-entropy.

    Args:
        policy: with a Box action space, or a Discrete one; changed in place, its own optimiser untouched. The std of a
            Gaussian stays as it is.
        observations: [n, O], as the policy sees them.
        actions: [n, D], or [n] integers.
        epochs, batch_size, learning_rate: of Adam.
        seed: of the order.

    Returns:
        The last epoch's mean squared error, or cross-entropy in nats.

    Raises:
        DemonstrationError: there are no rows, some are NaN or infinite or no choices, or the widths are not the
            policy's.
    """
    expected = (policy.observation_space.shape, policy.action_space.shape)
    if (observations.shape[1:], actions.shape[1:]) != expected:
        raise DemonstrationError(
            f"observations, actions: rows of shape {observations.shape[1:]} and {actions.shape[1:]}, "
            f"the policy has {expected[0]} and {expected[1]}; record demonstrations of this env"
        )
    if len(observations) == 0 or len(observations) != len(actions):
        raise DemonstrationError(
            f"observations, actions: {len(observations)} and {len(actions)} rows; give one action for each of some "
            "observations"
        )
    if not (np.isfinite(observations).all() and np.isfinite(actions).all()):
        raise DemonstrationError("observations, actions: NaN or infinity; leave such rows out")
    space = policy.action_space
    discrete = isinstance(space, Discrete)
    if isinstance(space, Discrete):
        _check_choices(actions, int(space.n))
    obs = torch.as_tensor(observations, dtype=torch.float32, device=policy.device)
    target = torch.as_tensor(actions, dtype=torch.int64 if discrete else torch.float32, device=policy.device)
    parts = (policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net)
    actor = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.Adam(actor, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    error = 0.0
    for _ in range(epochs):
        total = torch.zeros((), device=policy.device)
        for rows in torch.randperm(len(obs), generator=generator).to(policy.device).split(batch_size):
            out = policy.action_net(latents(policy, obs[rows])[0])
            loss = cross_entropy(out, target[rows]) if discrete else (out - target[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
        error = float(total) / len(obs)
    return error


def _check_choices(actions: np.ndarray, count: int) -> None:
    if not np.issubdtype(actions.dtype, np.integer) or not 0 <= actions.min() <= actions.max() < count:
        raise DemonstrationError(
            f"actions: {actions.dtype} from {actions.min()} to {actions.max()}; give integers from 0 to {count - 1}"
        )
