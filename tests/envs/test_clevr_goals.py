"""The goals of CLEVR-Robot: how many, which, that they can hold, and the one convention for directions."""

from itertools import combinations

import numpy as np
import pytest

from lago_fast.envs.clevr_actions import PUSHES
from lago_fast.envs.clevr_goals import (
    AXES,
    BEHIND,
    FAMILIES,
    FRONT,
    HARD,
    LEFT,
    RIGHT,
    check_families,
    family_goals,
    split_families,
)
from lago_fast.envs.clevr_judges import PUSHES_TOWARDS
from lago_fast.errors import UnknownTask, UnsupportedArgument


def rows(family):
    goals = family_goals(family)
    return [tuple(zip(*(column[g].tolist() for column in goals[1:]), strict=True)) for g in range(len(goals.source))]


def test_behind_is_plus_y_everywhere():
    np.testing.assert_array_equal(AXES[[BEHIND, LEFT, FRONT, RIGHT]], [(0, 1), (-1, 0), (0, -1), (1, 0)])
    # the pushes that "easy" accepts are those with a component along the goal's axis
    np.testing.assert_array_equal(PUSHES_TOWARDS, AXES @ PUSHES.T > 0)
    assert np.flatnonzero(PUSHES_TOWARDS[BEHIND]).tolist() == [1, 4, 5]
    assert np.flatnonzero(PUSHES_TOWARDS[FRONT]).tolist() == [3, 6, 7]


def test_relations_are_all_pairs_and_directions():
    expected = {((s, d, r),) for s in range(5) for d in range(5) if s != d for r in range(4)}
    for family in ("real", "rephrase"):
        assert len(rows(family)) == 80
        assert set(rows(family)) == expected


def test_easy_line_and_gather():
    assert set(rows("easy")) == {((ball, ball, direction),) for ball in range(5) for direction in range(4)}
    assert rows("line") == [((1, 0, RIGHT), (2, 1, RIGHT), (3, 2, RIGHT), (4, 3, RIGHT))]
    assert [(s, d) for s, d, _ in rows("gather")[0]] == [(0, 2), (1, 2), (3, 2), (4, 2)]


@pytest.mark.parametrize(("family", "count"), [("two-goals", 2), ("three-goals", 3)])
def test_joint_goals_can_hold_at_once(family, count):
    goals = rows(family)
    assert len(goals) == len({frozenset(goal) for goal in goals}) == 120
    for goal in goals:
        pairs = {frozenset(relation[:2]) for relation in goal}
        assert len(goal) == len(pairs) == count
        assert not any(len(set.union(*map(set, three))) == 3 for three in combinations(pairs, 3))  # no triangle
        around = [(d, r) for _, d, r in goal] + [(s, (r + 2) % 4) for s, _, r in goal]
        assert max(around.count(place) for place in around) < 3
    # every ball and every direction is asked for about equally often
    columns = np.array(goals)
    for column, kinds in ((0, 5), (1, 5), (2, 4)):
        shares = np.bincount(columns[..., column].ravel(), minlength=kinds) / columns[..., column].size
        assert np.abs(shares * kinds - 1).max() < 0.3


def test_splits_name_their_families():
    assert split_families("real") == ["real"]
    assert split_families("hard") == list(HARD)
    assert split_families(["line", "real"]) == ["line", "real"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: split_families("rael"), UnknownTask, "split='rael'.*nearest names: real"),
        (lambda: split_families("line"), UnknownTask, r"\['line'\]"),
        (lambda: check_families(["two-goal"]), UnknownTask, "nearest names: two-goals"),
        (lambda: check_families(["xyzzy"]), UnknownTask, "names: " + ", ".join(FAMILIES)),
        (lambda: check_families("real"), UnsupportedArgument, "list of names"),
        (lambda: check_families([]), UnsupportedArgument, "at least one"),
        (lambda: check_families(["real", "real"]), UnsupportedArgument, "only once"),
    ],
)
def test_unknown_names_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
