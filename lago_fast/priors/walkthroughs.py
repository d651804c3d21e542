"""Steps of whole episodes that show how a text game is played: what priors over text actions are fitted to.

Test: pytest tests/priors/test_embed_prior.py tests/priors/test_small_lm.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from lago_fast.errors import DemonstrationError, UnsupportedArgument
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


def read_steps(path: str | Path) -> Steps:
    """Read one step per line of JSON: instruction, observation, admissible, choice, episode_id.

    Raises DemonstrationError for a file that cannot be read so.
    """
    try:
        # JSON may hold what other line ends of Unicode's are
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        for number, line in enumerate(lines, 1):
            texts = (line["instruction"], line["observation"], *line["admissible"])
            if type(line["admissible"]) is not list or not all(type(text) is str for text in texts):
                raise ValueError(f"line {number}: instruction and observation must be texts, admissible a list of them")
        return Steps(*([line[name] for line in lines] for name in Steps._fields))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DemonstrationError(
            f"walkthroughs: {path} cannot be read ({error!r}); give a file with a JSON object per step, of "
            f"{', '.join(Steps._fields)}"
        ) from error


def first_episodes(walkthroughs: Walkthroughs, count: int) -> Steps:
    """Return the steps of the episodes with the `count` smallest ids, at least 1; raises as `numbers_of` does."""
    if count < 1:
        raise UnsupportedArgument(f"count: {count}; give at least 1 episode")
    choice, episode = numbers_of(walkthroughs)
    rows = np.flatnonzero(episode < count).tolist()
    instruction, observation = (
        [column[i] for i in rows] for column in (walkthroughs.instruction, walkthroughs.observation)
    )
    return Steps(instruction, observation, [walkthroughs.admissible[i] for i in rows], choice[rows], episode[rows])


def numbers_of(walkthroughs: Walkthroughs) -> tuple[np.ndarray, np.ndarray]:
    """Return (choice [n] int64, episode number [n] int64 from 0 on) of checked walkthroughs.

    Raises:
        DemonstrationError: none at all, columns of unlike lengths or of something else than whole numbers, or a choice
            that is not admissible.
        UnsupportedArgument: see `check_texts`.
    """
    choice = _whole_numbers(walkthroughs.choice, "choice")
    episode = _whole_numbers(walkthroughs.episode_id, "episode_id")
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


def _whole_numbers(column: ArrayLike, name: str) -> np.ndarray:
    try:
        numbers = np.asarray(column)
    except ValueError:  # lists of unlike lengths
        numbers = np.empty((), object)
    if numbers.ndim != 1 or (numbers.size and not np.issubdtype(numbers.dtype, np.integer)):
        raise DemonstrationError(f"walkthroughs: {name} is not one whole number per step; record them again")
    return numbers.astype(np.int64)
