"""Chunked queries: the answer of one call, in its order, without gradients, on whichever threads."""

import threading
from types import SimpleNamespace

import pytest
import torch

from lago_fast.priors import chunks
from lago_fast.priors.base import PriorOutput


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_answer_is_that_of_one_call(cores, rows, monkeypatch):
    monkeypatch.setattr(chunks, "usable_cores", lambda: cores * torch.get_num_threads())
    weight = torch.randn(3, 2, requires_grad=True)
    state, ids = torch.randn(11, 3), torch.arange(11)
    names = set()

    def ask(s, i):
        names.add(threading.current_thread().name)
        return PriorOutput(mean=s @ weight + i[:, None], log_std=torch.zeros(len(s), 2))

    answer = chunks.answer_in_chunks(ask, state, ids, SimpleNamespace(query_batch_size=rows))
    torch.testing.assert_close(answer.mean, (state @ weight + ids[:, None]).detach())
    assert not answer.mean.requires_grad
    assert answer.log_std.shape == (11, 2)
    assert answer.log_probs is None
    assert any(name.startswith("prior") for name in names) == (cores > 1 and rows < 11)


def test_an_error_of_a_chunk_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(chunks, "usable_cores", lambda: 2 * torch.get_num_threads())

    def ask(s, i):
        raise RuntimeError(f"chunk {int(i[0])}, {len(s)} rows")

    with pytest.raises(RuntimeError, match="chunk 0"):
        chunks.answer_in_chunks(ask, torch.zeros(4, 1), torch.arange(4), SimpleNamespace(query_batch_size=2))


@pytest.mark.parametrize("cores", [1, 2])
def test_where_memory_runs_out_chunks_are_halved_for_good_and_it_is_said_once(cores, monkeypatch, caplog):
    monkeypatch.setattr(chunks, "usable_cores", lambda: cores * torch.get_num_threads())
    chunks._say_once.cache_clear()
    sizes, asked = SimpleNamespace(query_batch_size=1024), []

    def ask(s, i):
        asked.append(len(s))
        if len(s) > 3:
            raise torch.OutOfMemoryError("injected")
        return PriorOutput(mean=s + i[:, None])

    state, ids = torch.randn(11, 3), torch.arange(11)
    for _ in range(2):
        assert torch.equal(chunks.answer_in_chunks(ask, state, ids, sizes).mean, state + ids[:, None])
    assert sizes.query_batch_size == 3  # of 11, 6, 3
    assert asked.count(11) == 1
    assert caplog.text.count("out of GPU memory") == 1

    def never(s, i):
        raise torch.OutOfMemoryError(f"{len(s)}, {len(i)}")

    with pytest.raises(torch.OutOfMemoryError, match="1, 1"):
        chunks.answer_in_chunks(never, state, ids, sizes)
