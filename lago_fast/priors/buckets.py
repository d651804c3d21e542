"""A query in few shapes: batches are padded to the next of a row of sizes, and each size is one CUDA graph.

A small batch of a large transformer is bound by the launches of its kernels; a graph replays all of them at once.
Elsewhere the padded batch is computed as any other, which only tests and a compiler have use for.
Test: pytest tests/priors/test_buckets.py
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lago_fast.capture import capturing

SMALLEST = 8
WARM_UP_PASSES = 3  # before a capture: libraries allocate their workspaces in the first ones

Run = Callable[[Tensor, Tensor], Tensor]  # states [B, S] and ids [B] to latents [B, Z], without waiting for the device


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    state: Tensor
    ids: Tensor
    latent: Tensor


def bucket_of(rows: int, most: int) -> int:
    """Return the size that a batch of `rows` is padded to: a power of two from SMALLEST on, or `most`."""
    return min(most, max(SMALLEST, 1 << (rows - 1).bit_length()))


class Buckets:
    """A pass over batches of any number of rows, in static shapes.

    Args:
        run: the pass; row by row, so that padding changes nothing.
        most: rows of a batch, at most.
    """

    def __init__(self, run: Run, most: int) -> None:
        self.run, self.most = run, most
        self._captured: dict[int, _Captured] = {}
        self._alone = threading.Lock()  # a graph has one place for its inputs

    def __call__(self, state: Tensor, instruction_id: Tensor) -> Tensor:
        """Return the latents [B, Z] of states [B, S] and ids [B], B at most `most`."""
        rows, size = len(state), bucket_of(len(state), self.most)
        if state.device.type != "cuda":
            return self.run(_padded(state, size), _padded(instruction_id, size))[:rows]
        with self._alone:
            if size not in self._captured:
                self._captured[size] = self._capture(_padded(state, size), _padded(instruction_id, size))
            bucket = self._captured[size]
            bucket.state[:rows], bucket.ids[:rows] = state, instruction_id
            with torch.cuda.device_of(bucket.state):
                bucket.graph.replay()
            return bucket.latent[:rows].clone()

    def _capture(self, state: Tensor, ids: Tensor) -> _Captured:
        aside = torch.cuda.Stream(state.device)
        aside.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_PASSES):
                self.run(state, ids)
        torch.cuda.current_stream(state.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, state.device):
            latent = self.run(state, ids)
        return _Captured(graph, state, ids, latent)


def _padded(column: Tensor, size: int) -> Tensor:
    """Return a copy of a column with rows of zeros behind it."""
    padded = column.new_zeros(size, *column.shape[1:])
    padded[: len(column)] = column
    return padded
