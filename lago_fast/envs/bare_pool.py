"""EnvPool's simulators without the dictionaries that its Python layer makes of every step.

That layer flattens the actions, checks them and builds a tree of infos of which `MetaworldArrayEnv` reads two columns:
a third of what a step of eight environments costs the thread that sends it. Tests: tests/envs/test_bare_pool.py
"""

from types import ModuleType
from typing import Any

import numpy as np

from lago_fast.errors import MissingExtra

COLUMNS = ("obs", "reward", "done", "trunc", "info:env_id", "info:success")


class BarePool:
    """Speaks the part of EnvPool's gymnasium interface that `MetaworldArrayEnv` uses.

    Args:
        pool: of `envpool.make_gymnasium`, for environments of one player.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._every = np.arange(len(pool), dtype=np.int32)
        self._columns = [pool._state_keys.index(name) for name in COLUMNS]

    def _reset(self, ids: np.ndarray) -> None:
        """EnvPool's name for starting a reset without waiting."""
        self._pool._reset(ids)

    def send(self, actions: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Start a step of the environments `ids` [n] with contiguous float32 actions [n, 4]."""
        ids = self._every if ids is None else ids.astype(np.int32)
        self._pool._send([ids, ids, actions])

    def recv(self, reset: bool = False) -> tuple[Any, ...]:
        """Columns of all that is under way: (observation, info) of a reset, else EnvPool's five."""
        columns = self._pool._recv()
        observation, reward, done, truncated, env_id, success = (columns[i] for i in self._columns)
        info = {"env_id": env_id, "success": success}
        return (observation, info) if reset else (observation, reward, done & ~truncated, truncated, info)


def import_envpool() -> ModuleType:
    """EnvPool, or MissingExtra."""
    try:
        import envpool
    except ImportError as error:
        raise MissingExtra("Meta-World needs EnvPool: pip install 'lago_fast[envs]'") from error
    module: ModuleType = envpool
    return module
