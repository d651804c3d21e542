"""A policy that its user changed trains as Stable-Baselines3's PPO trains it, whatever is computed natively."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from lago_fast import FastKLPPO, make_clevr_robot
from lago_fast.errors import UnsupportedArgument

STEPS, CHOICE = 128, spaces.Discrete(3)


class Noise(gymnasium.Env):
    """Observations and rewards that only the seed decides; an action that is none is refused."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space, self.t = action_space, 0

    def reset(self, *, seed: int | None = None, **_: Any) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action), repr(action)
        self.t += 1
        return self._seen(), float(self.np_random.normal() + np.sum(action)), False, self.t >= 12, {}

    def _seen(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


def model_of(algorithm: type, policy: Any = "MlpPolicy", action_space: spaces.Space = CHOICE, **options):
    env = make_vec_env(lambda: Noise(action_space), n_envs=2, seed=0)
    settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "learning_rate": 1e-2, "seed": 1, "device": "cpu"}
    return algorithm(policy, env, **{**settings, **options})


class Tied(ActorCriticPolicy):
    """Actor and critic share their hidden layers."""

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.value_net = self.mlp_extractor.policy_net


class Tenfold(nn.Module):
    features_dim = 3

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return 10 * observations.flatten(1)


class Forget(BaseCallback):
    """Gives the policy other tensors, all zero, in the middle of each rollout."""

    def _on_step(self) -> bool:
        if self.n_calls % 32 == 3:
            self.model.policy.load_from_vector(0 * self.model.policy.parameters_to_vector())
        return True


def shared_layer(model: Any) -> None:
    model.policy.mlp_extractor.value_net[0] = model.policy.mlp_extractor.policy_net[0]


def clamped(model: Any) -> None:
    for parameter in model.policy.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-1e-4, 1e-4))


def other_extractor(model: Any) -> None:
    model.policy.features_extractor = Tenfold()


def other_forward(model: Any) -> None:
    body = model.policy.mlp_extractor.policy_net[0]
    body.forward = lambda x: nn.functional.linear(10 * x, body.weight, body.bias)


def other_method(model: Any) -> None:
    own = model.policy.extract_features
    model.policy.extract_features = lambda observations, *args: own(10 * observations, *args)


def untrained_layer(model: Any) -> None:
    torch.manual_seed(3)
    model.policy.action_net = nn.Linear(64, 3)


def fewer_steps(model: Any) -> None:
    model.n_steps = 16
    if type(model) is PPO:  # whose buffer does not follow
        spaces_ = model.observation_space, model.action_space
        model.rollout_buffer = RolloutBuffer(16, *spaces_, n_envs=2, gamma=model.gamma, gae_lambda=model.gae_lambda)


CHANGES = [
    shared_layer,
    clamped,
    other_extractor,
    other_forward,
    other_method,
    untrained_layer,
    fewer_steps,
]


def assert_same(make: Callable[[type], Any]) -> None:
    theirs, ours = (make(algorithm).policy.state_dict() for algorithm in (PPO, FastKLPPO))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_calls_of_learn(change):
    def make(algorithm: type) -> Any:
        model = model_of(algorithm).learn(64)
        change(model)
        return model.learn(STEPS, reset_num_timesteps=False)

    assert_same(make)


def test_hidden_layers_that_actor_and_critic_share():
    assert_same(lambda algorithm: model_of(algorithm, Tied, vf_coef=0.0).learn(STEPS))


def test_other_tensors_in_the_middle_of_a_rollout():
    assert_same(lambda algorithm: model_of(algorithm).learn(STEPS, callback=Forget()))


def test_several_choices_reach_the_env_as_integers():
    space = spaces.MultiDiscrete([3, 2])
    assert_same(lambda algorithm: model_of(algorithm, action_space=space).learn(STEPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    def make(algorithm: type) -> Any:
        model = model_of(algorithm).learn(64)
        torch.set_default_dtype(dtype)
        try:
            return model.learn(64, reset_num_timesteps=False)
        finally:
            torch.set_default_dtype(torch.float32)

    assert_same(make)


def test_anothers_rollout_buffer_is_refused():
    model = model_of(FastKLPPO)
    model.rollout_buffer = RolloutBuffer(32, model.observation_space, model.action_space, n_envs=2)
    with pytest.raises(UnsupportedArgument, match=r"rollout_buffer: .* set n_steps"):
        model.learn(64)


def test_rollouts_of_another_length_are_not_overlapped():
    env = make_clevr_robot(2)
    model = FastKLPPO("MlpPolicy", env, n_steps=8, batch_size=16, overlap="update", device="cpu", seed=0).learn(16)
    model.n_steps = 4
    with pytest.raises(UnsupportedArgument, match="n_steps"):
        model.learn(8, reset_num_timesteps=False)
