"""What every test shares: one torch thread, fixed seeds, and the skip of what needs a GPU."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# More threads than cores make small tensors slower, and `make test` runs two of these processes.
torch.set_num_threads(1)

# Triton's kernels run on CPU tensors by its interpreter. It is chosen when triton is first imported, which also
# torch.compile does, in any room: hence here.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start each test with one thread and the same state of the global generators, whatever ran before it."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - Stable-Baselines3 draws from numpy's global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _may_wait() -> Iterator[None]:
    """Let the host wait for a GPU again, whatever a test has left: else every later copy to one would raise."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the fuzzing verbs of the Makefile ask for more than the suite does."""
    parser.addoption("--mutations", type=int, default=100, help="damaged files per loader")
    parser.addoption("--kills", type=int, default=4, help="how often a training process is killed")
    parser.addoption("--soak-steps", type=int, default=60_000, help="env steps of the soak")
