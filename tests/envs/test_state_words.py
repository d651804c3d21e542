"""States in words, by hand."""

import numpy as np
import pytest

from lago_fast.envs.clevr_actions import PUSH_NAMES, PUSHES
from lago_fast.envs.metaworld import MetaworldArrayEnv
from lago_fast.envs.state_words import describe_clevr, describe_metaworld


def test_by_hand():
    state = np.zeros(39)
    state[:4] = 0.1, 0.6, 0.2, 0.53
    state[4:7] = 0.13, 0.5, 0.15
    assert describe_metaworld(state) == (
        "hand at 0.10, 0.60, 0.20 m, gripper 53 % open; object 3 cm right, 10 cm back, 5 cm down of the hand"
    )
    state[11:14] = 0.1, 0.6, 0.205
    state[36:] = 0.03, 0.8, 0.15
    assert describe_metaworld(state).endswith(
        "; second object within 1 cm of the hand; goal 10 cm left, 30 cm ahead of the object"
    )


@pytest.mark.parametrize("task", ["push", "drawer-open"])
def test_of_a_real_state(task):
    env = MetaworldArrayEnv([task], 1)
    try:
        said = env.describe_state(env.reset().observation[0])
    finally:
        env.close()
    assert said.startswith("hand at ")
    assert "goal " in said
    assert len(env.action_names) == 4


def test_clevr_balls_are_where_they_are():
    state = np.array([0.0, 0.0, 0.2, -0.1, -0.3, 0.0, 0.0, 0.25, 0.005, 0.0])
    assert describe_clevr(state) == (
        "red within 1 cm; blue 20 cm right, 10 cm back; green 30 cm left; purple 25 cm ahead; cyan within 1 cm"
    )


def test_every_push_has_the_name_of_where_it_goes():
    assert len(PUSH_NAMES) == 40
    for name, (x, y) in zip(PUSH_NAMES, np.tile(PUSHES, (5, 1)), strict=True):
        words = name.split(" ")[1].split("-")
        assert ("right" in words, "left" in words, "behind" in words, "front" in words) == (x > 0, x < 0, y > 0, y < 0)
    assert PUSH_NAMES[8].startswith("blue")
