"""Episodes of CLEVR-Robot's scripts: whole, repeatable, and what the env really did."""

from itertools import islice

import numpy as np
import pytest

from lago_fast.envs.clevr_actions import PUSHES
from lago_fast.envs.clevr_demos import make_greedy_script, play_clevr_expert
from lago_fast.envs.clevr_goals import AXES
from lago_fast.envs.clevr_language import family_instructions
from lago_fast.envs.clevr_rewards import BESIDE_M
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv
from lago_fast.errors import UnsupportedArgument

SETTINGS = {"seed": 3, "max_episode_steps": 6, "num_envs": 4}


def test_episodes_are_those_of_the_env():
    episodes = list(islice(play_clevr_expert("real", **SETTINGS), 8))
    env = ClevrRobotArrayEnv(["real"], 4, seed=3, max_episode_steps=6)
    assert {episode.instruction for episode in episodes} <= set(family_instructions("real"))
    assert [episode.round for episode in episodes] == [0] * 4 + [1] * 4
    assert [episode.env_seed for episode in episodes[:4]] == env.env_seeds
    # replay the first round's actions
    np.testing.assert_array_equal(env.reset().observation, [episode.states[0] for episode in episodes[:4]])
    for t in range(max(len(episode.actions) for episode in episodes[:4])):
        alive = [i for i, episode in enumerate(episodes[:4]) if t < len(episode.actions)]
        actions = np.zeros(4, np.int64)
        actions[alive] = [episodes[i].actions[t] for i in alive]
        step = env.step(actions)
        for i in alive:
            np.testing.assert_array_equal(step.observation[i], episodes[i].states[t + 1])
            assert (step.raw_reward[i], step.success[i]) == (episodes[i].rewards[t], episodes[i].success[t])
    env.close()


def test_an_episode_ends_with_its_success_and_says_how():
    for episode in islice(play_clevr_expert("real", **SETTINGS), 8):
        assert episode.states.shape == (len(episode.actions) + 1, 10)
        assert episode.actions.dtype == np.int64
        assert episode.terminated == bool(episode.success[-1])
        assert not episode.success[:-1].any()
        assert episode.terminated or len(episode.actions) == 6


@pytest.mark.parametrize("settings", [{"action_noise": 0.1}, {"stop_after_success": 2}])
def test_noise_and_steps_after_the_success_are_refused(settings):
    with pytest.raises(UnsupportedArgument, match="action_noise, stop_after_success"):
        next(play_clevr_expert("real", **settings))


def test_the_greedy_script_pushes_the_source_towards_its_place():
    env = ClevrRobotArrayEnv(["real"], 400, seed=0)
    env.reset()
    actions, goals, xy = make_greedy_script(env)(), env.families[0].now, env.ball_xy
    ball, push = np.divmod(actions, len(PUSHES))
    source, destination, direction = goals.source[:, 0], goals.destination[:, 0], goals.direction[:, 0]
    rows = np.arange(400)
    # but for the tenth that is random, of which a fifth names the source by chance
    assert 0.85 < (ball == source).mean() < 0.97
    towards = xy[rows, destination] + BESIDE_M * AXES[direction] - xy[rows, source]
    cosine = (PUSHES[push] * towards).sum(1) / np.linalg.norm(PUSHES[push], axis=1) / np.linalg.norm(towards, axis=1)
    # eight directions are 45 degrees apart
    assert (cosine > np.cos(np.radians(22.6))).mean() > 0.85
    env.close()
