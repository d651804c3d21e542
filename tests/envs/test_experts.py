"""The scripted experts: actions inside the box, no warnings, success on real tasks."""

import sys

import numpy as np
import pytest

from lago_fast.envs.experts import make_expert, play_expert
from lago_fast.envs.metaworld_tasks import task_phrasings
from lago_fast.errors import MissingExtra, UnknownTask, UnsupportedArgument


@pytest.mark.parametrize("task", sorted(task_phrasings()))
def test_each_task_has_an_expert_with_actions_in_the_box(task):
    expert = make_expert(task)
    states = np.random.default_rng(0).uniform(-1, 1, (3, 39))
    kept = states.copy()
    actions = expert(states)
    np.testing.assert_array_equal(states, kept)  # door-open's policy writes into its observation
    assert actions.shape == (3, 4)
    assert actions.dtype == np.float32
    assert (np.abs(actions) <= 1.0).all()
    np.testing.assert_array_equal(expert(states[1:2]), actions[1:2])


def test_refusals(monkeypatch):
    with pytest.raises(UnknownTask, match="window-open"):
        make_expert("windw-open")
    with pytest.raises(UnsupportedArgument, match=r"expected \[n, 39\]"):
        make_expert("push")(np.zeros(39))
    monkeypatch.setitem(sys.modules, "metaworld.policies", None)
    with pytest.raises(MissingExtra, match=r"lago_fast\[envs\]"):
        make_expert("push")


def take(count, task="reach", **settings):
    episodes = play_expert(task, **{"max_episode_steps": 70, "num_envs": 2, **settings})
    kept = [next(episodes) for _ in range(count)]
    episodes.close()
    return kept


def test_episodes_are_whole_and_seeded():
    first, again, other = take(4), take(4), take(4, seed=1)
    assert [episode.round for episode in first] == [0, 0, 1, 1]
    assert len({episode.states[0].tobytes() for episode in first}) == 4
    for episode, same, different in zip(first, again, other, strict=True):
        assert episode.states.shape == (71, 39)
        assert episode.actions.shape == (70, 4)
        assert episode.rewards.shape == episode.success.shape == (70,)
        assert episode.success.any()
        assert episode.instruction in task_phrasings()["reach"]
        assert (episode.states[1:, 18:36] == episode.states[:-1, :18]).all()
        np.testing.assert_array_equal(episode.states, same.states)
        assert episode.env_seed == same.env_seed != different.env_seed


def test_noise_is_executed_and_stored():
    clean, noisy = take(1)[0], take(1, action_noise=0.3)[0]
    expert = make_expert("reach")
    np.testing.assert_array_equal(clean.actions, expert(clean.states[:-1]))
    difference = noisy.actions - expert(noisy.states[:-1])
    inside = (np.abs(noisy.actions) < 1.0) & (np.abs(noisy.actions - difference) < 0.4)
    assert difference[inside].std() == pytest.approx(0.3, rel=0.25)
    assert (np.abs(noisy.actions) <= 1.0).all()
    assert (noisy.states[-1] != clean.states[-1]).any()


def test_stop_after_success_cuts_each_episode_at_its_own_success():
    full, cut = take(2), take(2, stop_after_success=3)
    for whole, part in zip(full, cut, strict=True):
        steps = int(np.argmax(whole.success)) + 4
        assert len(part.actions) == steps < 70
        np.testing.assert_array_equal(part.states, whole.states[: steps + 1])
        np.testing.assert_array_equal(part.actions, whole.actions[:steps])
