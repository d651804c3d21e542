"""CLEVR-Robot by gymnasium's interface."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import lago_fast.envs  # noqa: F401 - registers the environment
from lago_fast.envs.clevr_gym import ClevrRobotEnv
from lago_fast.errors import NonFiniteError, UnknownTask, UnsupportedArgument

ID = "lago_fast/ClevrRobot-v0"
SCENE = np.array([(-0.4, 0.0), (0.0, 0.0), (0.4, 0.0), (-0.2, 0.4), (0.2, 0.4)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text": True},
        {"split": "easy"},
        {"split": ["line"], "observation": "positions_velocities"},
        {"observation": "order_invariant"},
        {"observation": "image"},
        {"action_type": "discrete"},
    ],
)
def test_check_env_has_nothing_to_say(settings):
    env = gym.make(ID, render_mode="rgb_array", **{"renderer": "drawing", **settings})
    check_env(env.unwrapped)
    env.close()


def test_it_is_found_without_an_import_of_ours():
    code = f"import gymnasium; gymnasium.make('lago_fast.envs:{ID}').reset(seed=0)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_an_episode():
    env = gym.make(ID, max_episode_steps=None)
    observation, info = env.reset(seed=3)
    again, same = env.reset(seed=3)
    np.testing.assert_array_equal(again, observation)
    assert same == info
    assert info["instruction"] == env.unwrapped.array_lane.instructions[info["instruction_id"]]
    assert env.reset()[1] != info
    over, steps = False, 0
    while not over:
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        over, steps = terminated or truncated, steps + 1
        assert isinstance(reward, float)
        assert info["success"] == terminated
    assert steps <= 50
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.close()


def test_the_text_can_be_observed():
    env = ClevrRobotEnv(["gather"], text=True)
    observation, info = env.reset(seed=0)
    assert observation["instruction"] == info["instruction"]
    assert "green" in info["instruction"]
    assert env.observation_space.contains(observation)


def test_a_scene_can_be_given():
    env = ClevrRobotEnv("real")
    observation, _ = env.reset(seed=0, options={"ball_xy": SCENE})
    np.testing.assert_array_equal(observation, SCENE.ravel().astype(np.float32))
    moved = env.step(8 * 2 + 1)[0] - observation  # green is pushed back
    assert np.abs(np.delete(moved, [4, 5])).max() < 0.02
    assert moved[5] > 0.1
    for xy, error, message in (
        (SCENE[:4], UnsupportedArgument, r"shape \(4, 2\)"),
        (SCENE * np.nan, NonFiniteError, "NaN"),
    ):
        with pytest.raises(error, match=message):
            env.reset(options={"ball_xy": xy})
    with pytest.raises(UnsupportedArgument, match="only 'ball_xy' is known"):
        env.reset(options={"balls": SCENE})


def test_pictures():
    env = ClevrRobotEnv("real", render_mode="rgb_array", renderer="drawing")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (256, 256, 3)
    assert frame.dtype == np.uint8
    assert ClevrRobotEnv("real").render() is None


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"split": "hard"}, UnsupportedArgument, "one family"),
        ({"split": "eazy"}, UnknownTask, "nearest names: easy"),
        ({"render_mode": "human"}, UnsupportedArgument, "render_mode='human'"),
    ],
)
def test_refusals(settings, error, message):
    with pytest.raises(error, match=message):
        ClevrRobotEnv(**settings)
