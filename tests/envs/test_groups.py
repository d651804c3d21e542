"""Groups of environments: the same rows as without groups, whatever the episodes do."""

import numpy as np
import pytest

from lago_fast import errors, make_metaworld
from lago_fast.envs.groups import GroupedArrayEnv
from lago_fast.envs.metaworld import MetaworldArrayEnv

SETTINGS = {"seed": 3, "max_episode_steps": 6, "normalize_reward": True}


def test_groups_change_no_bit_of_one_task():
    plain = make_metaworld(["push"], 6, **SETTINGS).array_lane
    grouped = make_metaworld(["push"], 6, groups=3, **SETTINGS).array_lane
    assert grouped.seed(5) == plain.seed(5)
    for a, b in zip(plain.reset(), grouped.reset(), strict=True):
        np.testing.assert_array_equal(a, b)
    rng = np.random.default_rng(0)
    for _ in range(14):
        actions = rng.uniform(-1, 1, (6, 4)).astype(np.float32)
        step = plain.step(actions)
        for name, a, b in zip(step._fields, step, grouped_step(grouped, actions), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def grouped_step(env, actions):
    """Step group by group, the last one first."""
    order = range(len(env.groups))
    for g in reversed(order):
        env.send_group(g, actions[env.groups[g]])
    return env.join([env.recv_group(g) for g in order])


def test_every_group_holds_its_share_of_every_task():
    lane = make_metaworld(["push", "reach"], 8, groups=2).array_lane
    assert lane.task_id.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert lane.reset().instruction_id.shape == (8,)


def test_one_env_of_any_group_can_be_reset():
    lane = make_metaworld(["reach"], 4, groups=2, **SETTINGS).array_lane
    lane.reset()
    actions = np.ones((4, 4), np.float32)
    before = lane.step(actions).observation
    fresh = lane.reset_envs(np.array([3, 0])).observation
    assert fresh.shape == (2, 39)
    assert not np.array_equal(fresh[0], before[3])
    # its next row is valid, the others went on
    step = lane.step(actions)
    assert step.valid.all()


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide_the_envs_are_refused(groups):
    with pytest.raises(errors.UnsupportedArgument, match=f"groups={groups}"):
        make_metaworld(["reach"], 4, groups=groups)


def test_groups_have_one_size():
    with pytest.raises(errors.UnsupportedArgument, match="one size"):
        GroupedArrayEnv([MetaworldArrayEnv(["reach"], n) for n in (1, 2)])
