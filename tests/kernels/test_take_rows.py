"""The op `take_rows`: a minibatch of several columns is what indexing gives, byte for byte."""

import threading

import pytest
import torch

from lago_fast.kernels.take_rows import cpp_fused, reference

COLUMNS = [
    torch.randn(50),
    torch.randn(50, 2),
    torch.randn(50, 4),
    torch.randn(50, 39),
    torch.arange(50),
    torch.randint(0, 255, (50, 3, 5, 5), dtype=torch.uint8),
    torch.rand(50) > 0.5,
]


@pytest.mark.parametrize("module", [reference, cpp_fused])
def test_rows_are_those_picked(module):
    columns = module.Columns(COLUMNS)
    for picked in (torch.tensor([7, 0, 49, 7]), torch.randperm(50), torch.tensor([], dtype=torch.int64)):
        for column, taken in zip(COLUMNS, columns.take(picked), strict=True):
            assert torch.equal(taken, column[picked])
            assert taken.dtype is column.dtype


def test_two_threads_take_rows_of_the_same_columns():
    n = 5000
    columns = [torch.arange(n)[:, None].expand(n, 16).contiguous()]
    taker, wrong = cpp_fused.Columns(columns), []

    def take(rows):
        for seed in range(50):
            picked = torch.randint(n, (rows,), generator=torch.Generator().manual_seed(seed))
            if not torch.equal(taker.take(picked)[0][:, 0], picked):
                wrong.append(rows)

    threads = [threading.Thread(target=take, args=(rows,)) for rows in (3000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_only_reused_rows_are_overwritten():
    first, second = torch.tensor([1, 2]), torch.tensor([3, 4])
    kept = cpp_fused.Columns(COLUMNS)
    before = kept.take(first)
    kept.take(second)
    assert torch.equal(before[0], COLUMNS[0][first])
    reused = cpp_fused.Columns(COLUMNS, reuse=True)
    before = reused.take(first)
    assert all(a is b for a, b in zip(before, reused.take(second), strict=True))
    assert torch.equal(before[0], COLUMNS[0][second])


def test_refusals():
    with pytest.raises(ValueError, match="columns: expected contiguous"):
        cpp_fused.Columns([torch.randn(4, 6).t()])
    with pytest.raises(ValueError, match="of 4 rows"):
        cpp_fused.Columns([torch.randn(4), torch.randn(5)])
    columns = cpp_fused.Columns([torch.randn(4)])
    for bad in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="picked: expected numbers from 0 to 4 - 1"):
            columns.take(bad)
    for bad in (torch.tensor([1.0]), torch.tensor([[1]]), torch.arange(4)[::2]):
        with pytest.raises(ValueError, match="picked: expected contiguous int64"):
            columns.take(bad)
