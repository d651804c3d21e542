"""The count of usable cores follows affinity where the system has it, and is never 0."""

import os
import subprocess
import sys

import pytest
import torch

from lago_fast import cores
from lago_fast.cores import torch_threads, usable_cores, use_torch_threads
from lago_fast.errors import UnsupportedArgument


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


def test_torch_has_as_many_threads_as_asked_for_or_as_there_are_cores(monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    before = torch.get_num_threads()
    try:
        use_torch_threads(3)
        assert torch.get_num_threads() == 3
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        use_torch_threads(None)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [-1, 0, 3])
def test_no_thread_and_more_threads_than_cores_are_refused(threads, monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    with pytest.raises(UnsupportedArgument, match=f"torch_threads={threads}: give 1 to 2"):
        use_torch_threads(threads)
    assert torch.get_num_threads() == before
