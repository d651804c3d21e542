"""A large query in chunks: on a CPU side by side on all cores, which are idle while a trainer waits for the answer.

The chunks are the same whatever the number of cores, and so are the answers.
Test: pytest tests/priors/test_chunks.py
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lago_fast.cores import usable_cores
from lago_fast.priors.base import PriorOutput

logger = logging.getLogger(__name__)


class Chunked(Protocol):
    query_batch_size: int  # rows of a chunk, at most


def answer_in_chunks(
    ask: Callable[[Tensor, Tensor], PriorOutput], state: Tensor, instruction_id: Tensor, sizes: Chunked
) -> PriorOutput:
    """Return what `ask` answers, without gradients, put to it in chunks.

    Args:
        ask: from states [b, S] and instruction ids [b] to their distribution; must bear being called from threads.
        state: [B, S].
        instruction_id: [B].
        sizes: whose `query_batch_size` is the size of a chunk; where the GPU's memory does not suffice it is halved,
            for good, and the query begins again.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    while True:
        try:
            return _answer(ask, state, instruction_id, sizes.query_batch_size)
        except torch.OutOfMemoryError:
            if min(sizes.query_batch_size, len(state)) <= 1:
                raise
        # outside of the handler, which still holds the tensors of the failed attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        sizes.query_batch_size = (min(sizes.query_batch_size, len(state)) + 1) // 2
        _say_once("out of GPU memory in a prior's query: going on with smaller parts of it")


def _answer(
    ask: Callable[[Tensor, Tensor], PriorOutput], state: Tensor, instruction_id: Tensor, rows: int
) -> PriorOutput:
    chunks = list(zip(state.split(rows), instruction_id.split(rows), strict=True))

    @torch.no_grad()  # which is a setting of each thread
    def one(chunk: tuple[Tensor, Tensor]) -> PriorOutput:
        return ask(*chunk)

    if len(chunks) == 1:
        return one(chunks[0])
    threads = usable_cores() // torch.get_num_threads() if state.device.type == "cpu" else 1
    parts = list(map(one, chunks) if threads <= 1 else _threads(os.getpid(), threads).map(one, chunks))
    return PriorOutput(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


@cache
def _say_once(text: str) -> None:
    logger.warning(text)


@cache
def _threads(process: int, threads: int) -> ThreadPoolExecutor:
    del process  # a forked process has none of its parent's threads, and needs a pool of its own
    return ThreadPoolExecutor(threads, thread_name_prefix="prior")
