"""The helpers of the contract of priors over text actions."""

import pytest
import torch

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.text_base import check_admissible, check_texts, padding_mask


def test_rows_are_padded_at_their_end() -> None:
    mask = padding_mask([("go", "stay", "look"), ("go",)])
    assert torch.equal(mask, torch.tensor([[True, True, True], [True, False, False]]))


def test_a_state_without_actions_is_refused_by_its_row() -> None:
    with pytest.raises(UnsupportedArgument, match="row 1"):
        check_admissible([("go",), ()])


def test_columns_of_unlike_lengths_and_actions_without_words_are_refused() -> None:
    assert check_texts(["win", "win"], ["here", "there"], [("go", "stay"), ("go",)]) == 2
    with pytest.raises(UnsupportedArgument, match="1, 2 and 2 rows"):
        check_texts(["win"], ["here", "there"], [("go",), ("go",)])
    with pytest.raises(UnsupportedArgument, match="row 1 has an action without a word"):
        check_texts(["win", "win"], ["here", "there"], [("go",), ("go", " ")])
    with pytest.raises(UnsupportedArgument, match="row 0 has no action"):
        check_texts(["win"], ["here"], [()])


def test_a_text_in_place_of_a_list_of_texts_is_refused() -> None:
    with pytest.raises(UnsupportedArgument, match="admissible: row 1 is a text alone, 'go'"):
        check_texts(["win", "win"], ["here", "there"], [("go",), "go"])
    with pytest.raises(UnsupportedArgument, match="instruction: a text alone"):
        check_texts("ab", ["here", "there"], [("go",), ("go",)])
