"""gymnasium's vector envs are taken as they are: all three autoreset modes see the same episodes."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.gymnasium_vector import GymnasiumVecEnv

OPTIONS = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "device": "cpu", "seed": 0}


class Counter(gym.Env):
    """Shows its step in the episode; reward 1; ends after 3 steps, every other episode is cut off after 5."""

    observation_space = gym.spaces.Box(-1, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.t, self.episode = 0, self.episode + 1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        del action
        self.t += 1
        terminated, truncated = self.episode % 2 == 0 and self.t == 3, self.t == 5
        info = {"is_success": terminated} if terminated or truncated else {}
        return np.full(1, self.t, np.float32), 1.0, terminated, truncated, info


def make(mode, n=2, env=Counter):
    return SyncVectorEnv([env] * n, autoreset_mode=mode)


class Watch(BaseCallback):
    def __init__(self):
        super().__init__()
        self.episodes = []

    def _on_step(self):
        self.episodes += self.locals["episodes"]
        return True


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodes_and_their_success_are_the_same_in_every_mode(mode):
    watch = Watch()
    model = FastKLPPO("MlpPolicy", make(mode), **OPTIONS).learn(1, callback=watch)
    mine = [(e.total_reward, e.length, e.success) for e in watch.episodes if e.env == 0]
    assert mine[:3] == [(3.0, 3, True), (5.0, 5, False), (3.0, 3, True)]
    # a row that only resets is no step
    resets = 2 * 3 if mode is AutoresetMode.NEXT_STEP else 0
    assert model.num_timesteps == 32 - resets
    assert model.ep_info_buffer[0]["l"] == 3


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_success_is_counted_as_the_env_says_it(mode):
    class Partly(Counter):
        def step(self, action):
            *step, info = super().step(action)
            return *step, dict.fromkeys(info, 0.25)

    model = FastKLPPO("MlpPolicy", make(mode, env=Partly), **OPTIONS).learn(1)
    assert set(model.ep_success_buffer) == {0.25}


@pytest.mark.parametrize("at_reset", [True, False])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_instruction_that_is_no_integer_is_refused_by_name(mode, at_reset):
    class Named(Counter):
        def reset(self, **options):
            return super().reset(**options)[0], {"instruction_id": "open it"} if at_reset else {}

        def step(self, action):
            *step, _ = super().step(action)
            return *step, {"instruction_id": 1.5}

    with pytest.raises(errors.UnsupportedArgument, match=r'info\["instruction_id"\] of env 0 is .*give the integer'):
        FastKLPPO("MlpPolicy", make(mode, env=Named), **OPTIONS).learn(1)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_ends_reach_the_buffer_with_what_follows_them(mode):
    model = FastKLPPO("MlpPolicy", make(mode, n=1), **OPTIONS, learning_rate=0.0).learn(1)
    buffer = model.rollout_buffer
    ends = np.flatnonzero((buffer.terminated | buffer.truncated)[:, 0])
    shown = buffer.observations[:, 0, 0].numpy()
    gap = 1 if mode is AutoresetMode.NEXT_STEP else 0
    assert ends.tolist()[:3] == [2, 7 + gap, 10 + 2 * gap]
    assert shown[ends].tolist()[:3] == [2, 4, 2]  # the state acted on before the end
    assert bool(buffer.truncated[7 + gap, 0])
    # the truncated row is bootstrapped from its true last observation, not from the next first one
    value = model.policy.predict_values(model.policy.obs_to_tensor(np.full((1, 1), 5, np.float32))[0])
    assert buffer.next_values[7 + gap, 0].item() == pytest.approx(value.item(), rel=1e-5)


def test_the_stable_baselines_lane_shows_the_last_observation_and_the_next_first_one():
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        env = GymnasiumVecEnv(make(mode))
        assert env.reset().tolist() == [[0], [0]]
        for _ in range(3):
            observation, reward, done, infos = env.step(np.zeros(2, np.int64))
        assert done.all()
        assert observation.tolist() == [[0], [0]]
        assert infos[0]["terminal_observation"].tolist() == [3]
        assert infos[0]["TimeLimit.truncated"] is False
        assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (3.0, 3)
        for _ in range(5):
            _, reward, done, infos = env.step(np.zeros(2, np.int64))
        assert done.all()
        assert infos[1]["TimeLimit.truncated"] is True
        assert reward.tolist() == [1, 1]


def test_the_same_weights_as_from_stable_baselines_vector_env():
    weights = []
    for env in (
        gym.make_vec(
            "CartPole-v1", 2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}
        ),
        DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2),
    ):
        weights.append(FastKLPPO("MlpPolicy", env, **OPTIONS).learn(128).policy.state_dict())
    for name, expected in weights[1].items():
        np.testing.assert_allclose(weights[0][name], expected, rtol=1e-5, atol=1e-6)


def test_gymnasiums_default_trains_and_a_wrapper_before_it_is_refused():
    env = gym.make_vec("CartPole-v1", 3, vectorization_mode="sync")
    model = FastKLPPO("MlpPolicy", env, **OPTIONS).learn(96)
    assert 96 <= model.num_timesteps < 96 + 48
    assert model.get_env().get_attr("spec")[0].id == "CartPole-v1"
    wrapped = VecNormalize(GymnasiumVecEnv(gym.make_vec("CartPole-v1", 3, vectorization_mode="sync")))
    with pytest.raises(errors.UnsupportedArgument, match="SAME_STEP"):
        FastKLPPO("MlpPolicy", wrapped, **OPTIONS).learn(96)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_observations_in_dictionaries_are_taken(mode):
    # the channel first, or last: then Stable-Baselines3 puts a wrapper before the env, that moves it
    shape = (1, 36, 36) if mode is AutoresetMode.NEXT_STEP else (36, 36, 1)
    space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, shape, np.uint8), "step": Counter.observation_space})

    class Shown(gym.ObservationWrapper):
        observation_space = space

        def observation(self, observation):
            return {"image": np.full(shape, int(observation[0]), np.uint8), "step": observation}

    env = make(mode, env=lambda: Shown(Counter()))
    model = FastKLPPO("MultiInputPolicy", env, **OPTIONS).learn(64)
    shown = model.rollout_buffer.observations
    valid = model.rollout_buffer.valid
    assert set(shown) == {"image", "step"}
    assert torch.equal(shown["image"].flatten(2)[..., 0][valid].float(), shown["step"][..., 0][valid])
    assert model.predict(env.reset()[0])[0].shape == (2,)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_callbacks_see_the_episodes_that_ended_in_every_mode(mode):
    seen = []

    class Look(BaseCallback):
        def _on_step(self):
            seen.extend(info for info in self.locals["infos"] if "episode" in info)
            return True

    FastKLPPO("MlpPolicy", make(mode), **OPTIONS).learn(32, callback=Look())
    assert [info["episode"]["l"] for info in seen[:4]] == [3, 3, 5, 5]
    assert [info["terminal_observation"].tolist() for info in seen[:4]] == [[3], [3], [5], [5]]
    assert [info["TimeLimit.truncated"] for info in seen[:4]] == [False, False, True, True]
