"""A Meta-World state in words: where the hand, the objects and the goal are.

Layout of the 39 numbers: Meta-World's `sawyer_xyz_env.py`, `_get_obs`. Test: pytest tests/envs/test_state_words.py
"""

import numpy as np

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


def _way(start: np.ndarray, end: np.ndarray) -> str:
    """Return how to get from one place to another, axis by axis."""
    steps = [
        f"{100 * abs(step):.0f} cm {names[int(step > 0)]}"
        for step, names in zip(end - start, DIRECTIONS, strict=True)
        if abs(step) >= NEAR_M
    ]
    return ", ".join(steps) or "within 1 cm"
