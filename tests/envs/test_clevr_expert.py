"""The scripted expert of CLEVR-Robot: what it reaches on each family, and that it looks before it pushes."""

import numpy as np
import pytest

from lago_fast.envs.clevr_expert import make_clevr_expert, squared_distance
from lago_fast.envs.clevr_goals import FAMILIES, family_goals
from lago_fast.envs.clevr_judges import satisfied
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv
from lago_fast.errors import UnsupportedArgument


def expert_success(family, num_envs, seed=0):
    """Share of first episodes that succeed."""
    env = ClevrRobotArrayEnv([family], num_envs, seed=seed)
    env.reset()
    expert = make_clevr_expert(env)
    over, won = np.zeros((2, num_envs), bool)
    while not over.all():
        row = env.step(expert())
        won |= row.success & ~over
        over |= row.terminated | row.truncated
    env.close()
    return won.mean()


# the figures of 200 episodes are in the log; here few, and what even those must show
@pytest.mark.parametrize(
    ("family", "num_envs", "least"), [("real", 20, 0.9), ("easy", 60, 1.0), ("two-goals", 10, 0.7), ("gather", 8, 0.8)]
)
def test_it_succeeds(family, num_envs, least):
    assert expert_success(family, num_envs) >= least


@pytest.mark.slow
@pytest.mark.parametrize(("family", "least"), [("three-goals", 0.7), ("line", 0.5)])
def test_it_succeeds_on_what_is_hardest(family, least):
    assert expert_success(family, 40) >= least


def test_it_acts_for_each_environment_alone_and_leaves_the_state_as_it_is():
    settings = {"seed": 4, "num_threads": 1}
    env = ClevrRobotArrayEnv(["real", "easy", "line"], 6, **settings)
    alone = ClevrRobotArrayEnv(["real"], 2, **settings)
    for one in (env, alone):
        one.reset()
    before = env.physics_state
    actions = make_clevr_expert(env)()
    for now, then in zip(env.physics_state, before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert actions.dtype == np.int64
    np.testing.assert_array_equal(actions[:2], make_clevr_expert(alone)())
    env.step(actions)
    assert env.ended[2:4].all()
    make_clevr_expert(env)()  # environments that have ended are passed over


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "easy"])
def test_distance_is_zero_where_the_goal_holds_safely(family):
    places = {
        "line": np.stack([np.linspace(-0.4667, 0.4667, 5), 0.2 + 0.127 * (np.arange(5) % 2)], axis=1),
        "gather": np.array([(0.28, 0.2), (-0.28, 0.2), (0.0, 0.2), (0.0, 0.48), (0.0, -0.08)]),
    }
    goals = family_goals(family)
    if family in places:
        xy = places[family]
    else:  # a goal whose sources are not placed twice: each just beside its destination
        chain = next(g for g in range(80) if goals.source[g].tolist() == sorted(set(goals.source[g].tolist())))
        goals = goals.take(np.array([chain]))
        axes = np.array([(0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (1.0, 0.0)])
        xy = np.arange(10.0).reshape(5, 2)
        for _ in range(5):
            for s, d, r in zip(*(column[0] for column in goals[1:]), strict=True):
                xy[s] = xy[d] + 0.3 * axes[r]
    assert satisfied(goals, xy[None]).all()
    assert squared_distance(goals, xy[None])[0] == pytest.approx(0.0, abs=1e-9)
    assert squared_distance(goals, xy[None] * 3)[0] > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"action_type": "discrete"}, "'perfect' only"), ({"easy_judge": "shift"}, "'action' only")],
)
def test_refusals(settings, message):
    with pytest.raises(UnsupportedArgument, match=message):
        make_clevr_expert(ClevrRobotArrayEnv(["real"], 2, **settings))
