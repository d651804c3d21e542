"""What the kernels' tests share: the device that Triton's kernels run on."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU with the real compiler, else the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
