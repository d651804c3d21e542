"""Suites: what each environment says of itself is what its env does."""

import numpy as np
import pytest

from lago_fast.envs.suites import SUITES, suite_named
from lago_fast.errors import UnknownTask, UnsupportedArgument

TASKS = {"metaworld": ("push", "reach"), "clevr-robot": ("real", "easy", "line")}


@pytest.mark.parametrize("name", SUITES)
def test_the_env_has_the_spaces_and_words_that_its_suite_names(name):
    suite, tasks = suite_named(name), TASKS[name]
    env = suite.make(tasks, 6, seed=0)
    try:
        assert env.tasks == list(tasks)
        assert env.state_dim == suite.state_dim
        assert env.instructions == suite.instructions(tasks)
        space = env.action_space
        assert (space.n if suite.discrete else space.shape[0]) == suite.action_dim
        assert suite.kind == ("categorical" if suite.discrete else "gaussian")
        assert set(tasks) <= set(suite.all_tasks())
    finally:
        env.close()


@pytest.mark.parametrize("name", SUITES)
def test_no_wording_belongs_to_two_goals_of_a_task(name):
    suite = suite_named(name)
    for task in suite.all_tasks():
        texts = suite.instructions([task])
        assert len(set(texts)) == len(texts)
        assert all(goal for goal in suite.goals(task))


@pytest.mark.parametrize("name", SUITES)
def test_scripts_act_in_the_space_of_the_env(name):
    suite, tasks = suite_named(name), TASKS[name]
    env = suite.make(tasks, 6, seed=0)
    try:
        states = env.reset().observation[:, : env.state_dim]
        scripts = suite.scripts(tasks)
        assert "expert" in scripts
        for script in scripts.values():
            actions = script(env, states)
            assert actions.shape == (6, *env.action_space.shape)
            assert all(env.action_space.contains(action) for action in actions)
            env.step(actions)
    finally:
        env.close()


def test_a_policy_needs_words_where_there_are_several_goals():
    assert not suite_named("metaworld").speaks(["push"])
    assert suite_named("metaworld").speaks(["push", "reach"])
    assert suite_named("clevr-robot").speaks(["real"])
    assert not suite_named("clevr-robot").speaks(["line"])


def test_what_cannot_be_honoured_is_refused():
    with pytest.raises(UnsupportedArgument, match="env: 'atari' is unknown; choose one of metaworld, clevr-robot"):
        suite_named("atari")
    with pytest.raises(UnsupportedArgument, match="eval_tasks"):
        suite_named("metaworld").check_evaluated(["push"], ["reach"])
    with pytest.raises(UnknownTask, match="harder"):
        suite_named("clevr-robot").check_evaluated(["real"], ["harder"])
    suite_named("clevr-robot").check_evaluated(["real"], ["easy"])
    env = suite_named("metaworld").make(["push"], 1, seed=0)
    with pytest.raises(UnsupportedArgument, match="video: Meta-World cannot be drawn"):
        suite_named("metaworld").draw(env, 0)
    env.close()


def test_a_picture_of_clevr_robot_shows_its_balls():
    suite = suite_named("clevr-robot")
    env = suite.make(["real"], 2, seed=0, renderer="drawing")
    env.reset()
    first, second = suite.draw(env, 0), suite.draw(env, 1)
    env.close()
    assert first.shape == second.shape == (*first.shape[:2], 3)
    assert first.dtype == np.uint8
    assert (first != second).any()
