"""What every benchmark records beside its times: the machine and the versions."""

import os
import platform

import pytest
import torch

torch.set_num_threads(1)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:  # noqa: ARG001 - the hook's signature
    """Add what decides these times."""
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["cores"] = os.cpu_count()
    machine_info["cpu_name"] = platform.processor() or platform.machine()
