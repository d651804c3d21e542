"""Meta-World after a call that was cut short: no row of it is ever taken for another one's."""

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from lago_fast.envs.groups import GroupedArrayEnv
from lago_fast.errors import EnvironmentFailed

NOTHING = np.zeros((4, 4))


class Cut:
    """A pool in front of which, or behind which, one of its calls is interrupted; pools share the count."""

    def __init__(self, pool, calls, behind):
        self.pool, self.calls, self.behind = pool, calls, behind

    def _cut(self, call, *args, **settings):
        self.calls[0] -= 1
        if self.calls[0] == 0 and not self.behind:
            raise KeyboardInterrupt
        answer = call(*args, **settings)
        if self.calls[0] == 0:
            raise KeyboardInterrupt
        return answer

    def send(self, *args):
        return self._cut(self.pool.send, *args)

    def recv(self, **settings):
        return self._cut(self.pool.recv, **settings)

    def _reset(self, ids):
        return self._cut(self.pool._reset, ids)


def stop(*_):
    raise KeyboardInterrupt


def cut(env, call, behind=True):
    calls = [call]
    env._pools = [Cut(pool, calls, behind) for pool in env._pools]


def assert_starts_over(env, expected):
    """After a reset `env` plays as the new environment `expected` does, to the second episode."""
    np.testing.assert_array_equal(env.reset().observation, expected.reset().observation)
    for t in range(5):
        for ours, theirs in zip(env.step(NOTHING + t / 5), expected.step(NOTHING + t / 5), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_reset_after_an_interrupted_step_starts_over(make, call, behind):
    env = make(max_episode_steps=3)
    env.reset()
    env.step(NOTHING)
    cut(env, call, behind)  # two pools are sent to, then received from
    with pytest.raises(KeyboardInterrupt):
        env.step(NOTHING)
    for go_on in (env.recv, lambda: env.step(NOTHING), lambda: env.reset_envs(np.array([0]))):
        with pytest.raises(ResetNeeded, match="interrupted or failed midway"):
            go_on()
    assert_starts_over(env, make(max_episode_steps=3))


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_reset_after_an_interrupted_reset_starts_over(make, call):
    env = make(max_episode_steps=3)
    env.reset()
    cut(env, call)
    with pytest.raises(KeyboardInterrupt):
        env.reset_envs(np.array([1, 2]))
    assert_starts_over(env, make(max_episode_steps=3))


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_reset_after_an_interrupted_start_by_hand_starts_over(make, call):
    env = make(["push"], max_episode_steps=3)
    env.reset()
    env.step(NOTHING)
    env._reset_by_hand[:2] = env._ended[:2] = True  # as after a success
    cut(env, call)  # a partial reset, then a partial step
    with pytest.raises(KeyboardInterrupt):
        env.step(NOTHING)
    assert_starts_over(env, make(["push"], max_episode_steps=3))


def test_a_reset_after_an_interrupt_amid_new_simulators_starts_over(make):
    env = make(["hammer"], max_episode_steps=1)
    env.reset()
    env.step(NOTHING)
    pool, built = env._pools[0], []
    build = pool._build

    def stop_at_the_third(seed):
        built.append(seed)
        if len(built) == 3:
            raise KeyboardInterrupt
        return build(seed)

    pool._build = stop_at_the_third
    with pytest.raises(KeyboardInterrupt):
        env.step(NOTHING)
    assert_starts_over(env, make(["hammer"], max_episode_steps=1))


def test_an_interrupt_while_a_step_is_dropped_or_pools_are_made(make, monkeypatch):
    env = make(max_episode_steps=3)
    env.reset()
    env.send(NOTHING)
    cut(env, 1)
    with pytest.raises(KeyboardInterrupt):
        env.reset()
    with monkeypatch.context() as patch:
        patch.setattr(env, "_make_pool", stop)
        with pytest.raises(KeyboardInterrupt):
            env.reset()
    with pytest.raises(ResetNeeded):
        env.send(NOTHING)
    assert_starts_over(env, make(max_episode_steps=3))


def test_an_interrupt_in_one_group_leaves_the_other_whole(make):
    members, fresh = ([make(first_env=first, max_episode_steps=3) for first in (0, 4)] for _ in range(2))
    env, expected = GroupedArrayEnv(members), GroupedArrayEnv(fresh)
    env.reset()
    cut(members[1], 2)
    with pytest.raises(KeyboardInterrupt):
        env.step(np.zeros((8, 4)))
    env.reset()
    expected.reset()
    for member, other in zip(members[1:], fresh[1:], strict=True):
        for t in range(5):
            np.testing.assert_array_equal(member.step(NOTHING + t).observation, other.step(NOTHING + t).observation)
    assert members[0].step(NOTHING).valid.all()


def test_it_closes_after_an_interrupt(make):
    env = make()
    env.reset()
    cut(env, 3)
    with pytest.raises(KeyboardInterrupt):
        env.step(NOTHING)
    env.close()
    env.close()


class Short:
    """A pool that leaves out its last row."""

    def __init__(self, pool):
        self.pool = pool

    def __getattr__(self, name):
        return getattr(self.pool, name)

    def recv(self, reset=False):
        *columns, info = self.pool.recv(reset=reset)
        return *(column[:-1] for column in columns), {name: column[:-1] for name, column in info.items()}


def test_a_row_that_does_not_arrive_is_missed(make):
    env = make()
    env.reset()
    env._pools[1] = Short(env._pools[1])
    with pytest.raises(EnvironmentFailed, match=r"no row of environment 3: call reset\(\)"):
        env.step(NOTHING)
    env.reset()
    env._pools[0] = Short(env._pools[0])
    with pytest.raises(EnvironmentFailed, match="no row of environment 1"):
        env.reset()
    assert_starts_over(env, make())
