"""Without a prior, FastKLPPO is Stable-Baselines3's PPO: same buffer, same step; same seed, same training."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from lago_fast import FastKLPPO

OPTIONS = {"n_steps": 16, "batch_size": 16, "n_epochs": 3, "seed": 3, "device": "cpu"}


def filled_pair(env_id: str, **options):
    """Return SB3's PPO and ours with equal weights and equal, filled buffers."""
    env = make_vec_env(env_id, n_envs=4, seed=0)
    theirs = PPO("MlpPolicy", env, **OPTIONS, **options)
    ours = FastKLPPO("MlpPolicy", env, **OPTIONS, **options, kl_coef=0.0)
    ours.policy.load_state_dict(copy.deepcopy(theirs.policy.state_dict()))
    for model in (theirs, ours):
        model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    buffer: SB3RolloutBuffer = theirs.rollout_buffer
    mine = ours.rollout_buffer
    for t in range(OPTIONS["n_steps"]):
        obs = rng.normal(size=(4, *env.observation_space.shape)).astype(np.float32)
        with torch.no_grad():
            actions, values, log_probs = theirs.policy(torch.as_tensor(obs))
        rewards = rng.normal(size=4).astype(np.float32)
        starts = rng.random(4) < 0.1
        stored = actions.numpy() if isinstance(env.action_space, gym.spaces.Box) else actions.numpy().reshape(-1, 1)
        buffer.add(obs, stored, rewards, starts, values, log_probs + 0.1)
        mine.observations[t] = torch.as_tensor(obs)
        mine.actions[t] = actions
        mine.values[t], mine.log_probs[t] = values.flatten(), log_probs + 0.1
        mine.rewards[t] = torch.as_tensor(rewards)
        if t:  # SB3 marks the step after an end, ours the end
            mine.terminated[t - 1] = torch.as_tensor(starts)
    last_values, last_dones = torch.as_tensor(rng.normal(size=4)).float(), rng.random(4) < 0.5
    buffer.compute_returns_and_advantage(last_values, last_dones)
    mine.terminated[-1] = torch.as_tensor(last_dones)
    mine.valid[:] = True
    mine.bootstrap(last_values, [])
    mine.compute_returns_and_advantage(ours.gamma, ours.gae_lambda, "auto")
    return theirs, ours


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("options", [{}, {"clip_range_vf": 0.2, "ent_coef": 0.01, "normalize_advantage": False}])
def test_same_step_from_the_same_buffer(env_id, options):
    theirs, ours = filled_pair(env_id, **options)
    np.testing.assert_allclose(ours.rollout_buffer.advantages.numpy(), theirs.rollout_buffer.advantages, atol=1e-5)
    before = copy.deepcopy(ours.policy.state_dict())
    for model in (theirs, ours):
        np.random.seed(7)  # noqa: NPY002 - both buffers permute by the global generator
        model.train()
    moved = 0.0
    for name, expected in theirs.policy.state_dict().items():
        got = ours.policy.state_dict()[name]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        moved += (expected - before[name]).abs().max().item()
    assert moved > 1e-3  # the step did something
    for key, value in theirs.logger.name_to_value.items():
        assert ours.logger.name_to_value[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_target_kl_stops_where_sb3_stops():
    theirs, ours = filled_pair("Pendulum-v1", target_kl=0.003)
    for model in (theirs, ours):
        np.random.seed(7)  # noqa: NPY002
        model.train()
    assert ours._n_updates == theirs._n_updates < OPTIONS["n_epochs"]
    for name, expected in theirs.policy.state_dict().items():
        torch.testing.assert_close(ours.policy.state_dict()[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_same_seed_same_training(env_id, impl):
    # several iterations, with ends and truncations (Pendulum truncates at 200), on one vector env class
    weights = []
    for algorithm, own in ((PPO, {}), (FastKLPPO, {"impl": impl, "kl_coef": 0.0})):
        env = make_vec_env(env_id, n_envs=2, seed=0)  # a DummyVecEnv
        model = algorithm("MlpPolicy", env, n_steps=128, batch_size=64, n_epochs=2, seed=1, device="cpu", **own)
        model.learn(3 * 256)
        weights.append(model.policy.state_dict())
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-3, atol=1e-4)
