"""Both lanes tell the trainer the same story of the same env."""

import math
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.gymnasium_vector import GymnasiumVecEnv
from lago_fast.algorithms.lanes import ArrayLane, Sb3Lane, array_lane_of, episode_info, lane_of
from lago_fast.envs import make_metaworld
from tests.algorithms.point_env import PointEnv

STEPS, HORIZON = 14, 5


def rollout(lane_of):
    env = make_metaworld(["reach"], 2, seed=3, max_episode_steps=HORIZON)
    env.reset()
    lane = lane_of(env)
    lane.begin()
    rng = np.random.default_rng(0)
    rows = []
    while len(rows) < STEPS:
        step = lane.step(np.tile(rng.uniform(-1, 1, 4), (2, 1)).astype(np.float32))
        if not step.valid.all():
            rng = np.random.default_rng(len(rows))  # the row after an end took an action that nobody executed
            continue
        rows.append(step)
        if step.truncated.all():
            rng = np.random.default_rng(len(rows))
    env.close()
    return rows


def test_both_lanes_carry_the_same_transitions():
    array, sb3 = rollout(lambda env: ArrayLane(env.array_lane)), rollout(Sb3Lane)
    ends = 0
    for a, b in zip(array, sb3, strict=True):
        np.testing.assert_array_equal(a.truncated, b.truncated)
        np.testing.assert_array_equal(a.terminated, b.terminated)
        np.testing.assert_allclose(a.reward, b.reward)
        if a.truncated.any():
            ends += 1
            np.testing.assert_array_equal(b.replaced, [0, 1])
            np.testing.assert_array_equal(a.observation, b.last_observation)
            assert [e.length for e in a.episodes] == [e.length for e in b.episodes] == [HORIZON, HORIZON]
            np.testing.assert_allclose(
                [e.total_reward for e in a.episodes], [e.total_reward for e in b.episodes], rtol=1e-5
            )
        else:
            np.testing.assert_array_equal(a.observation, b.observation)
    assert ends == STEPS // HORIZON


def test_a_wrapper_hides_the_array_lane():
    env = make_metaworld(["reach"], 2, max_episode_steps=HORIZON)
    assert array_lane_of(env) is env.array_lane
    assert array_lane_of(VecNormalize(env)) is None
    env.close()


class TwoInstructions(PointEnv):
    """Says in turn which of two it is, in the state's second number too; in every info, or where an episode starts."""

    def __init__(self, first=0, everywhere=True):
        self.next, self.everywhere = first, everywhere

    def seen(self):
        return np.array([self.position[0], self.word], np.float32)

    def reset(self, **options):
        super().reset(**options)
        self.word, self.next = self.next, 1 - self.next
        return self.seen(), {"instruction_id": self.word}

    def step(self, action):
        _, reward, terminated, truncated, _ = super().step(action)
        info = {"instruction_id": self.word} if self.everywhere else {}
        return self.seen(), reward, terminated, truncated, info | ({"is_success": True} if truncated else {})


def assert_ids_are_those_of_the_observations(lane, n_envs):
    nothing = np.zeros((n_envs, 2), np.float32)
    ids, seen = [lane.begin()], []
    for _ in range(40):
        step = lane.step(nothing)
        ids.append(step.instruction_id)
        seen.append(step.observation[:, 1])
    np.testing.assert_array_equal(np.stack(ids)[0], [0, 1])
    np.testing.assert_array_equal(np.stack(ids[1:]), np.stack(seen))
    assert len({tuple(row) for row in np.stack(seen).tolist()}) == 2  # both came


@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor])
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_instruction_is_known_from_the_first_observation_on(wrap, everywhere):
    env = wrap(DummyVecEnv([partial(TwoInstructions, 0, everywhere), partial(TwoInstructions, 1, everywhere)]))
    env.reset()
    assert_ids_are_those_of_the_observations(Sb3Lane(env), 2)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_instruction_is_known_in_each_of_gymnasiums_ways(mode):
    env = GymnasiumVecEnv(SyncVectorEnv([TwoInstructions, partial(TwoInstructions, 1)], autoreset_mode=mode))
    env.reset()
    assert_ids_are_those_of_the_observations(lane_of(env), 2)


def test_success_counts_without_a_monitor_and_a_monitors_own_words_are_kept():
    env = DummyVecEnv([TwoInstructions])
    env.reset()
    lane = Sb3Lane(env)
    lane.begin()
    found = [lane.step(np.zeros((1, 2), np.float32)) for _ in range(32)]
    assert [step.successes for step in found if step.successes] == [[True], [True]]
    assert not any(step.episodes for step in found)
    monitored = DummyVecEnv([lambda: Monitor(TwoInstructions(), info_keywords=("is_success",))])
    monitored.reset()
    lane = Sb3Lane(monitored)
    lane.begin()
    (episode,) = [e for _ in range(16) for e in lane.step(np.zeros((1, 2), np.float32)).episodes]
    assert episode_info(episode, 0.0)["is_success"] is True


def test_a_truncation_whose_last_observation_is_missing_ends_the_episode_for_good():
    class Forgetful(DummyVecEnv):
        def step_wait(self):
            observation, reward, done, infos = super().step_wait()
            for info in infos:
                info.pop("terminal_observation", None)
            return observation, reward, done, infos

    env = Forgetful([PointEnv])
    env.reset()
    lane = Sb3Lane(env)
    lane.begin()
    last = [lane.step(np.zeros((1, 2), np.float32)) for _ in range(16)][-1]
    assert last.terminated.all()
    assert not last.truncated.any()


class Pool:
    """Two points that are stepped as one; no vector env by anybody's class."""

    num_envs, render_mode = 2, None
    observation_space, action_space = PointEnv.observation_space, PointEnv.action_space

    def __init__(self):
        self.t = 0

    def reset(self):
        return np.zeros((2, 2), np.float32)

    def step(self, actions):
        self.t += 1
        return np.float32(actions), np.ones(2, np.float32), np.full(2, self.t % 16 == 0)

    def get_attr(self, name, _indices=None):
        return [getattr(self, name)] * 2


class Adapter(VecEnvWrapper):
    """As EnvPool's example for Stable-Baselines3."""

    def __init__(self, pool):
        super().__init__(venv=pool)

    def reset(self):
        return self.venv.reset()

    def seed(self, seed=None):
        return [seed] * self.num_envs

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        observation, reward, done = self.venv.step(self.actions)
        infos = [{"terminal_observation": row.copy()} if d else {} for row, d in zip(observation, done, strict=True)]
        return observation, reward, done, infos


class BareAdapter(Adapter):
    """As SuperSuit's: without its base's constructor."""

    def __init__(self, pool):
        self.venv, self.num_envs, self.render_mode, self.reset_infos = pool, pool.num_envs, None, []
        self.observation_space, self.action_space = pool.observation_space, pool.action_space


class ForgetfulAdapter(Adapter):
    def __init__(self, pool):
        super().__init__(pool)
        del self.reset_infos


@pytest.mark.parametrize(
    "adapted", [Adapter, lambda pool: VecMonitor(Adapter(pool)), BareAdapter, ForgetfulAdapter], ids=range(4)
)
def test_an_adapter_of_a_foreign_vector_env_is_stepped(adapted):
    steps = one_episode(adapted(Pool()))
    np.testing.assert_array_equal(np.stack([step.instruction_id for step in steps]), 0)
    assert [step.terminated.all() for step in steps] == [False] * 15 + [True]


@pytest.mark.parametrize("adapted", [lambda pool: VecMonitor(Adapter(pool)), ForgetfulAdapter], ids=range(2))
def test_it_is_trained_on(adapted):
    model = FastKLPPO("MlpPolicy", adapted(Pool()), n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=0)
    assert model.learn(128).num_timesteps == 128


class Saying(DummyVecEnv):
    """Says at every step what it is told to, and at an end another thing as well; dones are numbers of one's choice."""

    def __init__(self, always=None, at_the_end=None, dones=bool):
        super().__init__([PointEnv, PointEnv])
        self.always, self.at_the_end, self.dones = always or {}, at_the_end or {}, dones

    def step_wait(self):
        observation, reward, done, infos = super().step_wait()
        infos = [info | self.always | (self.at_the_end if d else {}) for info, d in zip(infos, done, strict=True)]
        return observation, reward, done.astype(self.dones), infos


def one_episode(env):
    env.reset()
    lane = Sb3Lane(env)
    lane.begin()
    return [lane.step(np.zeros((env.num_envs, 2), np.float32)) for _ in range(16)]


def test_a_success_is_counted_as_the_env_says_it():
    assert one_episode(Saying(at_the_end={"is_success": 0.25}))[-1].successes == [0.25, 0.25]
    model = FastKLPPO("MlpPolicy", Saying(at_the_end={"is_success": 0.25}), n_steps=32, batch_size=32, device="cpu")
    assert list(model.learn(64).ep_success_buffer) == [0.25] * 4


@pytest.mark.parametrize("said", ["open the drawer", None, [1, 2], 1.5, math.nan, 2**70])
def test_an_instruction_that_is_no_integer_is_refused_by_name(said):
    with pytest.raises(errors.UnsupportedArgument, match=r'info\["instruction_id"\] of env 0 is .*give the integer'):
        one_episode(Saying(always={"instruction_id": said}))

    class Named(PointEnv):
        def reset(self, **options):
            return super().reset(**options)[0], {"instruction_id": said}

    with pytest.raises(errors.UnsupportedArgument, match=r'info\["instruction_id"\] of env 0 is'):
        one_episode(DummyVecEnv([Named]))


@pytest.mark.parametrize("dones", [np.float32, np.int64])
def test_dones_may_be_numbers(dones):
    steps = one_episode(Saying(dones=dones))
    assert steps[-1].truncated.dtype == steps[-1].terminated.dtype == bool
    assert [step.truncated.any() for step in steps] == [False] * 15 + [True]
    assert not any(step.terminated.any() for step in steps)


def test_an_episodes_record_of_arrays_is_read_and_kept():
    class Recorded(gym.wrappers.RecordEpisodeStatistics):
        def step(self, action):
            *rest, info = super().step(action)
            if "episode" in info:
                info["episode"] = {key: np.array([value]) for key, value in info["episode"].items()}
            return *rest, info

    (episode,) = one_episode(DummyVecEnv([lambda: Recorded(PointEnv())]))[-1].episodes
    assert episode.length == 16
    assert episode.total_reward == pytest.approx(float(episode.info["r"][0]))
    assert isinstance(episode.total_reward, float)
    assert isinstance(episode_info(episode, 0.0)["r"], np.ndarray)
    assert not any(step.episodes for step in one_episode(Saying(always={"episode": None})))
