"""What a prior over text actions is, and what turns texts into vectors: the contracts between these and the trainers.

A prior reads an instruction, an observation and the admissible actions, all of them texts, and answers with a
distribution over those actions. The states of one query may have different numbers of admissible actions: rows are
padded at their end.
Test: pytest tests/priors/test_text_base.py
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lago_fast.errors import UnsupportedArgument


@runtime_checkable
class TextActionPrior(Protocol):
    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that can change an answer."""
        ...

    def query(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> Tensor:
        """Return log-probabilities [B, A] float32 over each row's admissible actions, A the largest number of them.

        Each row is normalised; -inf where a row is padded, and on actions that the prior excludes.

        Raises UnsupportedArgument for a row without admissible actions.
        """
        ...

    def telemetry(self) -> dict[str, float]:
        """Return the figures to log that were gathered since the last call."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return every parameter; none may require a gradient."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    @property
    def width(self) -> int:
        """Return Z, the length of a vector."""
        ...

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that can change a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return one vector per text, [B, Z] float32, without gradients."""
        ...

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return a number for each text, [B] int64 from 0 on; the same text has the same one within a process."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Return the vectors of texts that `ids` has numbered, [B, Z] float32, each computed once."""
        ...


def check_admissible(admissible: Sequence[Sequence[str]]) -> int:
    """Return A, the largest number of admissible actions of a row; a row without any raises UnsupportedArgument."""
    for row, actions in enumerate(admissible):
        if not actions:
            raise UnsupportedArgument(
                f"admissible: row {row} has no action to choose from; leave out states whose episode is over"
            )
    return max(map(len, admissible), default=0)


def padding_mask(admissible: Sequence[Sequence[str]]) -> Tensor:
    """Return True where a row of the padded actions [B, A] is an admissible one."""
    lengths = torch.tensor([len(actions) for actions in admissible], dtype=torch.int64)
    return torch.arange(check_admissible(admissible)) < lengths[:, None]


def check_texts(instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]) -> int:
    """Return A as `check_admissible`; UnsupportedArgument too for columns of unlike lengths, or a blank action."""
    if not len(instruction) == len(observation) == len(admissible):
        raise UnsupportedArgument(
            f"instruction, observation, admissible: {len(instruction)}, {len(observation)} and {len(admissible)} rows; "
            "give one of each per state"
        )
    for name, column in (("instruction", instruction), ("observation", observation), ("admissible", admissible)):
        if isinstance(column, str):
            raise UnsupportedArgument(f"{name}: a text alone; give a list, of one for each state")
    for row, actions in enumerate(admissible):
        if isinstance(actions, str):
            raise UnsupportedArgument(f"admissible: row {row} is a text alone, {actions!r}; give a list of texts")
        if not all(map(str.strip, actions)):
            raise UnsupportedArgument(f"admissible: row {row} has an action without a word; leave it out")
    return check_admissible(admissible)
