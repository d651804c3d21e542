"""Demonstration rows: refused when they cannot be right, split by whole episodes, shuffled across tasks."""

import numpy as np
import pytest
import torch

from lago_fast.errors import DemonstrationError, UnsupportedArgument
from lago_fast.priors.rows import Rows, action_space, check_rows, shuffle_across_tasks, split_episodes


def rows_of(episodes_per_task: list[int], steps: int = 3) -> Rows:
    task = torch.arange(len(episodes_per_task)).repeat_interleave(torch.tensor(episodes_per_task))
    episode = torch.arange(len(task)).repeat_interleave(steps)
    task = task.repeat_interleave(steps)
    return Rows(torch.zeros(len(task), 2), torch.zeros(len(task), 1), task, episode, task, task[:, None])


def test_a_row_is_reworded_among_its_own_wordings():
    rows = rows_of([40])
    assert rows.reworded(torch.Generator()) is rows  # one wording: nothing is drawn
    wordings = torch.arange(3 * len(rows.state)).reshape(-1, 3)
    rows = rows._replace(wordings=wordings)
    draws = [rows.reworded(torch.Generator().manual_seed(seed)).instruction_id for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0] // 3, torch.arange(len(wordings)))
    assert set((draws[0] % 3).tolist()) == {0, 1, 2}


def test_wordings_are_columns_of_the_instructions():
    wordings = np.array([[0, 2], [1, 0]])
    rows, _ = check_rows(np.zeros((2, 3)), np.zeros((2, 1)), wordings, [0, 1], None, None, 3)
    assert rows.instruction_id.tolist() == rows.task_id.tolist() == [0, 1]
    assert rows.wordings.tolist() == wordings.tolist()
    with pytest.raises(DemonstrationError, match=r"0\.\.1, the 2 instructions"):
        check_rows(np.zeros((2, 3)), np.zeros((2, 1)), wordings, [0, 1], None, None, 2)
    for shape in ((2, 0), (2, 1, 1)):
        with pytest.raises(DemonstrationError, match="W wordings"):
            check_rows(np.zeros((2, 3)), np.zeros((2, 1)), np.zeros(shape, int), [0, 1], None, None, 3)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_no_episode_is_on_both_sides_and_every_task_gives_its_share(fraction):
    rows = rows_of([4, 10, 20])
    train, val = split_episodes(rows, fraction, seed=3)
    assert sorted(torch.cat([train, val]).tolist()) == list(range(len(rows.state)))
    assert not set(rows.episode_id[train].tolist()) & set(rows.episode_id[val].tolist())
    held_out = [rows.episode_id[val][rows.task_id[val] == t].unique().numel() for t in range(3)]
    assert held_out == [max(1, round(fraction * n)) for n in (4, 10, 20)]


def test_ids_that_start_anew_in_every_task_hold_out_no_more_than_was_asked_for():
    task, episode = (grid.flatten() for grid in torch.meshgrid(torch.arange(5), torch.arange(10), indexing="ij"))
    task, episode = task.repeat_interleave(3), episode.repeat_interleave(3)
    rows = Rows(torch.zeros(150, 2), torch.zeros(150, 1), task, episode, task, task[:, None])
    train, val = split_episodes(rows, 0.1, seed=0)
    assert len(val) == 15
    assert rows.task_id[val].bincount().tolist() == [3] * 5
    # as ever where an episode goes through several tasks: it is on one side
    assert not set(episode[train].tolist()) & set(episode[val].tolist())


def test_the_split_is_a_function_of_the_seed():
    rows = rows_of([10, 10])
    first, again, other = (split_episodes(rows, 0.3, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_task_of_one_episode_is_fitted_and_nothing_to_hold_out_is_an_error():
    train, val = split_episodes(rows_of([1, 5]), 0.2, seed=0)
    assert 0 in train.tolist()
    assert len(val) == 3
    with pytest.raises(DemonstrationError, match="val_fraction=0"):
        split_episodes(rows_of([1, 1]), 0.2, seed=0)
    assert len(split_episodes(rows_of([1]), 0, seed=0)[1]) == 0


def test_shuffled_instructions_are_always_another_tasks():
    task = torch.tensor([0, 0, 1, 1, 1, 2])
    ids = torch.tensor([0, 1, 2, 3, 2, 4])  # two phrasings of tasks 0 and 1
    owner = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2}
    for seed in range(20):
        shuffled = shuffle_across_tasks(ids, task, seed)
        assert all(owner[int(i)] != int(t) for i, t in zip(shuffled, task, strict=True))
    assert shuffle_across_tasks(ids[:2], task[:2], 0) is None


def check(**changes):
    given = {
        "states": np.zeros((4, 2), np.float32),
        "actions": np.zeros((4, 1), np.float32),
        "instruction_id": np.zeros(4, np.int64),
        "episode_id": np.zeros(4, np.int64),
        "task_id": None,
        "kind": None,
        "texts": 1,
    }
    return check_rows(*{**given, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"states": np.zeros((0, 2)), "actions": np.zeros((0, 1))}, "at least one"),
        ({"states": np.zeros((5, 2))}, "'states': 5"),
        ({"states": np.full((4, 2), np.nan)}, "states: NaN"),
        ({"actions": np.full((4, 1), np.inf)}, "actions: NaN"),
        ({"actions": np.zeros(4)}, r"actions \[n, D\]"),
        ({"actions": np.zeros((4, 1), np.int64)}, r"actions \[n\]"),
        ({"instruction_id": np.full(4, 1)}, r"outside of 0\.\.0"),
        ({"actions": [0.9, 1.7, -0.5, 0], "kind": "categorical"}, r"actions: 3 of 4 .* not whole, for one 0\.9"),
        ({"instruction_id": [0, 0.9, 0, 0]}, r"instruction_id: 1 of 4 .* 0\.9; give integers"),
        ({"episode_id": [0, np.nan, 1, 1]}, "episode_id: 1 of 4 .* nan"),
        ({"task_id": [0, 0, 1, 1.5]}, r"task_id: 1 of 4 .* 1\.5"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(changes, says):
    with pytest.raises(DemonstrationError, match=says):
        check(**changes)


def test_the_kind_follows_the_dtype_and_can_be_said():
    assert check()[1] == "gaussian"
    assert check(actions=np.zeros(4, np.int64))[1] == "categorical"
    assert check(actions=np.zeros(4), kind="categorical")[0].action.dtype == torch.int64
    with pytest.raises(UnsupportedArgument, match="'gaussian', 'categorical'"):
        check(kind="beta")


def test_actions_outside_of_the_space_are_refused():
    assert action_space(torch.tensor([[0.5, -1.0]]), "gaussian", -1.0, [1.0, 2.0], None)[2] == (1.0, 2.0)
    with pytest.raises(DemonstrationError, match="1 rows outside of action_low"):
        action_space(torch.tensor([[0.5], [1.5]]), "gaussian", -1.0, 1.0, None)
    assert action_space(torch.tensor([0, 2]), "categorical", -1.0, 1.0, None)[0] == 3
    with pytest.raises(DemonstrationError, match=r"outside of 0\.\.1"):
        action_space(torch.tensor([0, 2]), "categorical", -1.0, 1.0, 2)
    with pytest.raises(UnsupportedArgument, match="num_actions"):
        action_space(torch.tensor([[0.5]]), "gaussian", -1.0, 1.0, 3)
