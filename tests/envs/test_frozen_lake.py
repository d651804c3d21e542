"""Frozen Lake in words, against gymnasium's own."""

import gymnasium as gym
import numpy as np
import pytest

from lago_fast.envs.frozen_lake import ACTIONS, make_frozen_lake
from lago_fast.errors import UnsupportedArgument


def test_what_is_said_about_the_surroundings():
    env = make_frozen_lake(1)
    assert env.reset(0).observation == [
        "You stand in row 1, column 1 of 4 rows and columns. The goal is in row 4, column 4. Around you, "
        "left: the edge of the lake, below: ice, right: ice, above: the edge of the lake."
    ]
    assert (
        env.step(np.array([ACTIONS.index("go down")]))
        .state.observation[0]
        .endswith("left: the edge of the lake, below: ice, right: a hole, above: ice.")
    )
    end = env.step(np.array([ACTIONS.index("go right")]))
    assert end.state.observation[0].startswith("You fell into the hole in row 2, column 2")
    assert (end.reward[0], end.terminated[0], end.success[0]) == (0, True, False)


@pytest.mark.parametrize("map_name", ["4x4", "8x8"])
def test_every_move_is_gymnasiums(map_name):
    theirs = gym.make("FrozenLake-v1", map_name=map_name, is_slippery=False).unwrapped.P
    for tile, moves in theirs.items():
        for action, [(_, after, reward, over)] in moves.items():
            env = make_frozen_lake(1, map_name)
            if env._tiles[tile] in "HG":
                continue
            env.reset(0)
            env._tile[:] = tile
            step = env.step(np.array([action]))
            assert (env._tile[0], step.reward[0], step.terminated[0]) == (after, reward, over)
            assert step.success[0] == (reward == 1)


def test_slippery_ice_lets_one_go_three_ways_alike():
    theirs = {after for _, after, _, _ in gym.make("FrozenLake-v1", is_slippery=True).unwrapped.P[14][2]}
    env = make_frozen_lake(3000, slippery=True)
    env.reset(0)
    env._tile[:] = 14
    env.step(np.full(3000, 2))
    after, counts = np.unique(env._tile, return_counts=True)
    assert set(after.tolist()) == theirs
    assert np.abs(counts / 3000 - 1 / 3).max() < 0.05  # more than five standard deviations


@pytest.mark.parametrize(("map_name", "steps", "horizon"), [("4x4", 6, 20), ("8x8", 14, 40)])
def test_the_expert_takes_a_shortest_way(map_name, steps, horizon):
    env = make_frozen_lake(2, map_name)
    assert env.horizon == horizon
    env.reset(0)
    for turn in range(steps):
        step = env.step(env.expert())
        assert step.success.all() == (turn == steps - 1)
    assert step.state.observation[0].startswith("You reached the goal")
    assert env.expert().tolist() == [0, 0]


def test_an_unknown_map():
    with pytest.raises(UnsupportedArgument, match="map='5x5': give one of 4x4, 8x8"):
        make_frozen_lake(1, "5x5")
