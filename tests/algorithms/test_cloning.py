"""Behaviour cloning of a policy: it fits what is linear, and refuses another env's rows."""

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from lago_fast.algorithms.cloning import clone_policy
from lago_fast.errors import DemonstrationError
from tests.algorithms.point_env import DiscretePointEnv, PointEnv


def test_the_mean_is_fitted_and_the_std_left_alone():
    model = PPO("MlpPolicy", make_vec_env(PointEnv, n_envs=1), device="cpu", seed=0)
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (2000, 2)).astype(np.float32)
    log_std = model.policy.log_std.detach().clone()
    error = clone_policy(model.policy, observations, -0.5 * observations, epochs=20)
    assert error < 1e-3
    probe = rng.uniform(-1, 1, (50, 2)).astype(np.float32)
    np.testing.assert_allclose(model.predict(probe, deterministic=True)[0], -0.5 * probe, atol=0.1)
    assert torch.equal(model.policy.log_std, log_std)


def test_discrete_actions_are_fitted_by_cross_entropy():
    model = PPO("MlpPolicy", make_vec_env(DiscretePointEnv, n_envs=1), device="cpu", seed=0)
    observations = np.random.default_rng(0).uniform(-1, 1, (2000, 2)).astype(np.float32)
    actions = np.where(observations[:, 0] > 0, 1, 0)
    assert clone_policy(model.policy, observations, actions, epochs=40) < 0.1
    assert (model.predict(observations, deterministic=True)[0] == actions).mean() > 0.97
    with pytest.raises(DemonstrationError, match="actions"):
        clone_policy(model.policy, observations, actions[:, None])


def test_rows_of_another_env_are_refused():
    model = PPO("MlpPolicy", make_vec_env(PointEnv, n_envs=1), device="cpu")
    with pytest.raises(DemonstrationError, match=r"\(3,\)"):
        clone_policy(model.policy, np.zeros((4, 3), np.float32), np.zeros((4, 2), np.float32))
