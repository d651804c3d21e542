"""The three action types of CLEVR-Robot: from what a policy says to where the agent starts and how it is driven.

Published numbers: https://github.com/google-research/clevr_robot_env. Tests: tests/envs/test_clevr_actions.py.
"""

from typing import NamedTuple

import numpy as np
from gymnasium.spaces import Box, Discrete

from lago_fast.envs.clevr_goals import COLOURS, NUM_BALLS, nearest
from lago_fast.errors import NonFiniteError, UnsupportedArgument

# the diagonals are as published: longer than 1, so that they start farther off and push harder
PUSHES = np.array(
    [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)]
)
SUBSTEPS = 40  # of 10 ms
COMPASS = ("right", "behind", "left", "front", "right-behind", "left-behind", "right-front", "left-front")  # of PUSHES
PUSH_NAMES = tuple(f"{colour} {way}" for colour in COLOURS for way in COMPASS)
BEHIND_BALL = 0.15  # of a push, where the agent starts, in lengths of its direction
GRID = 10
ACTION_TYPES = ("perfect", "discrete", "continuous")


class Drive(NamedTuple):
    """What the physics needs of n actions."""

    start: np.ndarray  # [n, 2] float64, metres
    ctrl: np.ndarray  # [n, 2] float64, newtons
    substeps: int | np.ndarray  # one for all, or [n] int64


def action_space(action_type: str) -> Box | Discrete:
    """The space of one environment.

    "perfect": Discrete(40), `8 * ball + push`, a push of one ball in one of 8 directions. "discrete": Discrete(800),
    `100 * push + 10 * column + row`, a push from a grid of starts. "continuous": Box [-1, 1.1]^4, the start's x and y
    in units of 0.7 m, the angle in half turns, the duration: `int(60 (a + 1))` steps of 10 ms, at least one.

    Raises:
        UnsupportedArgument: another name.
    """
    if action_type not in ACTION_TYPES:
        raise UnsupportedArgument(f"action_type={action_type!r} is unknown; {nearest(action_type, ACTION_TYPES)}")
    if action_type == "continuous":
        return Box(-1.0, 1.1, (4,), np.float32)
    return Discrete(NUM_BALLS * len(PUSHES) if action_type == "perfect" else len(PUSHES) * GRID * GRID)


def check_actions(space: Box | Discrete, actions: np.ndarray, num_envs: int) -> np.ndarray:
    """The actions as int64 [N], or as float64 [N, 4] clipped to the box.

    Raises:
        UnsupportedArgument: a shape or an integer that does not fit the space.
        NonFiniteError: NaN or infinity.
    """
    actions = np.asarray(actions)
    expected = (num_envs,) if isinstance(space, Discrete) else (num_envs, *space.shape)
    if actions.shape != expected:
        raise UnsupportedArgument(f"actions has shape {actions.shape}; expected {expected}")
    if isinstance(space, Discrete):
        if not np.issubdtype(actions.dtype, np.integer):
            raise UnsupportedArgument(f"actions has dtype {actions.dtype}; these are numbered, give integers")
        wrong = (actions < 0) | (actions >= space.n)
        if wrong.any():
            i = int(wrong.argmax())
            raise UnsupportedArgument(f"actions: {actions[i]} in environment {i}; give 0 to {space.n - 1}")
        return actions.astype(np.int64)
    bad = ~np.isfinite(actions).all(axis=1)
    if bad.any():
        raise NonFiniteError(f"actions: NaN or infinity in environment {int(bad.argmax())}: check the policy's outputs")
    return np.clip(actions.astype(np.float64), space.low, space.high)


def drive(action_type: str, actions: np.ndarray, ball_xy: np.ndarray) -> Drive:
    """How the agent moves for checked actions [n] or [n, 4], where the balls are at `ball_xy` [n, 5, 2]."""
    if action_type == "perfect":
        ctrl = PUSHES[actions % len(PUSHES)]
        ball = ball_xy[np.arange(len(actions)), actions // len(PUSHES)]
        return Drive(ball - BEHIND_BALL * ctrl, ctrl, SUBSTEPS)
    if action_type == "discrete":
        push, cell = np.divmod(actions, GRID * GRID)
        column, row = np.divmod(cell, GRID)
        start = np.stack([-0.7 + 0.14 * column, -0.35 + 0.12 * row], axis=1)
        return Drive(start, 1.1 * PUSHES[push], SUBSTEPS)
    angle = np.pi * actions[:, 2]
    ctrl = 1.2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return Drive(0.7 * actions[:, :2], ctrl, np.maximum(1, ((actions[:, 3] + 1.0) * 60.0).astype(np.int64)))
