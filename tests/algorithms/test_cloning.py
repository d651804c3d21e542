"""Behaviour cloning of a policy: it fits what is linear, and refuses another env's rows."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
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


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (np.full((10, 2), np.nan, np.float32), np.zeros(10, np.int64)),
        (np.zeros((0, 2), np.float32), np.zeros(0, np.int64)),
        (np.zeros((10, 2), np.float32), np.zeros(5, np.int64)),
        (np.zeros((10, 2), np.float32), np.full(10, 4)),
        (np.zeros((10, 2), np.float32), np.full(10, 0.7)),
    ],
)
def test_rows_that_teach_nothing_are_refused_and_the_policy_stays(observations, actions):
    model = PPO("MlpPolicy", make_vec_env(DiscretePointEnv, n_envs=1), device="cpu", seed=0)
    before = [p.detach().clone() for p in model.policy.parameters()]
    with pytest.raises(DemonstrationError, match="actions"):
        clone_policy(model.policy, observations, actions)
    assert all(map(torch.equal, before, model.policy.parameters()))


def test_an_extractor_of_images_is_fitted_too():
    class Seeing(DiscretePointEnv):
        observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    policy = PPO("CnnPolicy", make_vec_env(Seeing, n_envs=1), n_steps=8, batch_size=8, device="cpu", seed=0).policy
    images = np.random.default_rng(0).integers(0, 256, (32, *policy.observation_space.shape)).astype(np.float32)
    before = policy.features_extractor.cnn[0].weight.detach().clone()
    clone_policy(policy, images, np.arange(32) % 4, epochs=2)
    assert not torch.equal(policy.features_extractor.cnn[0].weight, before)
