"""The baseline of speed tables: official Meta-World with a visible goal, as a stable-baselines3 user steps it."""

import numpy as np
import pytest

from lago_fast.envs.experts import make_expert
from lago_fast.envs.official import official_makers
from lago_fast.errors import UnknownTask


def test_goal_is_visible_and_new_at_each_reset_and_the_row_is_appended():
    row = np.array([7.0, 8.0], np.float32)
    env = official_makers(("reach",), 1, 20, {"reach": row})[0]()
    first, second = env.reset()[0], env.reset()[0]
    assert env.observation_space.contains(first)
    np.testing.assert_array_equal(first[39:], row)
    assert np.abs(first[36:39]).sum() > 0
    assert np.abs(first[36:39] - second[36:39]).max() > 1e-4
    for t in range(20):
        _, _, terminated, truncated, _ = env.step(np.zeros(4, np.float32))
        assert not terminated
        assert truncated == (t == 19)


def test_the_expert_solves_it():
    env, act = official_makers(("reach",), 1, 100, None)[0](), make_expert("reach")
    observation, _ = env.reset()
    success = False
    for _ in range(100):
        observation, _, _, _, info = env.step(act(observation[None])[0])
        success |= bool(info["success"])
    assert success


def test_unknown_task_is_refused():
    with pytest.raises(UnknownTask, match="reach"):
        official_makers(("reahc",), 1, 10, None)[0]()
