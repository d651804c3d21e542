"""The helpers of the contract of priors over text actions."""

import pytest
import torch

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.text_base import check_admissible, padding_mask


def test_rows_are_padded_at_their_end() -> None:
    mask = padding_mask([("go", "stay", "look"), ("go",)])
    assert torch.equal(mask, torch.tensor([[True, True, True], [True, False, False]]))


def test_a_state_without_actions_is_refused_by_its_row() -> None:
    with pytest.raises(UnsupportedArgument, match="row 1"):
        check_admissible([("go",), ()])
