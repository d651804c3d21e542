"""The rewards of CLEVR-Robot, each by hand-computed steps on both sides of its bounds."""

import numpy as np
import pytest

from lago_fast.envs.clevr_goals import BEHIND, LEFT, RIGHT, Goals, family_goals
from lago_fast.envs.clevr_judges import offsets
from lago_fast.envs.clevr_rewards import REWARDS, SINGLE_RELATION, Moved, careless


def step(goals, before, after, success=False, change=0):
    before, after = (np.asarray(xy, float).reshape(1, 5, 2) for xy in (before, after))
    seen = offsets(goals, before), offsets(goals, after)
    return Moved(goals, before, after, *seen, np.array([success]), np.array([change]))


# red is to lie behind blue, which is at the origin; green, purple and cyan are elsewhere
BEHIND_BLUE = Goals("relation", *(np.array([[value]]) for value in (0, 1, BEHIND)))
START = np.array([(0.0, 0.6), (0.0, 0.0), (0.4, 0.0), (-0.4, 0.0), (0.4, 0.4)])


def moved(ball, by, **outcome):
    after = START.copy()
    after[ball] += by
    return step(BEHIND_BLUE, START, after, **outcome)


def paid(name, example):
    reward = REWARDS[name](example)
    assert reward.shape == (1,)
    return reward[0]


def test_progress_pays_metres_to_the_place_beside():
    # from 0.6 to 0.5 behind blue, when 0.3 is wanted: 0.1 m
    assert paid("progress", moved(0, (0, -0.1))) == pytest.approx(1.0)
    assert paid("progress", moved(0, (0, 0.1))) == pytest.approx(-1.0)
    # past the place, from 0.3 m above it to 0.1 m below
    assert paid("progress", moved(0, (0, -0.4))) == pytest.approx(2.0)
    assert paid("progress", moved(1, (0, 0.1))) == pytest.approx(1.0)  # the destination may come, too
    assert paid("progress", moved(2, (0, 0.1))) == pytest.approx(0.0)
    assert paid("progress", moved(0, (0, -0.3), success=True)) == pytest.approx(3.0 + 10.0)


def test_progress_of_several_goals_adds_up():
    goals = Goals("relation", *(np.array([row]) for row in ([0, 4], [1, 2], [BEHIND, BEHIND])))
    after = START.copy()
    after[0] += (0, -0.1)  # 0.1 m nearer
    after[4] += (0, 0.05)  # 0.05 m farther
    assert paid("progress", step(goals, START, after)) == pytest.approx(0.5)


def test_progress_of_a_line_counts_what_is_outside_of_the_sectors():
    flat = np.stack([np.arange(5) * 0.3, np.zeros(5)], axis=1)
    bent = flat.copy()
    bent[4, 1] = 0.3  # across 0.3, of which 0.3 tan 30 = 0.17321 is allowed
    goals = family_goals("line")
    assert paid("progress", step(goals, bent, flat)) == pytest.approx(10 * (0.3 - 0.3 * np.tan(np.pi / 6)))
    inside = flat.copy()
    inside[4, 1] = 0.17
    assert paid("progress", step(goals, inside, flat)) == pytest.approx(0.0)


def test_progress_of_gathering_counts_what_is_beyond_325_mm():
    near = np.array([(0.3, 0), (-0.3, 0), (0, 0), (0, 0.3), (0, -0.3)])
    far = near.copy()
    far[0] = (0.425, 0)
    assert paid("progress", step(family_goals("gather"), far, near)) == pytest.approx(1.0)
    far[0] = (0.325, 0)
    assert paid("progress", step(family_goals("gather"), far, near)) == pytest.approx(0.0)


def test_easy_pays_at_success_alone():
    goals = family_goals("easy").take(np.array([3]))
    after = START + 0.1
    assert paid("progress", step(goals, START, after)) == 0.0
    assert paid("progress", step(goals, START, after, success=True)) == 10.0
    assert paid("imagine", step(goals, START, after, success=True)) == 1.0
    assert paid("imagine", step(goals, START, after)) == 0.0


def test_sparse():
    assert paid("sparse", moved(0, (0, -0.3), success=True)) == 1.0
    assert paid("sparse", moved(0, (0, -0.3))) == 0.0


def test_kalm_pays_metres_to_195_mm_beside_and_100_at_success():
    assert paid("kalm", moved(0, (0, -0.1))) == pytest.approx(1.0)
    # from 0.405 above the place to 0.095 below
    assert paid("kalm", moved(0, (0, -0.5))) == pytest.approx(10 * (0.405 - 0.095))
    assert paid("kalm", moved(0, (0, -0.3), success=True)) == 100.0


def test_kalm_careful_minds_the_other_balls():
    calm = paid("kalm", moved(3, (0.0, 0.0)))
    assert calm == 0.0
    assert paid("kalm-careful", moved(3, (0.0999, 0))) == pytest.approx(0.0)
    assert paid("kalm-careful", moved(3, (0.1001, 0))) == pytest.approx(-0.1001)
    assert paid("kalm-careful", moved(3, (0.1999, 0))) == pytest.approx(-0.1999)
    assert paid("kalm-careful", moved(3, (0.2001, 0))) == pytest.approx(-10.2001)
    assert paid("kalm-careful", moved(0, (0, -0.3))) == pytest.approx(paid("kalm", moved(0, (0, -0.3))))
    assert not careless(moved(3, (0.1999, 0)))[0]
    assert careless(moved(3, (0.12, 0.161)))[0]  # 0.2009 m
    assert not careless(moved(0, (0, -0.3)))[0]
    assert not careless(moved(1, (0, -0.3)))[0]


def test_imagine_pays_plain_distance_on_relations_and_sub_goals_on_the_hard_families():
    assert paid("imagine", moved(0, (0, -0.1))) == pytest.approx(1.0)
    assert paid("imagine", moved(0, (0.8, 0))) == pytest.approx(10 * (0.6 - 1.0))
    assert paid("imagine", moved(0, (0, -0.3), success=True)) == pytest.approx(3.0)
    for family in ("two-goals", "three-goals", "line", "gather"):
        goals = family_goals(family).take(np.array([0]))
        assert paid("imagine", step(goals, START, START + 0.1, change=2)) == 20.0
        assert paid("imagine", step(goals, START, START + 0.1, change=-1)) == -10.0


def test_clevr_asks_that_the_destination_stayed():
    assert paid("clevr", moved(1, (0, 0.3599), success=True)) == 1.0
    assert paid("clevr", moved(1, (0, 0.3601), success=True)) == 0.0
    assert paid("clevr", moved(0, (0, -0.5), success=True)) == 1.0
    assert paid("clevr", moved(0, (0, -0.5))) == 0.0


def test_clevr_movement_pays_a_quarter_for_moving():
    assert paid("clevr-movement", moved(2, (0.0499, 0))) == 0.0
    assert paid("clevr-movement", moved(2, (0.0501, 0))) == 0.25
    assert paid("clevr-movement", moved(0, (0, -0.3), success=True)) == 1.0


def test_clevr_quiet_pays_more_when_less_else_moves():
    assert paid("clevr-quiet", moved(0, (0, -0.3), success=True)) == pytest.approx(1.5)
    assert paid("clevr-quiet", moved(2, (0.1, 0), success=True)) == pytest.approx(1.0 + 0.5 * np.exp(-0.7))
    assert paid("clevr-quiet", moved(2, (0.1, 0))) == 0.0


def test_rows_do_not_see_each_other():
    rng = np.random.default_rng(0)
    before, after = rng.uniform(-0.5, 0.5, (2, 6, 5, 2))
    for family in ("real", "line", "gather", "two-goals"):
        all_goals = family_goals(family)
        goals = all_goals.take(rng.integers(len(all_goals.source), size=6))
        success, change = rng.random(6) < 0.5, rng.integers(-1, 2, 6)
        seen = offsets(goals, before), offsets(goals, after)
        for name, reward in REWARDS.items():
            if name in SINGLE_RELATION and family != "real":
                continue
            together = reward(Moved(goals, before, after, *seen, success, change))
            for i in range(6):
                alone = step(goals.take(np.array([i])), before[i], after[i], success[i], change[i])
                assert reward(alone)[0] == together[i]


def test_directions_are_used():
    goals = Goals("relation", *(np.array([[value]]) for value in (2, 1, RIGHT)))  # green, right of blue
    after = START.copy()
    after[2] = (0.3, 0.0)
    assert paid("progress", step(goals, START, after)) == pytest.approx(1.0)
    mirrored = Goals("relation", *(np.array([[value]]) for value in (2, 1, LEFT)))
    assert paid("progress", step(mirrored, START, after)) == pytest.approx(1.0)  # from 0.7 to 0.6 m away
