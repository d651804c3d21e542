"""How many cores there are to use, and how many torch uses.

Test: pytest tests/test_cores.py
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def usable_cores() -> int:
    """Return the cores that this process may use; affinity is unknown outside Linux, where all are counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_torch_threads(threads: int | None) -> None:
    """Let torch, and native code with it, compute in so many threads; None: one per usable core."""
    import torch

    torch.set_num_threads(usable_cores() if threads is None else threads)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute in so many threads while the block runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
