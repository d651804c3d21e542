"""What every benchmark records beside its times: the machine and the versions."""

import pytest
import torch

from lago_fast import runs

torch.set_num_threads(1)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:  # noqa: ARG001 - the hook's signature
    """Add what decides these times."""
    machine_info.update(runs.hardware(), torch_threads=torch.get_num_threads(), versions=runs.versions())
