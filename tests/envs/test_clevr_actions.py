"""The action types of CLEVR-Robot, by the published numbers."""

import numpy as np
import pytest
from gymnasium.spaces import Discrete

from lago_fast.envs.clevr_actions import action_space, check_actions, drive
from lago_fast.errors import NonFiniteError, UnsupportedArgument

BALLS = np.arange(10.0).reshape(1, 5, 2) / 10


def test_perfect_starts_behind_the_ball():
    moves = drive("perfect", np.array([8 * 3 + 1, 8 * 4 + 7]), np.repeat(BALLS, 2, axis=0))
    np.testing.assert_allclose(moves.start, [(0.6, 0.7 - 0.15), (0.8 + 0.12, 0.9 + 0.12)])
    np.testing.assert_array_equal(moves.ctrl, [(0.0, 1.0), (-0.8, -0.8)])
    assert moves.substeps == 40


def test_discrete_starts_on_the_grid():
    moves = drive("discrete", np.array([0, 4 * 100 + 10 * 9 + 3, 799]), np.repeat(BALLS, 3, axis=0))
    np.testing.assert_allclose(moves.start, [(-0.7, -0.35), (0.56, 0.01), (0.56, 0.73)])
    np.testing.assert_allclose(moves.ctrl, [(1.1, 0.0), (0.88, 0.88), (-0.88, -0.88)])
    assert moves.substeps == 40


def test_continuous_has_a_place_an_angle_and_a_duration():
    actions = np.array([(1.0, -1.0, 0.5, -1.0), (0.0, 1.1, 1.0, 1.1), (0.0, 0.0, 0.0, 0.25)])
    moves = drive("continuous", actions, np.repeat(BALLS, 3, axis=0))
    np.testing.assert_allclose(moves.start, [(0.7, -0.7), (0.0, 0.77), (0.0, 0.0)])
    np.testing.assert_allclose(moves.ctrl, [(0.0, 1.2), (-1.2, 0.0), (1.2, 0.0)], atol=1e-12)
    np.testing.assert_array_equal(moves.substeps, [1, 126, 75])


def test_spaces():
    assert action_space("perfect") == Discrete(40)
    assert action_space("discrete") == Discrete(800)
    box = action_space("continuous")
    assert (box.shape, box.low[0], box.high[0]) == ((4,), np.float32(-1.0), np.float32(1.1))
    clipped = check_actions(box, np.array([(5.0, -5.0, 0.5, 1.05)]), 1)
    np.testing.assert_allclose(clipped, [(1.1, -1.0, 0.5, 1.05)])
    assert check_actions(Discrete(40), np.array([3, 39], np.int32), 2).dtype == np.int64


@pytest.mark.parametrize(
    ("name", "actions", "error", "message"),
    [
        ("perfect", np.array([0, 40]), UnsupportedArgument, "40 in environment 1; give 0 to 39"),
        ("perfect", np.array([-1, 0]), UnsupportedArgument, "-1 in environment 0"),
        ("discrete", np.array([0, 800]), UnsupportedArgument, "give 0 to 799"),
        ("perfect", np.array([0.0, 1.0]), UnsupportedArgument, "dtype float64"),
        ("perfect", np.array([0, 1, 2]), UnsupportedArgument, r"shape \(3,\); expected \(2,\)"),
        ("continuous", np.zeros((2, 3)), UnsupportedArgument, r"expected \(2, 4\)"),
        ("continuous", np.array([(0, 0, 0, 0), (0, np.nan, 0, 0)]), NonFiniteError, "environment 1"),
    ],
)
def test_bad_actions_are_refused(name, actions, error, message):
    with pytest.raises(error, match=message):
        check_actions(action_space(name), actions, 2)


def test_unknown_action_type():
    with pytest.raises(UnsupportedArgument, match="nearest names: perfect"):
        action_space("prefect")
