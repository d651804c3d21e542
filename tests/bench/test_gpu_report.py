"""The report of a GPU machine: refused without one; what cannot run is skipped with its reason, never in silence."""

import json
import shutil
import subprocess
import sys

import pytest

from bench.gpu_hours import gpu_report
from bench.gpu_hours.gpu_report import ROOT, Step, main, reason_to_skip, report, run_step, steps

NO_GPU = shutil.which("nvidia-smi") is None


@pytest.mark.skipif(not NO_GPU, reason="the refusal needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_1(tmp_path, capsys):
    assert main([str(tmp_path / "out")]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not NO_GPU, reason="the refusal needs a machine without a GPU")
def test_make_gpu_report_is_refused_alike(tmp_path):
    command = ["make", "gpu-report", f"OUT={tmp_path / 'out'}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs an NVIDIA GPU" in done.stderr


@pytest.mark.parametrize(
    ("left", "has", "which", "why"),
    [
        (100, {"torch", "triton"}, {"nvcc"}, None),
        (100, {"torch"}, {"nvcc"}, "triton not installed"),
        (100, {"torch"}, set(), "triton, nvcc not installed"),
        (5, {"torch", "triton"}, {"nvcc"}, "5 s of the nine minutes were left"),
    ],
)
def test_a_part_is_skipped_for_a_reason(left, has, which, why):
    step = Step("some", ("torch", "triton"), ("true",), 10, programs=("nvcc",))
    assert reason_to_skip(step, left, has.__contains__, which.__contains__) == why


def test_a_part_ends_well_or_badly_or_late():
    def state(code, limit=30.0):
        return run_step(Step("some", (), (sys.executable, "-c", code), limit), 60, {})

    assert state("print('done')") | {"seconds": 0} == {"state": "ok", "seconds": 0, "output": "done\n"}
    assert state("raise SystemExit(3)")["state"] == "failed with 3"
    late = state("import time; print('begun', flush=True); time.sleep(60)", limit=2.0)
    assert late["state"] == "stopped after 2 s"
    assert "begun" in late["output"]


def test_every_part_is_in_the_summary_and_a_missing_package_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "find_spec", lambda module: None if module == "transformers" else module)
    monkeypatch.setattr(gpu_report.shutil, "which", lambda program: program)
    monkeypatch.setattr(gpu_report, "find_gpu", lambda: "a GPU")
    ran = []
    summary = report(tmp_path / "out", run=lambda step, *_: ran.append(step.name) or {"state": "ok"})
    assert ran == ["build", "gpu_tests", "kernels", "update"]
    assert summary["parts"]["ladder"]["state"] == "skipped: transformers not installed"
    assert summary["parts"]["report"]["state"] == "skipped: the ladder left no result"
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_the_parts_have_their_time_and_name_files_that_are_there(tmp_path):
    for step in steps(tmp_path):
        assert step.at_most_s <= gpu_report.BUDGET_S
        for word in step.command:
            assert not word.endswith(".py") or word == sys.executable or (ROOT / word).is_file()
            if word.startswith("bench.gpu_hours."):
                assert (ROOT / (word.replace(".", "/") + ".py")).is_file()
