"""Steps of whole episodes that show how a text game is played: what priors over text actions are fitted to.

Test: pytest tests/priors/test_embed_prior.py
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from lago_fast.errors import DemonstrationError
from lago_fast.priors.text_base import check_texts


class Walkthroughs(Protocol):
    """n steps of whole episodes; recorded transitions of a text environment are such."""

    @property
    def instruction(self) -> Sequence[str]:
        """Return n texts."""
        ...

    @property
    def observation(self) -> Sequence[str]:
        """Return n texts."""
        ...

    @property
    def admissible(self) -> Sequence[Sequence[str]]:
        """Return n lists of at least one action."""
        ...

    @property
    def choice(self) -> ArrayLike:
        """Return n integers: the index of the action that was taken."""
        ...

    @property
    def episode_id(self) -> ArrayLike:
        """Return n integers."""
        ...


class Steps(NamedTuple):
    """Walkthroughs in lists."""

    instruction: Sequence[str]
    observation: Sequence[str]
    admissible: Sequence[Sequence[str]]
    choice: ArrayLike
    episode_id: ArrayLike


def numbers_of(walkthroughs: Walkthroughs) -> tuple[np.ndarray, np.ndarray]:
    """Return (choice [n] int64, episode number [n] int64 from 0 on) of checked walkthroughs.

    Raises:
        DemonstrationError: none at all, columns of unlike lengths, or a choice that is not admissible.
        UnsupportedArgument: see `check_texts`.
    """
    choice = np.asarray(walkthroughs.choice, dtype=np.int64)
    episode = np.asarray(walkthroughs.episode_id, dtype=np.int64)
    check_texts(walkthroughs.instruction, walkthroughs.observation, walkthroughs.admissible)
    if not len(choice) == len(episode) == len(walkthroughs.admissible) > 0:
        raise DemonstrationError(
            f"walkthroughs: {len(walkthroughs.admissible)} states, {len(choice)} choices, {len(episode)} episode ids; "
            "give one of each per step, and at least one step"
        )
    for row, (action, actions) in enumerate(zip(choice.tolist(), walkthroughs.admissible, strict=True)):
        if not 0 <= action < len(actions):
            raise DemonstrationError(
                f"walkthroughs: choice {action} in row {row}, which has {len(actions)} admissible actions; record it "
                "again, or leave its episode out"
            )
    return choice, np.unique(episode, return_inverse=True)[1]
