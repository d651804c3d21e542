"""Rows of story games: rewards, ends, the choice of games."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lago_fast.envs.story_games import StoryGames
from lago_fast.errors import UnsupportedArgument

spec = importlib.util.spec_from_file_location("story_engines", Path(__file__).with_name("story_engines.py"))
story_engines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(story_engines)


def make(num_envs, games=1, horizon=6):
    return StoryGames(num_envs, [story_engines.Corridor] * games, horizon, 0)


def choose(env, *commands):
    return env.step(np.array([actions.index(c) for actions, c in zip(env._admissible, commands, strict=True)]))


def test_rewards_are_changes_of_the_score_and_ends_end():
    env = make(2)
    state = env.reset(0)
    assert state.instruction == ["light the lamp"] * 2
    step = choose(env, "on", "back")
    assert step.reward.tolist() == [0.5, -0.5]
    assert step.terminated.tolist() == [False, True]  # the second one lost
    assert not step.success.any()
    assert step.state.admissible[1] == ()
    step = env.step(np.array([1, 99]))  # light; the other row starts again
    assert step.reward.tolist() == [1, 0]
    assert step.valid.tolist() == [True, False]
    assert step.state.observation == ["room 1, light", "room 0"]
    step = choose(env, "on", "on")
    assert (step.success[0], step.terminated[0], step.reward[0]) == (True, True, 0.5)
    env.close()
    env.close()


def test_a_truncated_row_keeps_its_commands():
    env = make(1, horizon=2)
    env.reset(0)
    choose(env, "wait")
    step = choose(env, "wait")
    assert (step.truncated[0], step.terminated[0]) == (True, False)
    assert step.state.admissible[0] == ("back", "light", "on", "wait")


def test_the_expert_wins_from_anywhere():
    env = make(1)
    env.reset(0)
    choose(env, "light")
    choose(env, "wait")
    env.step(env.expert())
    assert env.step(env.expert()).success[0]
    assert env.expert().tolist() == [0]


def test_games_are_drawn_evenly():
    env = make(300, games=3, horizon=1)
    env.reset(0)
    counts = np.bincount(env.game, minlength=3)
    env.step(np.full(300, 3))
    env.step(np.zeros(300, int))
    counts += np.bincount(env.game, minlength=3)
    assert counts.min() > 150
    assert env.engine_steps <= 3 * 300


def test_environments_that_share_ask_an_engine_once():
    first, second = make(2), make(2)
    second.share(first)
    for env in (first, second):
        env.reset(0)
        for _ in range(20):
            env.step(np.zeros(2, int))
    assert first.engine_steps == second.engine_steps > 0
    with pytest.raises(UnsupportedArgument, match="3 games"):
        first.share(make(2, games=3))


def test_only_the_same_games_are_shared():
    class Other(story_engines.Corridor):
        pass

    first, second = (StoryGames(1, [story_engines.Corridor, game], 6, 0) for game in (story_engines.Corridor, Other))
    memos = second._memos
    with pytest.raises(UnsupportedArgument, match="its game 1 is not this one's"):
        second.share(first)
    assert second._memos is memos
    first.close()
    with pytest.raises(UnsupportedArgument, match="closed"):
        make(2).share(first)
    with pytest.raises(UnsupportedArgument, match="closed"):
        first.share(make(2))


def test_every_engine_is_closed_once_and_sharing_outlives_either():
    started = []

    def start():
        started.append(story_engines.Corridor())
        return started[-1]

    envs = [StoryGames(2, [start], 6, seed) for seed in range(3)]
    for env in envs:
        env.reset()
        env.step(np.array([2, 3]))
    assert len(started) == 6
    envs[1].share(envs[0])
    envs[2].share(envs[1])
    assert [engine.closed for engine in started] == [0, 0, 1, 1, 1, 1]
    assert not envs[1].step(np.array([9, 9])).valid.any()  # its episodes ended, as before a first reset
    envs[0].close()
    for env in envs[1:]:
        env.reset()
        env.step(np.array([1, 0]))
        env.close()
        env.close()
    assert [engine.closed for engine in started] == [1] * len(started)
