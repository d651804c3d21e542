"""Whatever Stable-Baselines3's PPO trains on, FastKLPPO trains on to the same weights: spaces, policies, wrappers."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize

from lago_fast import FastKLPPO, errors
from lago_fast.envs.sb3_adapter import SB3VecEnv
from tests.algorithms.array_points import ArrayPoints
from tests.algorithms.point_env import PointEnv, ScriptedPrior

OPTIONS = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "device": "cpu", "seed": 1}


class Noise(gym.Env):
    """Observations and rewards drawn anew at each step, the reward moved by the action; ends and truncates."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        reward = float(self.np_random.normal() + np.sum(action))
        ends = bool(self.np_random.random() < 0.1)
        return self.observation_space.sample(), reward, ends, self.t >= 12, {}


VECTOR, BOX = spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
DICT = spaces.Dict({"image": IMAGE, "vector": VECTOR, "which": spaces.Discrete(3)})


class Doubled(BaseFeaturesExtractor):
    """A feature extractor of the user's own."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=6)
        self.linear = torch.nn.Linear(3, 6)

    def forward(self, observations):
        return 2 * self.linear(observations)


class Steady(ActorCriticPolicy):
    """A policy class of the user's own: its values are never negative."""

    def predict_values(self, obs):
        return super().predict_values(obs).abs()

    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values.abs(), log_prob, entropy


CASES = {
    "MultiDiscrete": (VECTOR, spaces.MultiDiscrete([3, 2]), "MlpPolicy", {}),
    "MultiBinary": (VECTOR, spaces.MultiBinary(3), "MlpPolicy", {}),
    "observation Discrete": (spaces.Discrete(4), BOX, "MlpPolicy", {}),
    "observation MultiDiscrete": (spaces.MultiDiscrete([3, 2]), spaces.Discrete(2), "MlpPolicy", {}),
    "observation MultiBinary": (spaces.MultiBinary(4), spaces.Discrete(2), "MlpPolicy", {}),
    "observation float64": (spaces.Box(-1, 1, (3,), np.float64), BOX, "MlpPolicy", {}),
    "image": (IMAGE, spaces.Discrete(3), "CnnPolicy", {}),
    "dictionary": (DICT, BOX, "MultiInputPolicy", {}),
    "gSDE": (VECTOR, BOX, "MlpPolicy", {"use_sde": True, "sde_sample_freq": 4}),
    "gSDE squashed": (VECTOR, BOX, "MlpPolicy", {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "net_arch": (VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [16, 8]}}}),
    "no hidden layer": (VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"net_arch": []}}),
    "own extractor": (VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"features_extractor_class": Doubled}}),
    "extractors apart": (
        VECTOR,
        BOX,
        "MlpPolicy",
        {"policy_kwargs": {"features_extractor_class": Doubled, "share_features_extractor": False}},
    ),
    "own policy class": (VECTOR, BOX, Steady, {}),
    "own optimizer": (VECTOR, BOX, "MlpPolicy", {"policy_kwargs": {"optimizer_class": torch.optim.RMSprop}}),
}


def weights_after(algorithm, env, policy, iterations=3, **options):
    model = algorithm(policy, env, **{**OPTIONS, **options})
    model.learn(iterations * OPTIONS["n_steps"] * env.num_envs)
    return model.policy.state_dict()


def assert_same(got, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_training(case):
    observation_space, action_space, policy, options = CASES[case]

    def make():
        return make_vec_env(lambda: Noise(observation_space, action_space), n_envs=2, seed=0)

    assert_same(weights_after(FastKLPPO, make(), policy, **options), weights_after(PPO, make(), policy, **options))


@pytest.mark.parametrize("case", CASES)
def test_models_are_read_by_both_and_predict_one_observation_or_many(case, tmp_path):
    observation_space, action_space, policy, options = CASES[case]
    trusted = {} if case not in ("own extractor", "extractors apart", "own policy class") else {"trust_pickle": True}
    env = make_vec_env(lambda: Noise(observation_space, action_space), n_envs=2, seed=0)
    env.seed(3)
    many = env.reset()
    one = {key: value[0] for key, value in many.items()} if isinstance(many, dict) else many[0]
    for writer, reader in ((PPO, FastKLPPO), (FastKLPPO, PPO)):
        model = writer(policy, env, **{**OPTIONS, **options}).learn(64)
        model.save(tmp_path / "model.zip")
        loaded = reader.load(tmp_path / "model.zip", env=env, device="cpu", **(trusted if reader is FastKLPPO else {}))
        for seen in (many, one):
            actions, state = loaded.predict(seen, deterministic=True)
            # of a network that is computed natively here the last bit may differ
            np.testing.assert_allclose(actions, model.predict(seen, deterministic=True)[0], rtol=1e-5, atol=1e-6)
            assert state is None
            assert actions.shape == ((2,) if seen is many else ()) + action_space.shape
        drawn = loaded.predict(many)[0]
        assert all(action_space.contains(action) for action in drawn)
        loaded.learn(64, reset_num_timesteps=False)


def test_a_guided_guarded_model_is_read_by_stable_baselines_without_its_prior(tmp_path):
    env = make_vec_env(PointEnv, 4)
    model = FastKLPPO("MlpPolicy", env, **OPTIONS, prior=ScriptedPrior(), kl_coef=0.5, guard=True).learn(512)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=env, device="cpu")
    observation = env.reset()
    np.testing.assert_allclose(
        loaded.predict(observation, deterministic=True)[0],
        model.predict(observation, deterministic=True)[0],
        rtol=1e-5,
        atol=1e-6,
    )
    assert loaded.learn(256, reset_num_timesteps=False).num_timesteps == model.num_timesteps + 256


WRAPPERS = {
    "VecNormalize": VecNormalize,
    "VecFrameStack": lambda env: VecFrameStack(env, 2),
    "VecMonitor": VecMonitor,
    "both": lambda env: VecFrameStack(VecNormalize(env), 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_same_seed_same_training_behind_a_wrapper(wrapper):
    def make():
        env = DummyVecEnv([lambda: Noise(VECTOR, BOX)] * 2)
        env.seed(0)
        return WRAPPERS[wrapper](env)

    assert_same(weights_after(FastKLPPO, make(), "MlpPolicy"), weights_after(PPO, make(), "MlpPolicy"))


def test_same_seed_same_training_with_rewards_and_observations_of_an_array_lane_normalised():
    def make():
        env = SB3VecEnv(ArrayPoints(4))
        env.array_lane.normalizer = None
        return VecNormalize(env)

    got, expected = (weights_after(algorithm, make(), "MlpPolicy") for algorithm in (FastKLPPO, PPO))
    assert_same(got, expected)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "policy", "options", "says"),
    [
        (PointEnv.observation_space, spaces.MultiDiscrete([2, 2]), "MlpPolicy", {}, "MultiCategorical"),
        (PointEnv.observation_space, BOX, "MlpPolicy", {"use_sde": True}, "StateDependentNoise"),
        (PointEnv.observation_space, BOX, Steady, {}, "Steady"),
        (spaces.Dict({"x": PointEnv.observation_space}), BOX, "MultiInputPolicy", {}, "Dict"),
    ],
)
def test_a_prior_without_a_closed_kl_is_refused(observation_space, action_space, policy, options, says):
    env = make_vec_env(lambda: Noise(observation_space, action_space), n_envs=2)
    with pytest.raises(errors.UnsupportedArgument, match=f"prior: .*{says}"):
        FastKLPPO(policy, env, prior=ScriptedPrior(), **OPTIONS, **options)


def test_the_buffer_reads_as_arrays():
    env = make_vec_env(lambda: Noise(VECTOR, BOX), n_envs=2, seed=0)
    model = FastKLPPO("MlpPolicy", env, **OPTIONS).learn(64)
    for column in (model.rollout_buffer.advantages, model.rollout_buffer.returns):
        array = np.asarray(column)
        assert array.shape == (32, 2)
        assert np.isfinite(array).all()
        assert np.mean(column.flatten().numpy()) == pytest.approx(array.mean(), rel=1e-5)
