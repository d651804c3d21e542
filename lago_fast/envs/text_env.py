"""The vector-environment contract of text games: observations are texts, actions are chosen from admissible ones.

As on the array lane of `vec_env`, an episode's true last observation is returned where it ends, and the row after it
starts the next episode: it is no transition, carries `valid=False`, and belongs in no loss, statistic or step count.
Tests: tests/envs/test_text_env.py; for a concrete game tests/envs/test_frozen_lake.py and its neighbours.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lago_fast.errors import UnsupportedArgument


class TextState(NamedTuple):
    """What is seen in all N environments."""

    instruction: list[str]  # N texts: what the episode asks for, in words
    observation: list[str]  # N texts
    admissible: list[tuple[str, ...]]  # N sets of at least one action; empty only where an episode is over


class TextStep(NamedTuple):
    """One step of all environments; every array and list is fresh and belongs to the caller."""

    state: TextState  # an ended episode's instruction and true last observation
    reward: np.ndarray  # [N] float32; 0 on invalid rows
    terminated: np.ndarray  # [N] bool: no value follows
    truncated: np.ndarray  # [N] bool: ended by the limit of steps, to be bootstrapped
    valid: np.ndarray  # [N] bool: False on the row after an end
    success: np.ndarray  # [N] bool, at this step


class TextVecEnv(ABC):
    """N text games stepped together.

    `max_actions` is the largest number of admissible actions that a state can have, `None` where it is not known
    before playing.
    """

    num_envs: int
    max_actions: int | None

    @abstractmethod
    def reset(self, seed: int | None = None) -> TextState:
        """Start a new episode in every environment; a seed decides all episodes from here on."""

    @abstractmethod
    def step(self, choice: np.ndarray) -> TextStep:
        """Take in each environment the admissible action with index `choice` [N] int64.

        The choices of rows whose episode is over are ignored: those rows start a new one.

        Raises UnsupportedArgument for a choice outside of a row's admissible actions.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the games; a second call does nothing."""


def check_choice(choice: np.ndarray, admissible: Sequence[tuple[str, ...]], playing: np.ndarray) -> None:
    """Raise UnsupportedArgument unless `choice` [N] is an index into each playing [N] bool row's admissible actions."""
    if choice.shape != (len(admissible),):
        raise UnsupportedArgument(f"choice: shape {choice.shape}; give one index per environment, {len(admissible)}")
    for row in np.flatnonzero(playing).tolist():
        if not 0 <= choice[row] < len(admissible[row]):
            raise UnsupportedArgument(
                f"choice: {choice[row]} in environment {row}, which has {len(admissible[row])} admissible actions; "
                "give an index into the row's `admissible`"
            )
