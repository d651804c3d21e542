"""Transitions of text games as numbers, in arrays that are laid out once.

Test: pytest tests/algorithms/test_text_replay.py
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lago_fast.algorithms.text_states import PADDING, Seen
from lago_fast.errors import NonFiniteError, UnsupportedArgument


class TextBatch(NamedTuple):
    """B transitions; of a terminated one nothing follows, and `following` has no actions there."""

    seen: Seen
    choice: Tensor  # [B] int64, index into the actions seen
    reward: Tensor  # [B] float32
    following: Seen
    terminated: Tensor  # [B] bool; a truncated episode goes on where values are concerned


class TextReplayBuffer:
    """The last transitions, in a ring.

    Args:
        buffer_size: transitions that it holds.
        max_actions: the most admissible actions of a state; None: rows are widened when they must be.

    Raises:
        UnsupportedArgument: sizes below 1.
    """

    def __init__(self, buffer_size: int, max_actions: int | None = None) -> None:
        if buffer_size < 1:
            raise UnsupportedArgument(f"buffer_size={buffer_size}: give at least 1")
        self.buffer_size, self.size, self._next = buffer_size, 0, 0

        def empty() -> Seen:
            shape = (buffer_size, max_actions or 1)
            return Seen(
                torch.zeros(buffer_size, 2, dtype=torch.int64),
                torch.full(shape, PADDING, dtype=torch.int64),
                torch.full(shape, -torch.inf),
            )

        self._stored = TextBatch(
            empty(),
            torch.zeros(buffer_size, dtype=torch.int64),
            torch.zeros(buffer_size),
            empty(),
            torch.zeros(buffer_size, dtype=torch.bool),
        )

    def __len__(self) -> int:
        return self.size

    def add(self, batch: TextBatch) -> None:
        """Store transitions over the oldest ones.

        Raises:
            NonFiniteError: a reward is NaN or infinite.
        """
        if not bool(torch.isfinite(batch.reward).all()):
            raise NonFiniteError("env: a reward is NaN or infinite; mend the env")
        stored, rows = self._stored, (torch.arange(len(batch.choice)) + self._next) % self.buffer_size
        self._stored = stored = stored._replace(
            seen=_put(stored.seen, rows, batch.seen), following=_put(stored.following, rows, batch.following)
        )
        stored.choice[rows], stored.reward[rows] = batch.choice, batch.reward
        stored.terminated[rows] = batch.terminated
        self._next = (self._next + len(rows)) % self.buffer_size
        self.size = min(self.size + len(rows), self.buffer_size)

    def sample(self, batch_size: int, generator: Generator | None = None) -> TextBatch:
        """Return transitions drawn uniformly, with replacement."""
        return self._take(torch.randint(self.size, (batch_size,), generator=generator))

    def distinct(self) -> tuple[Tensor, Tensor]:
        """Return the ids of the states [n, 2] and of the actions [m] that were met, each once."""
        seen = self._stored.seen.take(slice(self.size))
        return seen.state.unique(dim=0), seen.actions[seen.actions != PADDING].unique()

    def _take(self, rows: Tensor) -> TextBatch:
        stored = self._stored
        return TextBatch(
            stored.seen.take(rows),
            stored.choice[rows],
            stored.reward[rows],
            stored.following.take(rows),
            stored.terminated[rows],
        )


def _put(column: Seen, rows: Tensor, seen: Seen) -> Seen:
    """Write `seen` to the rows of a column, padded at the end; return the column, a wider one where it must be."""
    width = seen.actions.shape[1]
    if width > column.actions.shape[1]:
        more = (0, max(width, 2 * column.actions.shape[1]) - column.actions.shape[1])
        column = Seen(
            column.state,
            torch.nn.functional.pad(column.actions, more, value=PADDING),
            torch.nn.functional.pad(column.log_prior, more, value=-torch.inf),
        )
    column.state[rows] = seen.state
    column.actions[rows, :width], column.actions[rows, width:] = seen.actions, PADDING
    column.log_prior[rows, :width], column.log_prior[rows, width:] = seen.log_prior, -torch.inf
    return column
