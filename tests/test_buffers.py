"""Storage: every row once, in SB3's order, invalid rows weightless, bootstrap values where they belong."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lago_fast.buffers import RolloutBuffer, put


def filled(n_steps=5, n_envs=3):
    buffer = RolloutBuffer(n_steps, n_envs, np.zeros(2), (1,), torch.float32, (1, 1), torch.device("cpu"))
    buffer.observations[:] = torch.arange(n_steps * n_envs * 2).reshape(n_steps, n_envs, 2).float()
    buffer.values[:] = torch.arange(n_steps * n_envs).reshape(n_steps, n_envs).float()
    buffer.valid[:] = True
    return buffer


def test_minibatches_hold_every_row_once_and_columns_stay_together():
    buffer = filled()
    buffer.valid[2, 1] = False
    batches = list(buffer.get(4))
    assert [len(b.old_values) for b in batches] == [4, 4, 4, 3]
    values = torch.cat([b.old_values for b in batches])
    assert sorted(values.tolist()) == list(range(15))
    for batch in batches:
        torch.testing.assert_close(batch.observations[:, 0], 2 * batch.old_values)
        torch.testing.assert_close(batch.weight, (batch.old_values != 2 * 3 + 1).float())


def test_rows_are_numbered_env_by_env_as_in_sb3():
    np.random.seed(0)  # noqa: NPY002 - the buffer permutes by the global generator, as SB3's does
    order = np.random.permutation(15)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    values = torch.cat([b.old_values for b in filled().get(15)])
    t, env = order % 5, order // 5
    np.testing.assert_array_equal(values.numpy(), t * 3 + env)


def test_bootstrap_shifts_values_and_replaces_lost_ones():
    buffer = filled()
    buffer.bootstrap(torch.tensor([7.0, 8.0, 9.0]), [(1, torch.tensor([2]), torch.tensor([-1.0]))])
    torch.testing.assert_close(buffer.next_values[0], buffer.values[1])
    torch.testing.assert_close(buffer.next_values[-1], torch.tensor([7.0, 8.0, 9.0]))
    assert buffer.next_values[1, 2] == -1.0
    assert buffer.next_values[1, 0] == buffer.values[2, 0]


def test_an_array_is_put_into_part_of_a_column_in_its_dtype():
    column = torch.zeros(3, 4)
    put(np.arange(2, dtype=np.float64), column[1, 2:])
    assert column.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.gpu
def test_an_array_is_put_onto_a_gpu_without_waiting():
    column = torch.zeros(3, 4, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        put(np.arange(4, dtype=np.float64), column[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert column[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_what_is_written_to_a_copy_is_in_the_copy_alone(copied):
    buffer = filled()
    before = {name: getattr(buffer, name).clone() for name in ("rewards", "observations")}
    other = copied(buffer)
    other.write("rewards", 1, np.full(3, 9.0))
    other.store_observation(2, np.full((2, 2), 8.0), slice(1, 3))
    assert (other.rewards[1] == 9).all()
    assert (other.observations[2, 1:] == 8).all()
    for name, column in before.items():
        torch.testing.assert_close(getattr(buffer, name), column)


def test_actions_are_handed_out_as_a_copy():
    buffer = filled()
    buffer.actions[1, 2] = 5.0
    actions = buffer.actions_at(1, slice(1, 3))
    buffer.actions.zero_()
    assert actions.tolist() == [[0.0], [5.0]]


def test_observations_of_a_dictionary_are_stored_key_by_key():
    example = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.uint8)}
    buffer = RolloutBuffer(2, 3, example, (), torch.int64, (4,), torch.device("cpu"))
    buffer.store_observation(1, {"a": np.ones((3, 2)), "b": np.full((3, 3), 7)})
    assert (buffer.observations["a"][1] == 1).all()
    assert (buffer.observations["b"][1] == 7).all()
    assert (buffer.observations["b"][0] == 0).all()
