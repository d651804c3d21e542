"""Both lanes tell the trainer the same story of the same env."""

from functools import partial

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

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
