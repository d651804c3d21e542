"""Transitions of text games: what is refused, and the choice of episodes."""

import numpy as np
import pytest

from lago_fast.envs.text_transitions import TextTransitions, check_transitions, take_episodes
from lago_fast.errors import DemonstrationError, UnsupportedArgument

GOOD = TextTransitions(
    instruction=["win"] * 3,
    observation=["start", "middle", "start"],
    admissible=[("go", "stay"), ("go",), ("go", "stay")],
    choice=np.array([0, 0, 1]),
    reward=np.array([0, 1, 0], np.float32),
    next_observation=["middle", "end", "start"],
    next_admissible=[("go",), (), ("go", "stay")],
    terminated=np.array([False, True, False]),
    truncated=np.array([False, False, True]),
    episode_id=np.array([0, 0, 1]),
    success=np.array([True, False]),
)


def test_whole_episodes_pass():
    check_transitions(GOOD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": np.array([0, 1, 1])}, "row 1, choice: not among the 1 admissible actions"),
        ({"choice": np.array([-1, 0, 1])}, "row 0, choice"),
        ({"admissible": [("go",), (), ("go", "stay")]}, "row 1, choice: not among the 0"),
        ({"next_admissible": [(), (), ("go",)]}, "row 0, next_admissible: 0 actions"),
        ({"next_admissible": [("go",), ("go",), ("go",)]}, "row 1, next_admissible: 1 actions"),
        ({"reward": np.array([0, np.nan, 0])}, "reward: NaN"),
        ({"observation": ["start"]}, "observation: 1 rows beside 3"),
        ({"episode_id": np.array([0, 0, 2])}, "row 2, episode_id: expected 1"),
        ({"truncated": np.array([True, False, True])}, "row 0, terminated, truncated"),
        ({"success": np.array([True])}, "1 values for 2 episodes"),
        ({name: [] if name != "choice" else np.array([]) for name in GOOD._fields}, "are empty"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(changes, message):
    with pytest.raises(DemonstrationError, match=message):
        check_transitions(GOOD._replace(**changes))


def test_episodes_are_taken_in_the_order_given():
    taken = take_episodes(GOOD, [1, 0])
    check_transitions(taken)
    assert taken.observation == ["start", "start", "middle"]
    assert taken.choice.tolist() == [1, 0, 0]
    assert taken.success.tolist() == [False, True]
    assert taken.episode_id.tolist() == [0, 1, 1]
    for wrong in ([], [2], [-1]):
        with pytest.raises(UnsupportedArgument, match="numbers from 0 to 1"):
            take_episodes(GOOD, wrong)
