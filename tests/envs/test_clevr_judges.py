"""The judges of CLEVR-Robot, by hand-computed cases on both sides of every bound."""

import numpy as np
import pytest

from lago_fast.envs.clevr_goals import BEHIND, FRONT, LEFT, RIGHT, Goals, family_goals
from lago_fast.envs.clevr_judges import easy_by_action, easy_by_shift, satisfied

FAR = 9.0  # where the balls that do not matter are


def relation(direction, source=0, destination=1):
    return Goals("relation", *(np.array([[value]]) for value in (source, destination, direction)))


def scene(**balls):
    """[1, 5, 2] with the named balls at their places and the others far away."""
    xy = np.full((1, 5, 2), FAR)
    for name, place in balls.items():
        xy[0, int(name[1:])] = place
    return xy


def holds(direction, x, y, judge="kalm"):
    """Whether ball 0 at (x, y) from ball 1 satisfies the goal; ball 1 is not at the origin."""
    corner = np.array([0.25, 0.125])  # exact in binary, as are the offsets below
    return bool(satisfied(relation(direction), scene(b0=corner + np.array([x, y]), b1=corner), judge)[0, 0])


@pytest.mark.parametrize("judge", ["kalm", "clevr", "clevr-polar"])
def test_one_convention_for_all_judges(judge):
    for direction, (x, y) in {BEHIND: (0, 0.3), LEFT: (-0.3, 0), FRONT: (0, -0.3), RIGHT: (0.3, 0)}.items():
        assert [holds(d, x, y, judge) for d in range(4)] == [d == direction for d in range(4)]


@pytest.mark.parametrize(
    ("direction", "lower", "upper"),
    # a corner belongs to the sector that starts there, counted against the clock from +x
    [
        (RIGHT, (0.25, -0.25), (0.25, 0.25)),
        (BEHIND, (0.25, 0.25), (-0.25, 0.25)),
        (LEFT, (-0.25, 0.25), (-0.25, -0.25)),
        (FRONT, (-0.25, -0.25), (0.25, -0.25)),
    ],
)
def test_kalm_sector_holds_its_lower_edge_and_not_its_upper(direction, lower, upper):
    assert holds(direction, *lower)
    assert not holds(direction, *upper)
    middle = (np.array(lower) + upper) / 2
    for edge, inside in ((lower, True), (upper, True)):
        assert holds(direction, *(edge + 0.01 * (middle - edge))) is inside
        assert not holds(direction, *(edge - 0.01 * (middle - edge)))


def test_kalm_distance_is_strict():
    assert holds(RIGHT, 0.3909, 0.0)
    assert not holds(RIGHT, 0.3911, 0.0)
    along, across = np.array([[0.391]]), np.zeros((1, 1))
    from lago_fast.envs.clevr_judges import judge_kalm

    assert not judge_kalm(along, across)[0, 0]
    assert judge_kalm(np.nextafter(along, 0), across)[0, 0]


def test_kalm_takes_components_below_a_millimetre_as_none():
    from lago_fast.envs.clevr_judges import judge_kalm

    def judged(along, across):
        return bool(judge_kalm(np.array([[along]]), np.array([[across]]))[0, 0])

    assert not judged(0.0009, 0.0)  # nothing along: the sector is empty
    assert judged(0.0011, 0.0009)
    assert judged(0.001, 0.0)  # exactly a millimetre counts
    assert not judged(0.0011, 0.0012)


def test_clevr_cosine_and_distance():
    # 3-4-5: the cosine to the longer side is 0.8, to the shorter 0.6, which is not above 0.6
    assert holds(RIGHT, 0.4, 0.3, "clevr")
    assert not holds(RIGHT, 0.375, 0.5, "clevr")
    assert holds(RIGHT, 0.376, 0.5, "clevr")
    assert holds(BEHIND, 0.375, 0.5, "clevr")
    assert holds(LEFT, -0.6999, 0.0, "clevr")
    assert not holds(LEFT, -0.7001, 0.0, "clevr")
    # both of two directions may hold
    assert holds(FRONT, 0.25, -0.25, "clevr")
    assert holds(RIGHT, 0.25, -0.25, "clevr")


def test_clevr_polar_reaches_less_far_off_the_axis():
    # cosine 0.8: the reach is 0.7 sqrt(2 * 0.64 - 1) = 0.7 * 0.52915 = 0.370405
    assert holds(RIGHT, 0.8 * 0.3703, 0.6 * 0.3703, "clevr-polar")
    assert not holds(RIGHT, 0.8 * 0.3705, 0.6 * 0.3705, "clevr-polar")
    assert holds(RIGHT, 0.6999, 0.0, "clevr-polar")
    assert not holds(RIGHT, 0.7001, 0.0, "clevr-polar")
    # cosine: 0.71 is not enough, though a ball so near would be within reach
    for cosine, expected in ((0.7095, False), (0.7105, True)):
        reach = 0.5 * 0.7 * np.sqrt(2 * cosine**2 - 1)
        assert holds(BEHIND, reach * np.sqrt(1 - cosine**2), reach * cosine, "clevr-polar") is expected


def line_of(angle_deg, step=0.25):
    direction = np.array([np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))])
    return np.arange(5)[None, :, None] * step * direction


def test_line_allows_thirty_degrees_at_any_distance():
    goals = family_goals("line")
    for angle, expected in ((0, True), (29.99, True), (-29.99, True), (30.01, False), (-30.01, False), (180, False)):
        assert satisfied(goals, line_of(angle)).all() == expected, angle
    assert satisfied(goals, line_of(0, step=5.0)).all()
    xy = line_of(0)
    xy[0, 2, 1] = 0.15  # 31 degrees up and down again: two of the four fail
    np.testing.assert_array_equal(satisfied(goals, xy), [[True, False, False, True]])


def test_gather_allows_325_mm_from_green():
    goals = family_goals("gather")
    xy = np.zeros((1, 5, 2))
    xy[0, [0, 1, 3, 4]] = [(0.3249, 0), (0.3251, 0), (0, 0.325), (0.24, 0.24)]
    np.testing.assert_array_equal(satisfied(goals, xy), [[True, False, True, False]])


def test_joint_goals_are_judged_one_by_one():
    goals = Goals("relation", *(np.array([row]) for row in ([0, 2], [1, 3], [LEFT, BEHIND])))
    xy = scene(b0=(-0.3, 0), b1=(0, 0), b2=(0, 0.5), b3=(0, 0))
    np.testing.assert_array_equal(satisfied(goals, xy), [[True, False]])


def test_easy_by_action_asks_for_the_ball_and_three_of_eight_pushes():
    goals = family_goals("easy")
    every = np.array([(g, b, p) for g in range(20) for b in range(5) for p in range(8)])
    hits = easy_by_action(goals.take(every[:, 0]), every[:, 1], every[:, 2])
    assert hits.sum() == 20 * 3  # of 40 actions: 7.5 %
    goal = 4 * 2 + LEFT  # ball 2
    found = every[hits & (every[:, 0] == goal), 1:]
    np.testing.assert_array_equal(found, [(2, 2), (2, 5), (2, 7)])
    assert not satisfied(goals, np.zeros((20, 5, 2))).any()


def test_easy_by_shift_asks_for_150_mm_of_any_ball():
    goals = family_goals("easy").take(np.array([FRONT, FRONT, FRONT, LEFT]))
    before = np.zeros((4, 5, 2))
    after = before.copy()
    after[0, 3] = (0.4, -0.1501)
    after[1, 3] = (0.4, -0.1499)
    after[2, 0] = (0.0, 0.3)
    after[3, 4] = (-0.15, 0.0)
    np.testing.assert_array_equal(easy_by_shift(goals, before, after), [True, False, False, True])
