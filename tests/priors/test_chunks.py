"""Chunked queries: the answer of one call, in its order, without gradients, on whichever threads."""

import threading

import pytest
import torch

from lago_fast.priors import chunks
from lago_fast.priors.base import PriorOutput


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_answer_is_that_of_one_call(cores, rows, monkeypatch):
    monkeypatch.setattr(chunks, "_cores", lambda: cores * torch.get_num_threads())
    weight = torch.randn(3, 2, requires_grad=True)
    state, ids = torch.randn(11, 3), torch.arange(11)
    names = set()

    def ask(s, i):
        names.add(threading.current_thread().name)
        return PriorOutput(mean=s @ weight + i[:, None], log_std=torch.zeros(len(s), 2))

    answer = chunks.answer_in_chunks(ask, state, ids, rows)
    torch.testing.assert_close(answer.mean, (state @ weight + ids[:, None]).detach())
    assert not answer.mean.requires_grad
    assert answer.log_std.shape == (11, 2)
    assert answer.log_probs is None
    assert any(name.startswith("prior") for name in names) == (cores > 1 and rows < 11)


def test_an_error_of_a_chunk_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(chunks, "_cores", lambda: 2 * torch.get_num_threads())

    def ask(s, i):
        raise RuntimeError(f"chunk {int(i[0])}, {len(s)} rows")

    with pytest.raises(RuntimeError, match="chunk 0"):
        chunks.answer_in_chunks(ask, torch.zeros(4, 1), torch.arange(4), 2)
