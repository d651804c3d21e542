"""Counting successes: the interval against published values, pooling, and a real expert against chance."""

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv
from lago_fast.evaluate import (
    TaskResult,
    draw_actions,
    evaluate,
    play_round,
    pool,
    random_actor,
    script_actors,
    weighted_mean,
    wilson,
)
from lago_fast.presets import EnvSettings


def test_wilson_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_pool_adds_episodes_up():
    pooled = pool([TaskResult(10, 5, 4, 1.0), TaskResult(30, 6, 3, 5.0)])
    assert pooled == TaskResult(40, 11, 7, 4.0)
    assert pooled.summary()["success"] == pytest.approx(11 / 40)


def test_the_interval_of_a_mean_of_rates():
    one = TaskResult(263, 81, 0, 0.0)
    # of a single rate it is Wilson's
    mean, interval = weighted_mean([(one, 1.0)])
    assert mean == pytest.approx(81 / 263)
    assert interval == pytest.approx(wilson(81, 263))
    # of two alike, weighed half each, it is narrower by the square root of two
    mean, (low, high) = weighted_mean([(one, 0.5), (one, 0.5)])
    assert mean == pytest.approx(81 / 263)
    assert high - mean == pytest.approx((wilson(81, 263)[1] - mean) / 2**0.5)
    assert mean - low == pytest.approx((mean - wilson(81, 263)[0]) / 2**0.5)


def test_actions_are_drawn_with_their_probabilities():
    log_probs = np.log(np.tile([0.7, 0.1, 0.2], (20_000, 1)))
    drawn = draw_actions(log_probs, np.random.default_rng(0))
    assert np.bincount(drawn) / len(drawn) == pytest.approx([0.7, 0.1, 0.2], abs=0.012)


class Counting(ArrayVecEnv):
    """Two envs whose episodes last 2 and 4 steps, pay 1 per step and succeed at the end of the first."""

    num_envs, state_dim, tasks, instructions = 2, 1, ["t"], ["do it"]
    observation_space, action_space = Box(0, 9, (1,)), Discrete(2)
    task_id = np.zeros(2, np.int64)

    def reset(self):
        self.t = np.zeros(2, np.int64)
        return ArrayReset(self.t[:, None].astype(np.float32), np.zeros(2, np.int64))

    def send(self, actions):
        assert actions.shape == (2,)

    def recv(self):
        restarts = self.t == [2, 4]
        self.t = np.where(restarts, 0, self.t + 1)
        ended, valid = self.t == [2, 4], ~restarts
        ones = valid.astype(np.float32)
        success = ended & [True, False]
        seen = self.t[:, None].astype(np.float32)
        return ArrayStep(seen, ones, ones, success, ended & ~success, valid, success, np.zeros(2, np.int64))

    def close(self):
        pass


def test_a_round_counts_one_episode_of_each_env_however_long():
    seen = []

    def act(view):
        seen.append(view.state[:, 0].tolist())
        return np.zeros(2, np.int64)

    success, at_end, total = play_round(Counting(), act, 100)
    assert success.tolist() == [True, False]
    assert at_end.tolist() == [True, False]
    assert total.tolist() == [2, 4]
    assert len(seen) == 4


def test_expert_succeeds_where_chance_does_not():
    settings = EnvSettings(tasks=("drawer-close", "reach"), max_episode_steps=120)
    expert = evaluate(script_actors(settings)["expert"], settings, episodes_per_task=3, seed=1)
    chance = evaluate(random_actor(4, seed=0), settings, episodes_per_task=3, seed=1)
    assert {task: r.successes for task, r in expert.items()} == {"drawer-close": 3, "reach": 3}
    assert chance["reach"].successes < 3
    assert expert["reach"].mean_return > chance["reach"].mean_return
