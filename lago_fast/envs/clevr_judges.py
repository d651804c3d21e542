"""Who says that a goal is reached: every judge of CLEVR-Robot on batches of sub-goals.

A sub-goal is seen in its own frame: `along` [n, K] metres from destination to source in the goal's direction,
`across` [n, K] to the left of that direction. Bounds are as published: what is said to be below is strictly below.
Tests: tests/envs/test_clevr_judges.py.
"""

from collections.abc import Callable

import numpy as np

from lago_fast.envs.clevr_goals import AXES, Goals
from lago_fast.envs.clevr_physics import BALL_RADIUS

KALM_DISTANCE_M = 3 * BALL_RADIUS + 0.001
KALM_ZERO_M = 1e-3  # a component below counts as none
CLEVR_COSINE, CLEVR_DISTANCE_M = 0.6, 0.7
POLAR_COSINE, POLAR_RANGE_M2 = 0.71, 0.49
LINE_SLOPE = np.tan(np.radians(30.0))
GATHER_DISTANCE_M = 0.325

# directions of a push, of which "easy" asks for those with a component along the goal's: rows as DIRECTIONS
PUSHES_TOWARDS = np.zeros((4, 8), bool)
for _row, _pushes in enumerate(((1, 4, 5), (2, 5, 7), (3, 6, 7), (0, 4, 6))):
    PUSHES_TOWARDS[_row, list(_pushes)] = True
EASY_SHIFT_M = 0.15


def offsets(goals: Goals, ball_xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(along, across) [n, K] of goals [n, K] where the balls are at `ball_xy` [n, 5, 2]."""
    rows = np.arange(len(ball_xy))[:, None]
    offset = ball_xy[rows, goals.source] - ball_xy[rows, goals.destination]
    axis = AXES[goals.direction]
    x, y, u, v = offset[..., 0], offset[..., 1], axis[..., 0], axis[..., 1]
    return x * u + y * v, y * u - x * v


def judge_kalm(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Closer than 0.391 m, and within the sector [-45, 45) degrees around the direction."""
    near = np.sqrt(along * along + across * across) < KALM_DISTANCE_M
    along = np.where(np.abs(along) < KALM_ZERO_M, 0.0, along)
    across = np.where(np.abs(across) < KALM_ZERO_M, 0.0, across)
    return near & (-along <= across) & (across < along)


def judge_clevr(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The original relation: a cosine above 0.6 to the direction, and closer than 0.7 m."""
    distance = np.sqrt(along * along + across * across)
    return (along > CLEVR_COSINE * distance) & (distance < CLEVR_DISTANCE_M)


def judge_clevr_polar(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The original's polar variant: a cosine c above 0.71, and a squared distance below 0.49 (2 c^2 - 1)."""
    square = along * along + across * across
    cosine = along / np.sqrt(np.maximum(square, np.finfo(np.float64).tiny))
    return (cosine > POLAR_COSINE) & (square < POLAR_RANGE_M2 * (2.0 * cosine * cosine - 1.0))


def judge_line(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """At most 30 degrees off the direction, at any distance."""
    return (along > 0.0) & (np.abs(across) <= LINE_SLOPE * along)


def judge_gather(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """At most 0.325 m away."""
    return np.sqrt(along * along + across * across) <= GATHER_DISTANCE_M


Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]
JUDGES: dict[str, Judge] = {"kalm": judge_kalm, "clevr": judge_clevr, "clevr-polar": judge_clevr_polar}
EASY_JUDGES = ("action", "shift")
_OF_KIND: dict[str, Judge] = {"line": judge_line, "gather": judge_gather}


def satisfied(goals: Goals, ball_xy: np.ndarray, judge: str = "kalm") -> np.ndarray:
    """[n, K] bool: which sub-goals hold where the balls are at `ball_xy` [n, 5, 2]; of "easy" none.

    Args:
        goals: one row per row of `ball_xy`.
        ball_xy: metres.
        judge: of relations: "kalm", "clevr" or "clevr-polar".
    """
    return satisfied_at(goals.kind, *offsets(goals, ball_xy), judge)


def satisfied_at(kind: str, along: np.ndarray, across: np.ndarray, judge: str) -> np.ndarray:
    """`satisfied` of goals of a kind whose `offsets` [n, K] are known."""
    if kind == "easy":
        return np.zeros(along.shape, bool)
    return _OF_KIND.get(kind, JUDGES[judge])(along, across)


def easy_by_action(goals: Goals, ball: np.ndarray, push: np.ndarray) -> np.ndarray:
    """[n] bool: the push [n] (0 to 7) is at the goal's ball and has a component in its direction."""
    return (ball == goals.source[:, 0]) & PUSHES_TOWARDS[goals.direction[:, 0], push]


def easy_by_shift(goals: Goals, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[n] bool: some ball moved at least 0.15 m in the goal's direction, from `before` to `after` [n, 5, 2]."""
    shift = ((after - before) * AXES[goals.direction]).sum(axis=2)
    return (shift >= EASY_SHIFT_M).any(axis=1)
