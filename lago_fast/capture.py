"""CUDA graphs on the device that computes, whichever is current.

Test: pytest tests/priors/test_buckets.py tests/algorithms/test_captured.py
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Capture a block on `device`; an error in it comes out as it is, and the stream is then the one before."""
    with torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        # torch's own stream for captures is one of the device that was current at the first of all
        capture = torch.cuda.graph(graph, stream=torch.cuda.Stream(device))
        try:
            capture.__enter__()
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # a broken capture fails once more at its end, which would hide why
                    capture.__exit__(None, None, None)
                raise
            capture.__exit__(None, None, None)
        finally:
            torch.cuda.set_stream(before)  # torch leaves its own where a capture fails
