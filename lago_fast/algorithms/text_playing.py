"""Playing vectorised text games: what is seen, which choices count, and the transitions and episodes that come of it.

Test: pytest tests/algorithms/test_text_playing.py
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lago_fast.algorithms.text_replay import TextBatch
from lago_fast.algorithms.text_states import Seen, StateReader, TextEnv, TextStep


class Played(NamedTuple):
    """One step of all environments."""

    batch: TextBatch  # of the valid rows, [n]
    step: TextStep
    infos: list[dict[str, Any]]  # per env; "episode" and "is_success" where one ended, as Stable-Baselines3 has them


class TextPlay:
    """Episodes under way.

    Args:
        env: stepped from here alone, reset now.
        reader: of its states; each state is read once.
        seed: of the episodes, None: the env's own.
    """

    def __init__(self, env: TextEnv, reader: StateReader, seed: int | None) -> None:
        self.env, self.reader, n = env, reader, env.num_envs
        self.seen: Seen = reader.read(env.reset(seed), range(n))
        self.playing = np.ones(n, dtype=bool)  # rows whose episode is not over
        self._total, self._length, self._success = np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
        self._started = time.time()

    def step(self, choose: Callable[[Seen], Tensor]) -> Played:
        """Take in every env that plays the action that `choose` returns for what is seen, an index [n].

        Raises:
            UnsupportedArgument: a state that is not terminal has no admissible action.
        """
        rows = torch.from_numpy(np.flatnonzero(self.playing))
        choice = torch.zeros(self.env.num_envs, dtype=torch.int64)
        if len(rows):
            choice[rows] = choose(self.seen.take(rows))
        step = self.env.step(choice.numpy())
        # a truncated state is read too: its value is needed
        following = self.reader.read(step.state, np.flatnonzero(~step.terminated))
        valid = torch.from_numpy(np.flatnonzero(step.valid))
        batch = TextBatch(
            self.seen.take(valid),
            choice[valid],
            torch.from_numpy(step.reward)[valid],
            following.take(valid),
            torch.from_numpy(step.terminated)[valid],
        )
        self.seen, self.playing = following, ~(step.terminated | step.truncated)
        return Played(batch, step, self._ended(step))

    def _ended(self, step: TextStep) -> list[dict[str, Any]]:
        """Count a step towards its episodes; return what is said of those that ended."""
        self._total += np.where(step.valid, step.reward, 0)
        self._length += step.valid
        self._success |= step.success & step.valid
        infos: list[dict[str, Any]] = [{} for _ in range(self.env.num_envs)]
        for row in np.flatnonzero(~self.playing).tolist():
            about = {"r": float(self._total[row]), "l": int(self._length[row]), "t": time.time() - self._started}
            infos[row] = {"episode": about, "is_success": bool(self._success[row])}
            self._total[row], self._length[row], self._success[row] = 0, 0, False
        return infos
