"""The ring of transitions."""

import pytest
import torch

from lago_fast.algorithms.text_replay import TextBatch, TextReplayBuffer
from lago_fast.algorithms.text_states import PADDING, Seen
from lago_fast.errors import NonFiniteError, UnsupportedArgument


def batch(numbers: list[int], width: int) -> TextBatch:
    n = torch.tensor(numbers)
    seen = Seen(torch.stack([-n, n], dim=1), n[:, None].expand(-1, width) * 10, torch.zeros(len(numbers), width))
    return TextBatch(seen, n % width, n.float(), seen._replace(state=seen.state + 1), n % 2 == 0)


def everything(buffer: TextReplayBuffer) -> TextBatch:
    return buffer.sample(2000, torch.Generator().manual_seed(0))


def number(batch: TextBatch) -> torch.Tensor:
    return batch.seen.state[:, 1]


def test_the_oldest_are_overwritten():
    buffer = TextReplayBuffer(4, 2)
    buffer.add(batch([0, 1, 2], 2))
    assert len(buffer) == 3
    assert set(number(everything(buffer)).tolist()) == {0, 1, 2}
    buffer.add(batch([3, 4, 5], 2))
    assert len(buffer) == 4
    drawn = everything(buffer)
    assert set(number(drawn).tolist()) == {2, 3, 4, 5}
    assert torch.equal(drawn.following.state, drawn.seen.state + 1)
    assert torch.equal(drawn.reward, number(drawn).float())
    assert torch.equal(drawn.terminated, number(drawn) % 2 == 0)
    assert torch.equal(drawn.choice, number(drawn) % 2)


@pytest.mark.parametrize("known", [None, 3])
def test_rows_are_padded_and_widened(known):
    buffer = TextReplayBuffer(3, known)
    buffer.add(batch([1], 3))
    buffer.add(batch([2], 5))
    drawn = everything(buffer)
    one = drawn.seen.actions[number(drawn) == 1][0]
    assert one[:3].tolist() == [10, 10, 10]
    assert (one[3:] == PADDING).all()
    assert (drawn.seen.log_prior[number(drawn) == 1][0][3:] == -torch.inf).all()
    assert drawn.following.actions[number(drawn) == 2][0][:5].tolist() == [20] * 5


def test_a_narrow_row_leaves_nothing_of_the_wide_one_before():
    buffer = TextReplayBuffer(1, 4)
    buffer.add(batch([1], 4))
    buffer.add(batch([2], 2))
    for seen in (everything(buffer).seen, everything(buffer).following):
        assert (seen.actions[:, :2] == 20).all()
        assert (seen.actions[:, 2:] == PADDING).all()
        assert (seen.log_prior[:, 2:] == -torch.inf).all()


def test_what_was_met_is_known():
    buffer = TextReplayBuffer(8, 3)
    buffer.add(batch([1, 2, 1], 2))
    states, actions = buffer.distinct()
    assert states.tolist() == [[-2, 2], [-1, 1]]
    assert actions.tolist() == [10, 20]


def test_what_is_refused():
    with pytest.raises(UnsupportedArgument, match="buffer_size=0"):
        TextReplayBuffer(0)
    wrong = batch([1], 2)
    with pytest.raises(NonFiniteError, match="reward"):
        TextReplayBuffer(2).add(wrong._replace(reward=torch.tensor([torch.nan])))
