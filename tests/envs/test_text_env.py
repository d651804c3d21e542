"""The check of the choices that every text game takes."""

import numpy as np
import pytest

from lago_fast.envs.text_env import check_choice
from lago_fast.errors import UnsupportedArgument

ADMISSIBLE = [("go", "stay"), ()]


def test_the_choice_of_an_ended_row_is_ignored() -> None:
    check_choice(np.array([1, 7]), ADMISSIBLE, playing=np.array([True, False]))


@pytest.mark.parametrize("choice", [2, -1])
def test_a_choice_outside_of_the_admissible_actions_names_its_environment(choice: int) -> None:
    with pytest.raises(UnsupportedArgument, match="environment 0, which has 2"):
        check_choice(np.array([choice, 0]), ADMISSIBLE, playing=np.array([True, False]))


def test_one_choice_per_environment() -> None:
    with pytest.raises(UnsupportedArgument, match="shape"):
        check_choice(np.array([0]), ADMISSIBLE, playing=np.array([True, False]))
