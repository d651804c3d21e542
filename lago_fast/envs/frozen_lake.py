"""Frozen Lake in words: gymnasium's maps, and an observation that says what lies around.

Tests: tests/envs/test_frozen_lake.py.
"""

from typing import Literal

import numpy as np

from lago_fast.envs.text_games import Outcome, TextGames
from lago_fast.errors import UnsupportedArgument

INSTRUCTION = "Walk over the frozen lake to the goal. Do not fall into a hole."
ACTIONS = ("go left", "go down", "go right", "go up")  # in gymnasium's order
HORIZONS = {"4x4": 20, "8x8": 40}  # the shortest ways have 6 and 14 steps
_MOVES = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])
_SIDES = ("left", "below", "right", "above")
_NAMES = {"S": "ice", "F": "ice", "H": "a hole", "G": "the goal"}


class FrozenLake(TextGames):
    """N frozen lakes. A hole or the goal ends the episode; only the goal rewards, by 1, and is a success.

    On slippery ice a step goes with equal probabilities where it was meant to, or to either side of that.
    """

    max_actions = len(ACTIONS)

    def __init__(
        self,
        num_envs: int,
        map: Literal["4x4", "8x8"] = "4x4",
        *,
        slippery: bool = False,
        horizon: int | None = None,
        seed: int = 0,
    ) -> None:
        from gymnasium.envs.toy_text.frozen_lake import MAPS

        if map not in HORIZONS:
            raise UnsupportedArgument(f"map={map!r}: give one of {', '.join(map_name for map_name in HORIZONS)}")
        super().__init__(num_envs, HORIZONS[map] if horizon is None else horizon, seed)
        self.slippery = slippery
        tiles = [list(row) for row in MAPS[map]]
        self._size = len(tiles)
        self._tiles = np.array(tiles).ravel()
        self._next = self._moved()  # [tiles, 4]
        self._texts = [self._describe(tile) for tile in range(len(self._tiles))]
        self._advice = self._shortest()
        self._start_tile = int(np.flatnonzero(self._tiles == "S")[0])
        self._tile = np.full(num_envs, self._start_tile)

    def _moved(self) -> np.ndarray:
        place = np.stack(np.divmod(np.arange(len(self._tiles)), self._size), axis=-1)
        moved = np.clip(place[:, None] + _MOVES, 0, self._size - 1)
        return moved[..., 0] * self._size + moved[..., 1]

    def _describe(self, tile: int) -> str:
        row, column = divmod(tile, self._size)
        goal_row, goal_column = divmod(int(np.flatnonzero(self._tiles == "G")[0]), self._size)
        around = [
            f"{side}: {_NAMES[self._tiles[there]] if there != tile else 'the edge of the lake'}"
            for side, there in zip(_SIDES, self._next[tile], strict=True)
        ]
        here = {"H": "You fell into the hole", "G": "You reached the goal"}.get(self._tiles[tile], "You stand")
        return (
            f"{here} in row {row + 1}, column {column + 1} of {self._size} rows and columns. "
            f"The goal is in row {goal_row + 1}, column {goal_column + 1}. Around you, {', '.join(around)}."
        )

    def _shortest(self) -> np.ndarray:
        """Per tile the first move of a shortest way to the goal that meets no hole."""
        distance = np.where(self._tiles == "G", 0, len(self._tiles))
        for _ in self._tiles:
            onward = distance[self._next].min(axis=1) + 1
            distance = np.where(self._tiles == "H", len(self._tiles), np.minimum(distance, onward))
        return distance[self._next].argmin(axis=1)

    def expert(self) -> np.ndarray:
        """Return the first moves [N] of shortest ways; slippery ice is not looked out for."""
        return np.where(self._over, 0, self._advice[self._tile])

    def _start(self, rows: np.ndarray) -> None:
        self._tile[rows] = self._start_tile

    def _play(self, choice: np.ndarray, playing: np.ndarray) -> Outcome:
        if self.slippery:
            rows = np.flatnonzero(playing)
            choice[rows] = (choice[rows] + self._draw(rows, 3) - 1) % len(ACTIONS)
        self._tile = np.where(playing, self._next[self._tile, choice], self._tile)
        tile = self._tiles[self._tile]
        reached = tile == "G"
        return Outcome(reached.astype(np.float32), reached | (tile == "H"), reached)

    def _see(self) -> tuple[list[str], list[str], list[tuple[str, ...]]]:
        texts = self._texts
        return (
            [INSTRUCTION] * self.num_envs,
            [texts[tile] for tile in self._tile.tolist()],
            [ACTIONS] * self.num_envs,
        )


def make_frozen_lake(
    num_envs: int,
    map: Literal["4x4", "8x8"] = "4x4",
    *,
    slippery: bool = False,
    horizon: int | None = None,
    seed: int = 0,
) -> FrozenLake:
    """Return `num_envs` frozen lakes whose observations say in words where one stands and what lies around.

    Args:
        num_envs: N.
        map: gymnasium's map of this name.
        slippery: whether a step may go to the side of where it was meant to go.
        horizon: steps until an episode is truncated; None is 20 for 4x4 and 40 for 8x8.
        seed: decides where one slips.

    Raises:
        UnsupportedArgument: an unknown map, or a number out of range.
    """
    return FrozenLake(num_envs, map, slippery=slippery, horizon=horizon, seed=seed)
