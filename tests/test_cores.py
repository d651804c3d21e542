"""The count of usable cores follows affinity where the system has it, and is never 0."""

import os
import subprocess
import sys

import pytest
import torch

from lago_fast.cores import torch_threads, usable_cores, use_torch_threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_that_is_kept_on_one_core_has_one():
    code = "import os; from lago_fast.cores import usable_cores as usable; "
    code += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "1"


@pytest.mark.parametrize(("counted", "expected"), [(3, 3), (None, 1)])
def test_without_affinity_all_cores_are_counted(monkeypatch, counted, expected):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert usable_cores() == expected


def test_torch_has_as_many_threads_as_asked_for_or_as_there_are_cores():
    before = torch.get_num_threads()
    try:
        use_torch_threads(3)
        assert torch.get_num_threads() == 3
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        use_torch_threads(None)
        assert torch.get_num_threads() == usable_cores()
    finally:
        torch.set_num_threads(before)
