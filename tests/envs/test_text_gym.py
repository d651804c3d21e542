"""Text games by gymnasium's interface."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

import lago_fast.envs  # noqa: F401 - registers the environments
from lago_fast.envs.text_gym import TextGameEnv
from lago_fast.errors import UnknownTask, UnsupportedArgument


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FrozenLakeText", {}),
        ("FrozenLakeText", {"map": "8x8", "slippery": True}),
        ("OvercookedText", {"task": "tomato-lettuce-salad", "memory": True}),
    ],
)
def test_check_env_has_nothing_to_say(name, settings):
    env = gym.make(f"lago_fast/{name}-v0", render_mode="ansi", **settings)
    check_env(env.unwrapped)
    env.close()


def test_it_is_found_without_an_import_of_ours():
    code = "import gymnasium; gymnasium.make('lago_fast.envs:lago_fast/OvercookedText-v0').reset(seed=0)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_an_episode():
    env = gym.make("lago_fast/OvercookedText-v0", task="tomato-salad", render_mode="ansi")
    observation, info = env.reset(seed=3)
    assert env.reset(seed=3)[0] == observation
    assert env.render() == f"{observation['instruction']}\n{observation['observation']}"
    assert env.action_space.n == 8
    wanted = ["get the tomato", "go to the first cutting board", *["chop"] * 3, "get the plate", "get the tomato"]
    for action in [*wanted, "deliver"]:
        np.testing.assert_array_equal(info["action_mask"], np.arange(8) < len(info["admissible"]))
        assert not info["success"]
        observation, reward, terminated, truncated, info = env.step(info["admissible"].index(action))
        assert isinstance(reward, float)
        assert not truncated
    assert terminated
    assert info["success"]
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.close()


def test_only_admissible_actions_are_sampled_and_others_refused():
    env = gym.make("lago_fast/OvercookedText-v0").unwrapped
    _, info = env.reset(seed=0)
    env.action_space.seed(0)
    assert {int(env.action_space.sample()) for _ in range(200)} == set(range(len(info["admissible"])))
    only_the_second = np.eye(8, dtype=np.int8)[1]
    assert env.action_space.sample(mask=only_the_second) == 1
    with pytest.raises(UnsupportedArgument, match="6 in environment 0, which has 6 admissible"):
        env.step(6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"game": "chess"}, UnsupportedArgument, "game='chess'"),
        ({"game": "overcooked", "render_mode": "human"}, UnsupportedArgument, "render_mode='human'"),
        ({"game": "textworld", "games": "impossible"}, UnknownTask, "games='impossible'"),
    ],
)
def test_refusals(settings, error, message):
    with pytest.raises(error, match=message):
        TextGameEnv(**settings)


def test_too_few_actions_and_options_are_refused():
    env = TextGameEnv("frozen-lake", max_actions=3)
    with pytest.raises(UnsupportedArgument, match="max_actions=3: this state has 4"):
        env.reset(seed=0)
    with pytest.raises(UnsupportedArgument, match="options"):
        env.reset(options={"tile": 3})
    with pytest.raises(ResetNeeded):
        TextGameEnv("frozen-lake").step(0)
