"""Counting successes: the interval against published values, pooling, and a real expert against chance."""

import pytest

from lago_fast.evaluate import TaskResult, evaluate, expert_actor, pool, random_actor, wilson
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


def test_expert_succeeds_where_chance_does_not():
    settings = EnvSettings(tasks=("drawer-close", "reach"), max_episode_steps=120)
    expert = evaluate(expert_actor(settings, 3), settings, episodes_per_task=3, seed=1)
    chance = evaluate(random_actor(4, seed=0), settings, episodes_per_task=3, seed=1)
    assert {task: r.successes for task, r in expert.items()} == {"drawer-close": 3, "reach": 3}
    assert chance["reach"].successes < 3
    assert expert["reach"].mean_return > chance["reach"].mean_return
