"""States of text games as numbers: what a learner keeps of them, and what the prior says there.

An environment is known by its methods alone (`lago_fast.envs.text_env.TextVecEnv` is the contract).
Test: pytest tests/algorithms/test_text_states.py
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lago_fast.errors import NonFiniteError, PriorMismatch, TrainablePrior, UnsupportedArgument
from lago_fast.priors.text_base import TextActionPrior, TextEncoder, padding_mask

PADDING = -1  # in place of an action's id
ROWS_AT_ONCE = 1024  # of a prior's query


class TextState(Protocol):
    """What is seen in N environments; `admissible` is empty only where an episode is over."""

    @property
    def instruction(self) -> list[str]: ...
    @property
    def observation(self) -> list[str]: ...
    @property
    def admissible(self) -> list[tuple[str, ...]]: ...


class States(NamedTuple):
    """States as a plain tuple, such as some rows of others."""

    instruction: list[str]
    observation: list[str]
    admissible: list[tuple[str, ...]]


def rows_of(state: TextState, rows: Sequence[int] | np.ndarray) -> States:
    """Return the states of the given rows.

    Raises:
        UnsupportedArgument: one of them has no admissible action.
    """
    wanted = [int(row) for row in rows]
    for row in wanted:
        if not state.admissible[row]:
            raise UnsupportedArgument(
                f"admissible: row {row} has no action to choose from; a state needs at least one, unless its episode "
                "was terminated"
            )
    return States(
        [state.instruction[row] for row in wanted],
        [state.observation[row] for row in wanted],
        [state.admissible[row] for row in wanted],
    )


def playing_rows(state: TextState) -> np.ndarray:
    """Return the rows that have an action to choose; the others' episodes are over."""
    return np.flatnonzero([len(actions) > 0 for actions in state.admissible])


class TextStep(Protocol):
    """One step of N environments, an array [N] or N texts each; the row after an end is not valid."""

    @property
    def state(self) -> TextState: ...
    @property
    def reward(self) -> np.ndarray: ...
    @property
    def terminated(self) -> np.ndarray: ...
    @property
    def truncated(self) -> np.ndarray: ...
    @property
    def valid(self) -> np.ndarray: ...
    @property
    def success(self) -> np.ndarray: ...


class TextEnv(Protocol):
    num_envs: int
    max_actions: int | None

    def reset(self, seed: int | None = None) -> TextState: ...
    def step(self, choice: np.ndarray) -> TextStep: ...


class Seen(NamedTuple):
    """B states by their numbers."""

    state: Tensor  # [B, 2] int64, ids of the instruction and of the observation
    actions: Tensor  # [B, A] int64, ids of the admissible actions, PADDING behind them
    log_prior: Tensor  # [B, A] float32, -inf where padded or excluded

    def take(self, rows: Any) -> "Seen":
        """Return the states of the given rows."""
        return Seen(*(column[rows] for column in self))


class StateReader:
    """Numbers the texts of states and asks the prior about them.

    Args:
        encoder: of the texts.
        prior: None: every admissible action is as likely as another.

    Raises:
        TrainablePrior: a parameter of the prior requires a gradient.
    """

    def __init__(self, encoder: TextEncoder, prior: TextActionPrior | None) -> None:
        check_frozen(prior)
        self.encoder, self.prior = encoder, prior

    def read(self, state: TextState, rows: Sequence[int] | np.ndarray) -> Seen:
        """Return all N states; those not in `rows` are not looked at and have no actions.

        Raises:
            UnsupportedArgument: a state of `rows` has no admissible action.
            NonFiniteError, PriorMismatch: the prior's answer is NaN or excludes everything, or of another shape.
        """
        asked = rows_of(state, rows)
        n, width = len(state.observation), max(map(len, asked.admissible), default=0)
        seen = Seen(
            torch.zeros(n, 2, dtype=torch.int64),
            torch.full((n, width), PADDING, dtype=torch.int64),
            torch.full((n, width), -torch.inf),
        )
        if not asked.observation:
            return seen
        where = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        texts = (asked.instruction, asked.observation)
        seen.state[where] = torch.stack([self.encoder.ids(column) for column in texts], dim=1)
        mask = padding_mask(asked.admissible)
        numbers = torch.full(mask.shape, PADDING, dtype=torch.int64)
        numbers[mask] = self.encoder.ids([action for actions in asked.admissible for action in actions])
        seen.actions[where] = numbers
        seen.log_prior[where] = prior_answer(self.prior, asked)
        return seen


def prior_answer(prior: TextActionPrior | None, states: States) -> Tensor:
    """Return what a prior says [B, A] of states that all have actions; None finds every action equally likely.

    Raises:
        NonFiniteError, PriorMismatch: the answer is NaN or excludes everything, or is of another shape.
    """
    mask = padding_mask(states.admissible)
    if prior is None:
        return mask.float().log() - mask.sum(dim=1, keepdim=True).log()
    said = torch.full(mask.shape, -torch.inf)
    for start in range(0, len(mask), ROWS_AT_ONCE):
        stop = start + ROWS_AT_ONCE
        part = States(states.instruction[start:stop], states.observation[start:stop], states.admissible[start:stop])
        answer = prior.query(*part)
        expected = len(part.observation), max(map(len, part.admissible))
        if answer.shape != expected:
            raise PriorMismatch(
                f"prior: it answered {tuple(answer.shape)} about {expected[0]} states of at most {expected[1]} "
                "actions; one column is one admissible action"
            )
        said[start:stop, : expected[1]] = answer
    unusable = said.isnan().any(dim=1) | (said.amax(dim=1) == -torch.inf)
    if bool(unusable.any()):
        about = states.observation[int(unusable.nonzero()[0])][:80]
        raise NonFiniteError(f"prior: its answer about {about!r} is NaN, or excludes every admissible action; mend it")
    return said.masked_fill(~mask, -torch.inf)


def check_frozen(prior: TextActionPrior | None) -> None:
    """Raise TrainablePrior when any parameter of a prior requires a gradient."""
    if prior is not None and any(p.requires_grad for p in prior.parameters()):
        raise TrainablePrior("prior: it has parameters that require a gradient; call requires_grad_(False) on it")
