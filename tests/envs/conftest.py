"""What the tests of the array lane share: environments that are closed at the end."""

import pytest

from lago_fast.envs.metaworld import MetaworldArrayEnv


@pytest.fixture
def make():
    """A factory of environments: two tasks, four environments and five steps unless told otherwise."""
    opened = []

    def factory(tasks=("drawer-open", "push"), num_envs=4, **settings):
        opened.append(MetaworldArrayEnv(tasks, num_envs, **{"max_episode_steps": 5, **settings}))
        return opened[-1]

    yield factory
    for env in opened:
        env.close()
