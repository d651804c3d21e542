"""What a policy sees of CLEVR-Robot: positions, velocities, described objects or an image, then the instruction.

Tests: tests/envs/test_clevr_robot.py.
"""

import numpy as np
from gymnasium.spaces import Box

from lago_fast.envs.clevr_drawing import Painter
from lago_fast.envs.clevr_goals import COLOURS, NUM_BALLS

OBSERVATIONS = ("positions", "positions_velocities", "order_invariant", "image")
IMAGE_SIZE = 64
BOUND_M = 1.0  # a ball beyond is off the table: its simulation has diverged
BOUND_M_S = 20.0  # faster, which no push makes a ball, is seen as this
# what an object may be; every ball here is large, of rubber, and a sphere
SIZES, MATERIALS, SHAPES = ("large", "medium", "small"), ("rubber", "metal"), ("sphere", "box", "cylinder")
_VELOCITY = np.arange(30).reshape(NUM_BALLS, 6)[:, :2]  # columns of qvel


class Observer:
    """Observations [n, O] float32 of n environments.

    Args:
        kind: one of `OBSERVATIONS`.
        painter: of images.
        table: [M, Z] float32, of which the instruction's row is appended; None: nothing is.
    """

    def __init__(self, kind: str, painter: Painter, table: np.ndarray | None) -> None:
        self._kind, self._painter, self._table = kind, painter, table
        self._traits = _traits()
        low, high = self._state_bounds()
        self.state_dim = len(low)
        if table is not None:
            low, high = np.concatenate([low, table.min(axis=0)]), np.concatenate([high, table.max(axis=0)])
        self.space = Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)

    def _state_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        position = np.full(2 * NUM_BALLS, BOUND_M)
        if self._kind == "positions":
            return -position, position
        if self._kind == "positions_velocities":
            high = np.concatenate([position, np.full(2 * NUM_BALLS, BOUND_M_S)])
            return -high, high
        if self._kind == "image":
            return np.zeros(3 * IMAGE_SIZE**2), np.ones(3 * IMAGE_SIZE**2)
        low = np.concatenate([np.full((NUM_BALLS, 2), -BOUND_M), np.zeros_like(self._traits)], axis=1)
        return low.ravel(), np.ones(low.size)

    def __call__(self, ball_xy: np.ndarray, qvel: np.ndarray, instruction_id: np.ndarray) -> np.ndarray:
        """Look at balls at `ball_xy` [n, 5, 2] with velocities `qvel` [n, 32]."""
        n = len(ball_xy)
        if self._kind == "image":
            columns = [self._painter(ball_xy, IMAGE_SIZE).reshape(n, -1) * np.float32(1 / 255)]
        elif self._kind == "order_invariant":
            traits = np.broadcast_to(self._traits, (n, *self._traits.shape))
            columns = [np.concatenate([ball_xy, traits], axis=2).reshape(n, -1)]
        else:
            columns = [ball_xy.reshape(n, -1)]
            if self._kind == "positions_velocities":
                columns.append(np.clip(qvel[:, _VELOCITY], -BOUND_M_S, BOUND_M_S).reshape(n, -1))
        if self._table is not None:
            columns.append(self._table[instruction_id])
        if len(columns) == 1:
            return columns[0].astype(np.float32)
        seen = np.empty((n, *self.space.shape), np.float32)
        return np.concatenate(columns, axis=1, out=seen, casting="same_kind")


def _traits() -> np.ndarray:
    """[5, 13]: one-hot size, colour, material and shape of each ball."""
    first = [np.tile(np.eye(1, len(names)), (NUM_BALLS, 1)) for names in (SIZES, MATERIALS, SHAPES)]
    return np.concatenate([first[0], np.eye(len(COLOURS)), first[1], first[2]], axis=1)
