"""How many cores there are to use, and how many torch uses.

Test: pytest tests/test_cores.py
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lago_fast.errors import UnsupportedArgument


def usable_cores() -> int:
    """Return the cores that this process may use; affinity is unknown outside Linux, where all are counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_torch_threads(threads: int | None) -> None:
    """Let torch, and native code with it, compute in so many threads; None: one per usable core.

    Raises UnsupportedArgument for more threads than cores, which wait for one another, and for none.
    """
    import torch

    if threads is not None and not 1 <= threads <= usable_cores():
        raise UnsupportedArgument(f"torch_threads={threads}: give 1 to {usable_cores()}, the cores that there are")
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
