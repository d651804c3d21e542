"""The report of a GPU machine: refused without one; what cannot run is skipped with its reason, never in silence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile

import pytest

from bench.gpu_hours import gpu_report
from bench.gpu_hours.gpu_answers import QUESTIONS, answers, figures
from bench.gpu_hours.gpu_report import GPU_TESTS, ROOT, SANITIZED, Step, main, reason_to_skip, report, run_step, stages

NO_GPU = shutil.which("nvidia-smi") is None
ABSENT = "tyro,metaworld,minari,mujoco,bitsandbytes,lmdb,textworld,alfworld,envpool"


@pytest.mark.skipif(not NO_GPU, reason="the refusal needs a machine without a GPU")
def test_without_a_gpu_it_says_what_each_part_lacks_and_ends_with_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_report, "has", lambda module: module not in ("envpool", "gymnasium"))
    assert main([str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in told
    assert "ladder, 100 s: skipped: gymnasium, envpool not installed" in told
    assert "without tests/algorithms/test_captured.py: gymnasium not installed" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not NO_GPU, reason="the refusal needs a machine without a GPU")
def test_make_gpu_report_is_refused_alike(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels)
    command = ["make", "gpu-report", f"OUT={tmp_path / 'out'}", f"PYTHON={sys.executable}", f"WHEELS={wheels}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "needs an NVIDIA GPU" in done.stderr
    assert "wheels, 15 s: would run" in done.stderr


@pytest.mark.parametrize(
    ("left", "has", "which", "why"),
    [
        (100, {"torch", "triton"}, {"nvcc"}, None),
        (100, {"torch"}, {"nvcc"}, "triton not installed"),
        (100, {"torch"}, set(), "triton, nvcc not installed"),
        (2, {"torch", "triton"}, {"nvcc"}, "2 s of the nine minutes were left"),
    ],
)
def test_a_part_is_skipped_for_a_reason(left, has, which, why):
    step = Step("some", ("torch", "triton"), (("true",),), 10, programs=("nvcc",))
    assert reason_to_skip(step, left, has.__contains__, which.__contains__) == why


# ---- a part


def run(code, *more, limit=30.0):
    commands = tuple((sys.executable, "-c", text) for text in (code, *more))
    return run_step(Step("some", (), commands, limit, environment={"OWN": "1"}), limit, dict(os.environ))


def test_a_part_ends_well_or_badly():
    done = run("import os; print('done', os.environ['OWN'])")
    assert done | {"seconds": 0} == {"state": "ok", "seconds": 0, "output": "done 1\n"}
    assert run("raise SystemExit(3)", "print('never')") | {"seconds": 0} == {
        "state": "failed with 3",
        "seconds": 0,
        "output": "",
    }
    assert run("print(1)", "print(2)")["output"] == "1\n2\n"


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def ctrl_c(request):
    """Hear Ctrl-C, or not, as a job in the background does not."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_part_that_is_late_is_asked_to_stop_and_all_that_it_started_is_ended(tmp_path):
    code = f"""
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what was measured")
"""
    late = run(code, "print('never')", limit=2.0)
    assert late["state"] == "stopped after 2 s"
    assert late["output"] == "begun\nwhat was measured\n"
    pid = int((tmp_path / "pid").read_text())
    deadline = time.perf_counter() + 10
    while is_running(pid) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
def test_a_bench_that_is_stopped_keeps_what_it_has_timed(tmp_path):
    bench = tmp_path / "bench_some.py"
    bench.write_text(
        "import time\ndef test_first(benchmark): benchmark(sum, [1])\ndef test_slow(benchmark): time.sleep(60)\n"
    )
    step = gpu_report._bench(tmp_path, "some", 10, str(bench), "--benchmark-max-time=0.1")
    part = run_step(step, 12.0, gpu_report.environment_of())
    assert part["state"] == "stopped after 12 s"
    assert part["counts"] == {"passed": 1}
    assert [one["name"] for one in json.loads((tmp_path / "some.json").read_text())["benchmarks"]] == ["test_first"]


def test_what_cannot_be_imported_stops_no_other_test_and_skipped_is_not_ok(tmp_path):
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "test_warns.py").write_text("import warnings\ndef test_it(): warnings.warn('of another version')\n")
    (tmp_path / "test_skipped.py").write_text("import pytest\ndef test_it(): pytest.skip('no')\n")
    environment = gpu_report.environment_of()
    both = Step("some", (), (gpu_report._pytest(str(tmp_path)),), 60)
    part = run_step(both, 60, environment)
    assert part["state"] == "failed with 1"
    assert part["counts"] == {"passed": 1, "skipped": 1, "error": 1}
    kept = gpu_report._kept(both, part, tmp_path / "log.txt")
    assert "SKIPPED" not in kept["output"]
    assert "test_broken.py" in kept["output"]
    assert [line.rpartition(": ")[2] for line in kept["skips"]] == ["no"]
    assert kept["skips"][0] in (tmp_path / "log.txt").read_text()
    skipped = Step("some", (), (gpu_report._pytest(str(tmp_path / "test_skipped.py")),), 60)
    assert run_step(skipped, 60, environment)["state"] == "nothing passed: all was skipped"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("3 passed, 2 skipped, 400 deselected in 1.20s", {"passed": 3, "skipped": 2, "deselected": 400}),
        ("1 failed, 2 passed, 1 warning, 3 errors in 61.00s (0:01:01)", {"failed": 1, "passed": 2, "error": 3}),
        ("Finished in 3.2s", None),
    ],
)
def test_pytest_is_counted_by_its_last_line(line, counts):
    assert gpu_report.counts_of(f"5 passed in the way\nFAILED some - it failed\n{line}\n") == counts


# ---- all parts


@pytest.fixture
def some_gpu(monkeypatch):
    monkeypatch.setattr(gpu_report, "find_gpu", lambda: "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB, 700.00 W, 9.0")
    monkeypatch.setattr(gpu_report, "find_program", lambda program: program)
    monkeypatch.setattr(gpu_report, "has", lambda module: module != "transformers")
    monkeypatch.setattr(gpu_report, "SITE", gpu_report.SCRATCH / "site-of-tests")


def test_every_part_is_in_the_summary_and_a_missing_package_stops_no_other(tmp_path, some_gpu):
    del some_gpu
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ladder.json").write_text("of an earlier run")
    ran = []
    summary = report(
        tmp_path / "out", run=lambda step, *_: ran.append(step.name) or {"state": "ok", "output": "x" * 99999}
    )
    assert set(ran[:2]) == {"build_native", "build_cuda"}
    assert set(ran[2:6]) == {"gpu_tests", "triton_tests", "memcheck", "racecheck"}
    assert ran[6:] == ["kernels", "update"]
    assert summary["parts"]["ladder"]["state"] == "skipped: transformers not installed"
    assert summary["parts"]["report"]["state"] == "skipped: the ladder left no result"
    assert len(summary["parts"]["kernels"]["output"]) == gpu_report.TAIL
    assert (tmp_path / "out" / "log.txt").read_text().count("x" * 99999) == len(ran)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert not any(answer["met"] for answer in summary["answers"])


def test_what_a_part_leaves_later_ones_may_use_and_a_late_one_takes_from_no_other(tmp_path, some_gpu, monkeypatch):
    del some_gpu
    now, limits, spent = [0.0], {}, {"kernels": 230.0}
    monkeypatch.setattr(gpu_report.time, "perf_counter", lambda: now[0])

    def taken(step, left, _):
        limits[step.name] = left
        now[0] += spent.get(step.name, 0.0)
        return {"state": "ok"}

    report(tmp_path, run=taken)
    assert limits["build_cuda"] == 65
    assert limits["gpu_tests"] == 65 + 85
    assert limits["kernels"] == 65 + 85 + 200
    assert limits["update"] == 65 + 85 + 200 + 100 + 5 + 20 - 230


def test_the_parts_have_their_time_name_files_that_are_there_and_write_no_more_than_comes_back(tmp_path):
    written, total = {"summary.json", "log.txt", "report.json", "ladder.png"}, 0.0
    for stage in stages(tmp_path, tmp_path, ""):
        total += max(step.at_most_s for step in stage)
        for step in stage:
            for word in (word for command in step.commands for word in command):
                path = word.partition("::")[0]
                assert not path.endswith(".py") or path == sys.executable or (ROOT / path).is_file()
                if word.startswith("bench.gpu_hours."):
                    assert (ROOT / (word.replace(".", "/") + ".py")).is_file()
                made = word.removeprefix("--benchmark-json=")
                if made.startswith(str(tmp_path)) and made.endswith(".json"):
                    written.add(made.removeprefix(f"{tmp_path}/"))
    assert total <= gpu_report.BUDGET_S <= 9 * 60 - gpu_report.GRACE_S
    assert written == set(gpu_report.FILES)
    assert len(written) <= 8


def test_every_file_with_a_test_for_a_gpu_is_run():
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert {path.relative_to(ROOT).as_posix() for path in marked} - {"tests/bench/test_gpu_report.py"} == set(GPU_TESTS)


@pytest.mark.slow
@pytest.mark.parametrize("without", ["", "lago_fast._C,lago_fast._cuda,transformers,tokenizers"])
def test_a_file_can_be_imported_with_what_it_is_said_to_need(without, tmp_path):
    hidden = {*ABSENT.split(","), *without.split(",")}
    files = [file for file, needs in GPU_TESTS.items() if not hidden & set(needs) or file.endswith("test_cuda.py")]
    benches = ["bench/bench_ppo_kl.py", "bench/bench_gae.py", "bench/bench_sample.py"]
    benches += [] if without else ["bench/bench_update.py", "bench/bench_prior.py"]
    command = [sys.executable, "-m", "tests.bench.hidden", ",".join(sorted(hidden)), "--co", "-q", *files, *benches]
    done = subprocess.run([*command, f"--basetemp={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_tests_under_the_sanitizer_are_there():
    text = (ROOT / "tests/kernels/test_cuda.py").read_text()
    assert all(f"def {name.partition('[')[0]}(" in text for name in SANITIZED)


def test_only_the_architecture_that_is_here_is_built(monkeypatch):
    monkeypatch.setattr(gpu_report, "find_program", lambda program: f"/some/{program}")
    assert gpu_report._cuda_options("NVIDIA H100, 580.1, 81559 MiB, [N/A], 9.0\nanother, 8.0") == (
        "-DLAGO_CUDA=ON",
        "-DCMAKE_CUDA_COMPILER=/some/nvcc",
        "-DCMAKE_CUDA_ARCHITECTURES=90",
    )
    assert gpu_report._cuda_options("unknown")[-1] == "-DCMAKE_CUDA_COMPILER=/some/nvcc"


def test_a_program_of_cuda_is_found_off_the_path(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_report.find_program("nvcc") == str(nvcc)
    assert str(tmp_path / "bin") in gpu_report.environment_of()["PATH"].split(os.pathsep)


# ---- wheels


def write_wheel(folder):
    info = "carried_for_tests-1.0.dist-info"
    about = "Metadata-Version: 2.1\nName: carried-for-tests\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / "carried_for_tests-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_for_tests.py", "WHAT = 'carried'\n")
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(
            f"{info}/RECORD", f"carried_for_tests.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )


def test_wheels_are_installed_beside_the_interpreters_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    write_wheel(tmp_path)
    assert not gpu_report.has("carried_for_tests")
    step = next(stages(tmp_path, tmp_path, ""))[0]
    environment = gpu_report.environment_of()
    assert run_step(step, 60, environment)["state"] == "ok"
    assert gpu_report.has("carried_for_tests")
    told = subprocess.run(
        [sys.executable, "-c", "import carried_for_tests; print(carried_for_tests.WHAT)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "carried\n"


def test_a_folder_without_wheels_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--wheels", str(tmp_path)])
    assert "there is no wheel in" in capsys.readouterr().err


# ---- what the summary answers


def cell(impl, us, op="categorical", shape=(1048576, 40), entry="loss_and_grads"):
    facts = {"op": op, "shape": list(shape), "dtype": "float32", "entry": entry, "impl": impl, "device_s": us / 1e6}
    return {"extra_info": {**facts, "ratio_to_copy": 180 / us, "gb_per_s": 2400.0, "copy_gb_per_s": 3000.0}}


def arm(tag, walls, env_steps=1000):
    rounds = [{"wall_s": wall, "env_steps": env_steps} for wall in walls]
    return {"tag": tag, "rounds": rounds, "warm_up": {"wall_s": 99.0, "env_steps": env_steps}}


@pytest.fixture
def measured(tmp_path):
    full = [("cuda", 200), ("triton", 240), ("reference", 1800), ("inductor", 420)]
    cells = [cell(impl, us) for impl, us in full] + [cell("cuda", 7.5, shape=(32768, 4), entry="graph replay")]
    cells.append({"extra_info": {"op": "of a CPU", "shape": [1, 1], "dtype": "float32", "impl": "cpp"}})
    (tmp_path / "kernels.json").write_text(json.dumps({"benchmarks": cells}))
    arms = {
        "1 first user": arm("baseline", [360.0, 300.0]),
        "2 careful user": arm("exact", [30.0, 32.0]),
        "7 two groups": arm("exact", [3.0, 2.0]),
        "8 amortised": arm("approximate", [0.3, 0.3]),
        "side row: overlapped": arm("stale", [2.9, 2.9]),
    }
    (tmp_path / "ladder.json").write_text(json.dumps({"arms": arms, "weights": "random", "skipped": []}))
    update = {"extra_info": {"rows": 256, "impl": "graph", "ms_per_minibatch": 0.2}}
    (tmp_path / "update.json").write_text(json.dumps({"benchmarks": [update]}))
    return tmp_path


def test_the_figures_answer_what_is_asked(measured):
    found = figures(measured)
    lines = {(line["question"], line.get("impl", "")): line for line in answers(found)}
    assert len(lines) == 2 * 4 + 2
    texts = [question.text for question in QUESTIONS]
    by_cuda = [lines[text, "cuda"] for text in texts[:4]]
    assert [line["measured"] for line in by_cuda] == pytest.approx([0.9, 9.0, 2.1, 7.5])
    assert all(line["met"] for line in by_cuda)
    assert by_cuda[3]["wanted"] == "at most 8"
    assert [lines[text, "triton"]["met"] for text in texts[:4]] == [False, False, False, False]
    assert lines[texts[3], "triton"]["measured"] is None
    # rung 7 in pairs of rounds: 360 / 3 and 300 / 2, 30 / 3 and 32 / 2
    assert lines[texts[4], ""]["measured"] == pytest.approx(135)
    assert lines[texts[5], ""]["measured"] == pytest.approx(13)
    assert found["ladder"]["last_exact_rung"] == "7 two groups"
    assert found["ladder"]["measured_by"] == "rounds"
    assert found["ladder"]["arms"]["1 first user"]["gpu_hours_per_million_steps"] == pytest.approx(330 / 3.6)
    assert found["update_ms_per_minibatch"] == {"256 rows, graph": 0.2}
    assert set(found["kernels"]) == {
        "categorical 1048576x40 float32 loss_and_grads",
        "categorical 32768x4 float32 graph replay",
    }


def test_a_ladder_that_was_stopped_is_read_by_its_warm_ups(measured):
    ladder = json.loads((measured / "ladder.json").read_text())
    ladder["arms"]["8 amortised"]["rounds"] = []
    (measured / "ladder.json").write_text(json.dumps(ladder))
    found = figures(measured)["ladder"]
    assert found["measured_by"] == "warm-ups alone"
    assert found["times_fewer_than_rung_1"] == 1.0
    assert gpu_report._drawing(measured).lacking == "the ladder finished no round"


def test_files_that_are_missing_or_half_written_answer_nothing(tmp_path):
    (tmp_path / "kernels.json").write_text('{"benchmarks": [')
    assert {line["measured"] for line in answers(figures(tmp_path))} == {None}


# ---- what only a GPU would show


@pytest.mark.parametrize(
    "said",
    [
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
        "You are trying to run FastKLPPO on the GPU, but it is primarily intended to run on the CPU",
    ],
)
def test_what_packages_say_once_on_a_gpu_fails_no_test(said):
    warnings.warn(said, UserWarning, stacklevel=1)


def test_a_test_that_fails_while_nothing_may_wait_leaves_no_other_so(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import torch\nmodes = []\ntorch.cuda.is_initialized = lambda: True\n"
        "torch.cuda.set_sync_debug_mode = modes.append\n"
        "def test_fails():\n    torch.cuda.set_sync_debug_mode('error')\n    raise ValueError\n"
        "def test_after():\n    assert modes == ['error', 'default']\n"
    )
    command = gpu_report._pytest(str(tmp_path), plugin="tests.conftest")
    part = run_step(Step("some", (), (command,), 60), 60, gpu_report.environment_of())
    assert part["counts"] == {"failed": 1, "passed": 1}, part["output"]
