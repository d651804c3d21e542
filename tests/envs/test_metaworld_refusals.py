"""The array lane of Meta-World under bad arguments, bad numbers and calls out of order."""

import sys

import numpy as np
import pytest
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError, ResetNeeded

from lago_fast.envs.metaworld_tasks import envpool_id, task_phrasings
from lago_fast.errors import MissingExtra, NonFiniteError, UnknownTask, UnsupportedArgument


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tasks": ["drawer-opne"]}, UnknownTask, "nearest names: drawer-open"),
        ({"tasks": ["xyzzy"]}, UnknownTask, "xyzzy"),
        ({"tasks": "push"}, UnsupportedArgument, "list of names"),
        ({"tasks": []}, UnsupportedArgument, "at least one"),
        ({"tasks": ["push", "push"]}, UnsupportedArgument, "only once"),
        ({"num_envs": 5}, UnsupportedArgument, "num_envs=5"),
        ({"num_envs": 0}, UnsupportedArgument, "num_envs=0"),
        ({"max_episode_steps": 0}, UnsupportedArgument, "max_episode_steps=0"),
        ({"max_episode_steps": 2.5}, UnsupportedArgument, r"max_episode_steps=2\.5"),
        ({"num_threads": True}, UnsupportedArgument, "num_threads=True"),
        ({"seed": 2.5}, UnsupportedArgument, r"seed=2\.5"),
        ({"first_env": -1}, UnsupportedArgument, "first_env=-1"),
        ({"gamma": float("nan"), "normalize_reward": True}, UnsupportedArgument, "gamma=nan"),
        (
            {"success_reward": float("inf"), "terminate_on_success": True},
            UnsupportedArgument,
            "success_reward=inf",
        ),
        ({"phrasings": "some"}, UnsupportedArgument, "phrasings='some'"),
        ({"num_threads": 0}, UnsupportedArgument, "num_threads=0"),
        ({"success_reward": 1.0}, UnsupportedArgument, "terminate_on_success"),
        ({"instruction_table": np.zeros((3, 2))}, UnsupportedArgument, r"shape \(3, 2\)"),
        ({"instruction_table": np.full((10, 2), np.nan)}, NonFiniteError, "instruction_table"),
    ],
)
def test_refusals_name_the_argument(make, settings, error, message):
    with pytest.raises(error, match=message):
        make(**settings)


def test_missing_envpool_names_the_extra(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(MissingExtra, match=r"lago_fast\[envs\]"):
        make()


def test_actions_that_do_not_fit_are_refused_and_nothing_is_lost(make):
    env = make()
    env.reset()
    with pytest.raises(UnsupportedArgument, match="actions has shape"):
        env.step(np.zeros((3, 4)))
    bad = np.zeros((4, 4))
    bad[2, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"environment 2 .*'push'"):
        env.step(bad)
    assert env.step(np.zeros((4, 4))).valid.all()


class Spy:
    """A pool that keeps what it was sent and claims success everywhere."""

    def __init__(self, pool):
        self.pool, self.sent = pool, []

    def send(self, actions):
        self.sent.append(actions)
        self.pool.send(actions)

    def recv(self):
        *columns, info = self.pool.recv()
        return *columns, info | {"success": np.ones_like(info["success"])}


def test_what_is_sent_and_what_counts_as_success(make):
    env = make(["push"], 2)
    env.reset()
    spy = env._pools[0] = Spy(env._pools[0])
    rows = [env.step(np.full((2, 4), 7.0 * (-1) ** t)) for t in range(6)]
    np.testing.assert_array_equal(spy.sent[0], np.ones((2, 4), np.float32))
    np.testing.assert_array_equal(spy.sent[1], -np.ones((2, 4), np.float32))
    for row in rows:
        np.testing.assert_array_equal(row.success, row.valid)
    assert not rows[-1].valid.any()


class Poisoned:
    """A pool whose second row turns bad."""

    def __init__(self, pool, column):
        self.pool, self.column = pool, column

    def send(self, *args):
        self.pool.send(*args)

    def recv(self):
        answer = list(self.pool.recv())
        answer[self.column] = answer[self.column].copy()
        answer[self.column][1] = np.inf
        return answer


@pytest.mark.parametrize(("column", "what"), [(0, "observation"), (1, "reward")])
def test_bad_numbers_of_the_simulator_name_environment_and_step(make, column, what):
    env = make()
    env.reset()
    env.step(np.zeros((4, 4)))
    env._pools[1] = Poisoned(env._pools[1], column)
    with pytest.raises(NonFiniteError, match=f"{what}.*environment 3 .*step 2"):
        env.step(np.zeros((4, 4)))


def test_calls_out_of_order_are_refused(make):
    env = make()
    with pytest.raises(ResetNeeded):
        env.send(np.zeros((4, 4)))
    env.reset()
    with pytest.raises(NoAsyncCallError):
        env.recv()
    env.send(np.zeros((4, 4)))
    with pytest.raises(AlreadyPendingCallError):
        env.send(np.zeros((4, 4)))
    assert (env.reset().observation[:, 36:39] != 0).any(axis=1).all()  # drops the step under way
    assert (env.reset().observation[:, 36:39] != 0).any(axis=1).all()
    env.send(np.zeros((4, 4)))
    env.close()
    env.close()
    with pytest.raises(ClosedEnvironmentError):
        env.reset()
    with pytest.raises(ClosedEnvironmentError):
        env.send(np.zeros((4, 4)))


def test_all_fifty_tasks_have_distinct_phrasings():
    from envpool.mujoco.metaworld.registration import metaworld_v3_task_ids

    phrasings = task_phrasings()
    assert sorted(envpool_id(task) for task in phrasings) == sorted(metaworld_v3_task_ids)
    texts = [text for task in phrasings for text in phrasings[task]]
    assert len(texts) == len({text.lower().strip() for text in texts})
    assert all(len(lines) >= 4 for lines in phrasings.values())
    assert all(text == text.strip() and len(text.split()) >= 2 for text in texts)
