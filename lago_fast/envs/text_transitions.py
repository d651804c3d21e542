"""Transitions of text games, for offline learning: what is in them, and the check that they can be learnt from.

`text_recording` plays them and `lago_fast.text_demos` keeps them on disk. Tests: tests/envs/test_text_transitions.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lago_fast.errors import DemonstrationError, UnsupportedArgument


class TextTransitions(NamedTuple):
    """n transitions of E whole episodes, one row per step, episode after episode.

    `choice` is an index into the row's `admissible`. `next_admissible` is empty where the episode was terminated and
    nowhere else: a truncated row is bootstrapped over it.
    """

    instruction: list[str]  # n texts
    observation: list[str]  # n texts
    admissible: list[tuple[str, ...]]  # n sets of at least one action
    choice: np.ndarray  # [n] int64
    reward: np.ndarray  # [n] float32
    next_observation: list[str]  # n texts; the true last one where the episode ends
    next_admissible: list[tuple[str, ...]]  # n sets
    terminated: np.ndarray  # [n] bool: no value follows
    truncated: np.ndarray  # [n] bool: ended by the limit of steps
    episode_id: np.ndarray  # [n] int64, 0 to E - 1 in this order
    success: np.ndarray  # [E] bool, at any step of the episode


def check_transitions(transitions: TextTransitions) -> None:
    """Raise DemonstrationError, which names the row, unless these are whole episodes of admissible choices."""
    rows = len(transitions.choice)
    if rows == 0:
        raise DemonstrationError("the transitions are empty: record at least one episode")
    for name, column in transitions._asdict().items():
        if name != "success" and len(column) != rows:
            raise DemonstrationError(f"{name}: {len(column)} rows beside {rows} choices; record the episodes again")
    if not np.isfinite(transitions.reward).all():
        raise DemonstrationError("reward: NaN or infinity; record the episodes again")
    sizes = np.array([len(actions) for actions in transitions.admissible])
    _refuse(
        (transitions.choice < 0) | (transitions.choice >= sizes),
        "choice: not among the {} admissible actions; leave the row's episode out, or record it again",
        sizes,
    )
    following = np.array([len(actions) for actions in transitions.next_admissible])
    _refuse(
        (following == 0) != transitions.terminated,
        "next_admissible: {} actions; a state has at least one, and none where the episode was terminated",
        following,
    )
    _check_episodes(transitions)


def _refuse(wrong: np.ndarray, message: str, count: np.ndarray) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise DemonstrationError(f"row {row}, {message.format(count[row])}")


def _check_episodes(transitions: TextTransitions) -> None:
    """Each episode is one block of rows which ends at its last row and nowhere else."""
    episode, ended = transitions.episode_id, transitions.terminated | transitions.truncated
    last = np.append(episode[1:] != episode[:-1], True)
    expected = np.cumsum(np.append(0, last[:-1]))
    _refuse(episode != expected, "episode_id: expected {}; episodes are numbered from 0, one after the other", expected)
    _refuse(ended != last, "terminated, truncated: episode {} ends elsewhere than at its last row", episode)
    if len(transitions.success) != episode[-1] + 1:
        raise DemonstrationError(f"success: {len(transitions.success)} values for {episode[-1] + 1} episodes")


def take_episodes(transitions: TextTransitions, episodes: Sequence[int] | np.ndarray) -> TextTransitions:
    """Return the episodes with these numbers, numbered anew in the order given.

    Raises UnsupportedArgument for a number that is not there, or none at all.
    """
    wanted = np.asarray(episodes, np.int64)
    if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= len(transitions.success):
        raise UnsupportedArgument(f"episodes={wanted.tolist()}: give numbers from 0 to {len(transitions.success) - 1}")
    blocks = [np.flatnonzero(transitions.episode_id == number) for number in wanted]
    rows = np.concatenate(blocks)
    return TextTransitions(
        instruction=[transitions.instruction[row] for row in rows],
        observation=[transitions.observation[row] for row in rows],
        admissible=[transitions.admissible[row] for row in rows],
        choice=transitions.choice[rows],
        reward=transitions.reward[rows],
        next_observation=[transitions.next_observation[row] for row in rows],
        next_admissible=[transitions.next_admissible[row] for row in rows],
        terminated=transitions.terminated[rows],
        truncated=transitions.truncated[rows],
        episode_id=np.repeat(np.arange(len(blocks)), [len(block) for block in blocks]),
        success=transitions.success[wanted],
    )
