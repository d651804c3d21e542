"""A pool that gives every episode a new simulator, for tasks whose simulator must not be used twice.

EnvPool 1.2.5 moves the goal of `hammer` and `shelf-place` by almost a metre at each reset of one simulator
(the goal's site is overwritten with its world position, which the next reset adds to). Only a simulator's
first episode is right, so here each environment is a pool of one, built anew with a new seed. It costs
about 50 ms per episode. Tests: tests/envs/test_metaworld.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ONLY = np.zeros(1, np.int32)  # id of a pool's one environment


class FreshPool:
    """Speaks the part of EnvPool's gymnasium interface that `MetaworldArrayEnv` uses.

    Args:
        build: makes a `BarePool` of one environment from a seed.
        seeds: one per environment; the seeds of its episodes are drawn from it.
    """

    def __init__(self, build: Callable[[int], Any], seeds: Sequence[int]) -> None:
        self._build = build
        self._generators = [np.random.default_rng(seed) for seed in seeds]
        self._pools: list[Any] = [None] * len(seeds)
        self._ended = np.zeros(len(seeds), bool)
        self._under_way: list[tuple[int, bool]] = []  # environment, and whether it starts an episode

    def _reset(self, ids: np.ndarray) -> None:
        """EnvPool's name for starting a reset without waiting."""
        for i in ids.tolist():
            self._pools[i] = None  # the old simulator goes before the new one takes memory
            self._pools[i] = self._build(int(self._generators[i].integers(2**31)))
            self._pools[i]._reset(ONLY)
            self._under_way.append((i, True))

    def send(self, actions: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Start a step [n, 4] of the environments `ids` [n]; those that ended start an episode instead."""
        for action, i in zip(actions, range(len(self._pools)) if ids is None else ids.tolist(), strict=True):
            if self._ended[i]:
                self._reset(np.array([i]))
            else:
                self._pools[i].send(action[None])
                self._under_way.append((i, False))

    def recv(self, reset: bool = False) -> tuple[Any, ...]:
        """Columns of all that is under way: (observation, info) of a reset, else EnvPool's five."""
        rows, started, self._under_way = [], self._under_way, []
        for i, starts in started:
            row = self._pools[i].recv(reset=starts)
            if starts:
                row = (row[0], np.zeros(1, np.float32), np.zeros(1, bool), np.zeros(1, bool), row[1])
            self._ended[i] = row[2][0] or row[3][0]
            rows.append(row)
        observation, reward, terminated, truncated = (
            np.concatenate([row[column] for row in rows]) for column in range(4)
        )
        info = {
            "env_id": np.array([i for i, _ in started]),
            "success": np.concatenate([row[4]["success"] for row in rows]),
        }
        return (observation, info) if reset else (observation, reward, terminated, truncated, info)
