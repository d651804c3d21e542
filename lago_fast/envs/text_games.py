"""What all text games share: rows that end, wait one step and start again, limits of steps, and repeatable draws.

Tests: tests/envs/test_text_games.py.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np

from lago_fast.envs.text_env import TextState, TextStep, TextVecEnv, check_choice
from lago_fast.errors import UnsupportedArgument, check_seed


class Outcome(NamedTuple):
    """What one turn did; rows that did not play are ignored."""

    reward: np.ndarray  # [N] float32
    terminated: np.ndarray  # [N] bool
    success: np.ndarray  # [N] bool


class TextGames(TextVecEnv):
    """N rows of a text game, each with episodes of at most `horizon` steps.

    What row i draws depends on the seed and i alone, not on the number of rows; rows of different seeds have nothing
    in common. Without a seed, `reset` goes on in the sequence of draws.
    """

    def __init__(self, num_envs: int, horizon: int, seed: int) -> None:
        for name, value, lowest in (("num_envs", num_envs, 1), ("horizon", horizon, 1), ("seed", seed, 0)):
            if value < lowest:
                raise UnsupportedArgument(f"{name}={value}: give {lowest} or more")
        self.num_envs, self.horizon = num_envs, horizon
        self._over = np.ones(num_envs, bool)
        self._turns = np.zeros(num_envs, np.int64)
        self._admissible: list[tuple[str, ...]] = [()] * num_envs
        self._counts = np.zeros(num_envs, np.int64)  # of admissible actions, the same as the lengths of the above
        self._seed(seed)

    def _seed(self, seed: int) -> None:
        check_seed("seed", seed)
        self._row_seed = np.random.SeedSequence(seed).generate_state(self.num_envs, np.uint64)
        self._drawn = np.zeros(self.num_envs, np.uint64)

    def _draw(self, rows: np.ndarray, below: int) -> np.ndarray:
        """Return one integer from 0 to below - 1 for each of the rows [M]."""
        self._drawn[rows] += np.uint64(1)
        bits = _mixed(_mixed(self._row_seed[rows]) + self._drawn[rows])
        return (bits >> np.uint64(33)).astype(np.int64) % below

    def reset(self, seed: int | None = None) -> TextState:
        """Start a new episode in every environment; a seed decides all episodes from here on."""
        if seed is not None:
            if seed < 0:
                raise UnsupportedArgument(f"seed={seed}: give 0 or more")
            self._seed(seed)
        self._over[:], self._turns[:] = False, 0
        self._start(np.arange(self.num_envs))
        return self._state(np.zeros(self.num_envs, bool))

    def step(self, choice: np.ndarray) -> TextStep:
        """Take in each environment the admissible action with index `choice` [N] int64.

        The choices of rows whose episode is over are ignored: those rows start a new one.

        Raises UnsupportedArgument for a choice outside of a row's admissible actions.
        """
        choice, playing = np.asarray(choice), ~self._over
        if choice.shape != (self.num_envs,) or (playing & ((choice < 0) | (choice >= self._counts))).any():
            check_choice(choice, self._admissible, playing)
        outcome = self._play(np.where(playing, choice, 0), playing)
        if not playing.all():
            rows = np.flatnonzero(~playing)
            self._turns[rows] = 0
            self._start(rows)
        self._turns += playing
        terminated = outcome.terminated & playing
        truncated = playing & ~terminated & (self._turns >= self.horizon)
        self._over = terminated | truncated
        return TextStep(
            state=self._state(terminated),
            reward=np.where(playing, outcome.reward, 0).astype(np.float32),
            terminated=terminated,
            truncated=truncated,
            valid=playing,
            success=outcome.success & playing,
        )

    def _state(self, terminated: np.ndarray) -> TextState:
        instruction, observation, admissible = self._see()
        self._check_seen({"instruction": instruction, "observation": observation, "admissible": admissible})
        self._admissible = admissible
        self._counts = np.fromiter(map(len, admissible), np.int64, self.num_envs)
        if terminated.any():
            admissible = [() if over else actions for over, actions in zip(terminated, admissible, strict=True)]
        return TextState(instruction, observation, list(admissible))

    def _check_seen(self, seen: dict[str, Any]) -> None:
        """Refuse what a game forgot to put in a list: a text would be taken for its letters."""
        for name, column in seen.items():
            if isinstance(column, str) or len(column) != self.num_envs:
                raise UnsupportedArgument(
                    f"_see: {name} of {self.num_envs} games is {column!r}; return a list, one each"
                )
        for actions in seen["admissible"]:
            if isinstance(actions, str):
                raise UnsupportedArgument(
                    f"_see: the admissible actions {actions!r} are one text; return a list of texts"
                )

    @abstractmethod
    def expert(self) -> np.ndarray:
        """Return the scripted expert's choices [N] int64 for the states now; 0 on rows whose episode is over."""

    @abstractmethod
    def _start(self, rows: np.ndarray) -> None:
        """Bring the rows [M] to the start of an episode."""

    @abstractmethod
    def _play(self, choice: np.ndarray, playing: np.ndarray) -> Outcome:
        """Advance the `playing` [N] rows by their admissible action `choice` [N]."""

    @abstractmethod
    def _see(self) -> tuple[list[str], list[str], list[tuple[str, ...]]]:
        """Return fresh lists of instructions, observations and admissible actions of all rows."""

    def close(self) -> None:
        """Free the games; a second call does nothing."""


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Scramble uint64 words: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014)."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
