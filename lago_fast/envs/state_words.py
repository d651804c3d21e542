"""States in words: where Meta-World's hand, objects and goal are, and CLEVR-Robot's balls.

Layout of Meta-World's 39 numbers: its `sawyer_xyz_env.py`, `_get_obs`. Test: pytest tests/envs/test_state_words.py
"""

import numpy as np

from lago_fast.envs.clevr_goals import COLOURS

HAND, GRIPPER, FIRST, SECOND, GOAL = slice(0, 3), 3, slice(4, 7), slice(11, 14), slice(36, 39)
DIRECTIONS = (("left", "right"), ("back", "ahead"), ("down", "up"))  # of the axes x, y, z
NEAR_M = 0.01


def describe_metaworld(state: np.ndarray) -> str:
    """Return one line about a state [39], distances in centimetres."""
    hand, goal = state[HAND], state[GOAL]
    parts = [
        f"hand at {hand[0]:.2f}, {hand[1]:.2f}, {hand[2]:.2f} m, gripper {100 * state[GRIPPER]:.0f} % open",
        f"object {_way(hand, state[FIRST])} of the hand",
    ]
    if state[SECOND].any():
        parts.append(f"second object {_way(hand, state[SECOND])} of the hand")
    if goal.any():
        parts.append(f"goal {_way(state[FIRST], goal)} of the object")
    return "; ".join(parts)


def describe_clevr(state: np.ndarray) -> str:
    """Return one line about the balls' places, the first 10 numbers of a state, in centimetres from the middle."""
    places = state[: 2 * len(COLOURS)].reshape(-1, 2)
    return "; ".join(f"{colour} {_way(np.zeros(2), place)}" for colour, place in zip(COLOURS, places, strict=True))


def _way(start: np.ndarray, end: np.ndarray) -> str:
    """Return how to get from one place to another, axis by axis."""
    steps = [
        f"{100 * abs(step):.0f} cm {names[int(step > 0)]}"
        for step, names in zip(end - start, DIRECTIONS, strict=False)  # two axes or three
        if abs(step) >= NEAR_M
    ]
    return ", ".join(steps) or "within 1 cm"
