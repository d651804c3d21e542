"""Everything that a machine with an NVIDIA GPU can say about this package, in nine minutes, as small files.

    python -m bench.gpu_hours.gpu_report OUT [--wheels FOLDER]     (make gpu-report OUT=dir [WHEELS=folder])

Builds the native modules for the GPU at hand, right into lago_fast/, runs the tests of the kernels and those marked
`gpu`, compute-sanitizer over a few, the benches, and a short ladder with a prior of Llama-2-7B's shape and random
weights. A part whose packages are missing, or for which no time is left, is skipped, and the summary says why; a part
that is stopped keeps what it had measured. OUT/summary.json begins with the answers to what is asked of a GPU; all that
was said is in OUT/log.txt. Without a GPU it says what each part would lack here, runs nothing, and ends with 1.

Needs the standard library alone. The tests of trainers need gymnasium, stable-baselines3 and farama-notifications, as
does `update`; the ladder needs EnvPool with its assets besides. Where there is no package index they come as wheels:

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d FOLDER NAME ...

`--wheels FOLDER` installs these into a folder of their own beside the interpreter's packages.
Test: pytest tests/bench/test_gpu_report.py
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from bench.gpu_hours.gpu_answers import answers, figures

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ROOT / "build" / "gpu_report"
SITE = SCRATCH / "site"  # of what the wheels bring
BUDGET_S = 520  # of the nine minutes; the rest is for starting, stopping and writing
LEAST_S = 5  # a part is not begun with less
GRACE_S = 14  # between asking a part to stop and killing it: pytest-xdist waits ten seconds for its workers
TAIL, SKIPS = 12_000, 8  # characters and reasons to skip of a part that the summary keeps; the log keeps all
# what may be in OUT: few and small, to be sent back from a machine elsewhere
RESULTS = ("kernels.json", "ladder.json", "report.json", "ladder.png", "update.json", "priors.json")
FILES = ("summary.json", "log.txt", *RESULTS)

KERNELS, SB3 = "tests/kernels/test_", ("gymnasium", "stable_baselines3", "safetensors")
LANGUAGE = ("transformers", "tokenizers", "safetensors", "lago_fast._C")
TRITON_TESTS = tuple(
    f"{KERNELS}triton_{op}.py" for op in ("gae", "ppo_kl_categorical", "ppo_kl_gaussian", "prior_kl", "sample")
)
# files with tests marked `gpu`, and the modules without which a file cannot be imported, or tests nothing
GPU_TESTS: dict[str, tuple[str, ...]] = {
    f"{KERNELS}cuda.py": ("lago_fast._cuda",),
    **dict.fromkeys(TRITON_TESTS, ("triton",)),
    "tests/test_buffers.py": (),
    "tests/test_ops.py": (),
    **{f"tests/algorithms/test_{name}.py": SB3 for name in ("captured", "stage_clock")},
    "tests/algorithms/test_overlapping.py": (*SB3, "lago_fast._C"),
    **{f"tests/priors/test_{name}.py": LANGUAGE for name in ("buckets", "quantize", "score_prior", "generate_prior")},
}
# one of each kind of kernel: under compute-sanitizer a test takes seconds
SANITIZED = (
    "test_categorical_shapes[4-policy_prior]",
    "test_categorical_shapes[40-policy_prior]",
    "test_categorical_shapes[1500-prior_policy]",
    "test_gaussian_shapes[4-True-policy_prior]",
    "test_prior_kl_and_sample_of_categoricals[40-policy_prior]",
    "test_prior_kl_and_sample_of_gaussians[4-policy_prior]",
    "test_gae",
)
TESTING = ("torch", "numpy", "pytest", "hypothesis")


@dataclass(frozen=True)
class Step:
    """One part: what it needs, and what it runs."""

    name: str
    needs: tuple[str, ...]  # modules
    commands: tuple[tuple[str, ...], ...]  # one after the other, until one fails
    at_most_s: float  # beside what earlier parts have left
    programs: tuple[str, ...] = ()
    lacking: str = ""  # why it cannot run, where that is known before
    environment: Mapping[str, str] = field(default_factory=dict)  # besides everyone's
    left_out: Mapping[str, str] = field(default_factory=dict)  # what of it cannot run here, and why


def stages(out: Path, wheels: Path | None, gpu: str) -> Iterator[list[Step]]:
    """Yield the parts in the order in which they run; those of one stage run at once, since they time nothing.

    A stage is made when its turn comes: what can be tested depends on what was built.
    """
    if wheels is not None:
        yield [Step("wheels", ("pip",), (_install(wheels),), 15)]
    yield [_build("native", "_C", 65), _build("cuda", "_cuda", 65, *_cuda_options(gpu))]
    yield [*_checks(), *_sanitizers()]
    kernels = tuple(f"bench/bench_{name}.py" for name in ("ppo_kl", "gae", "sample"))
    # inductor, the slowest to compile, is asked at full size alone
    kernels += ("-k", "full_size or not inductor", "--benchmark-max-time=0.1")
    yield [_bench(out, "kernels", 200, *kernels)]
    needs = ("torch", "numpy", *LANGUAGE, *SB3, "pytest", "envpool")
    yield [
        Step("ladder", needs, ((sys.executable, "-m", "bench.gpu_hours.llama_ladder", str(out / "ladder.json")),), 100)
    ]
    yield [_drawing(out)]
    yield [_bench(out, "update", 20, "bench/bench_update.py", needs=(*SB3, "lago_fast._C"))]
    # the exact form, and the copy in float32 that the full prompt in bfloat16 is made of, nearly fill a GPU of 80 GB
    forms = "llama2 and states_per_second and not amortised and not cache and not naive-bf16"
    yield [_bench(out, "priors", 30, "bench/bench_prior.py", "-k", forms, needs=LANGUAGE)]


def _install(wheels: Path) -> tuple[str, ...]:
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
    return (*pip, "--upgrade", "--target", str(SITE), *map(str, sorted(wheels.glob("*.whl"))))


def _build(name: str, module: str, at_most_s: float, *options: str) -> Step:
    """Return how a native module is built into lago_fast/, by CMake alone: no version of scikit-build-core is asked."""
    cmake, folder = find_program("cmake") or "cmake", SCRATCH / f"cmake-{name}"
    pybind11 = find_spec("pybind11")
    # a package with an __init__ has an origin
    where = Path(pybind11.origin or "").parent / "share" / "cmake" / "pybind11" if pybind11 else folder
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "lago_fast",
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_FINDPYTHON": "ON",
        "pybind11_DIR": where,
    }
    defined = (*(f"-D{key}={value}" for key, value in settings.items()), *options)
    configure = (cmake, "-S", str(ROOT), "-B", str(folder), *(("-G", "Ninja") if find_program("ninja") else ()))
    make = (cmake, "--build", str(folder), "--target", module, "--parallel", str(os.cpu_count() or 1))
    programs = ("cmake", "nvcc") if module == "_cuda" else ("cmake",)
    return Step(f"build_{name}", ("pybind11",), ((*configure, *defined), make), at_most_s, programs=programs)


def _cuda_options(gpu: str) -> tuple[str, ...]:
    """Return CMake's options for the one GPU that is here: every other architecture would double the time."""
    capability = re.search(r"(\d+)\.(\d+)\s*$", gpu.partition("\n")[0])
    options = ("-DLAGO_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_program('nvcc') or 'nvcc'}")
    return options if capability is None else (*options, f"-DCMAKE_CUDA_ARCHITECTURES={''.join(capability.groups())}")


def _pytest(*words: str, plugin: str = "") -> tuple[str, ...]:
    """Return a run of pytest that says briefly what failed, and goes on past what cannot be imported.

    A warning of another version of a package is told, and fails nothing here; other plugins are not loaded.
    """
    told = ("-q", "--tb=short", "-rfEs", "--color=no", "-W", "default", "--continue-on-collection-errors")
    plugins = ("-p", plugin) if plugin else ()
    return (sys.executable, "-m", "pytest", *plugins, *told, "-p", "no:cacheprovider", *words)


def _bench(out: Path, name: str, at_most_s: float, *words: str, needs: tuple[str, ...] = ()) -> Step:
    made = ("--benchmark-only", "--benchmark-quiet", f"--benchmark-json={out / name}.json")
    command = _pytest(*words, *made, plugin="pytest_benchmark.plugin")
    return Step(name, ("torch", "numpy", "pytest", "pytest_benchmark", *needs), (command,), at_most_s)


def _checks() -> list[Step]:
    """Return the tests marked `gpu` in the files that can be imported here, and all of Triton's figures."""
    missing = {file: [module for module in needs if not has(module)] for file, needs in GPU_TESTS.items()}
    left_out = {file: f"{', '.join(lacking)} not installed" for file, lacking in missing.items() if lacking}

    def run(name: str, files: Sequence[str], mark: str, workers: int, **options: Any) -> Step:
        words = (*files, "-m", mark)
        here = _pytest(*words, "-n", str(workers), plugin="xdist.plugin") if has("xdist") else _pytest(*words)
        return Step(name, (*TESTING, *options.pop("needs", ())), (here,), 85, **options)

    files = [file for file in GPU_TESTS if file not in left_out]
    return [
        run("gpu_tests", files, "gpu", 4, left_out=left_out),
        run("triton_tests", TRITON_TESTS, "not slow and not gpu", 10, needs=("triton",)),
    ]


def _sanitizers() -> list[Step]:
    tests = tuple(f"{KERNELS}cuda.py::{name}" for name in SANITIZED)
    program = find_program("compute-sanitizer") or "compute-sanitizer"

    def checked(tool: str) -> Step:
        under = (program, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *_pytest(*tests))
        # without torch's cache of memory every tensor has its own bounds
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        needs = (*TESTING, "lago_fast._cuda")
        return Step(tool, needs, (under,), 85, programs=("compute-sanitizer",), environment=own)

    return [checked("memcheck"), checked("racecheck")]


def _drawing(out: Path) -> Step:
    """Return the ladder's table and figure; its CSV has nothing that the JSON has not."""
    result = out / "ladder.json"
    draw = (sys.executable, "-m", "bench.gpu_hours.report", str(result))
    tidy = (sys.executable, "-c", "import pathlib, sys; pathlib.Path(sys.argv[1]).unlink()", str(out / "report.csv"))
    arms = json.loads(result.read_text(encoding="utf-8"))["arms"].values() if result.exists() else ()
    whole = bool(arms) and all(arm["rounds"] for arm in arms)
    lacking = "" if whole else "the ladder finished no round" if result.exists() else "the ladder left no result"
    return Step("report", ("matplotlib", "numpy"), (draw, tidy), 5, lacking=lacking)


def has(module: str) -> bool:
    """Tell whether a module can be found, also one that was built or installed a moment ago."""
    importlib.invalidate_caches()
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a submodule whose package is missing
        return False


def find_program(name: str) -> str | None:
    """Look for a program on the PATH, beside the interpreter, and where CUDA is installed."""
    return shutil.which(name, path=os.pathsep.join(_search_path()))


def _search_path() -> list[str]:
    homes = [*filter(None, [os.environ.get("CUDA_HOME")]), "/usr/local/cuda"]
    places = [f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer")]
    return [*os.environ.get("PATH", "").split(os.pathsep), str(Path(sys.executable).parent), *places]


def reason_to_skip(step: Step, left_s: float, has: Callable[[str], bool], which: Callable[[str], Any]) -> str | None:
    """Return why a part cannot run, None where it can."""
    missing = [module for module in step.needs if not has(module)]
    missing += [program for program in step.programs if not which(program)]
    if missing:
        return f"{', '.join(missing)} not installed"
    if left_s < LEAST_S:
        return f"{left_s:.0f} s of the nine minutes were left"
    return step.lacking or None


def run_step(step: Step, left_s: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a part within its time, and return how it ended."""
    started, state = time.perf_counter(), "ok"
    with tempfile.TemporaryFile() as output:
        for command in step.commands:
            left = left_s - (time.perf_counter() - started)
            code = _run(command, left, {**environment, **step.environment}, output)
            if code != 0:
                state = f"stopped after {left_s:.0f} s" if code is None else f"failed with {code}"
                break
        output.seek(0)
        told = output.read().decode(errors="replace")
    part: dict[str, Any] = {"state": state, "seconds": time.perf_counter() - started}
    counts = counts_of(told)
    if counts is not None:
        part["counts"] = counts
        if state == "ok" and not counts.get("passed"):
            part["state"] = "nothing passed: all was skipped"
    return {**part, **({"left_out": dict(step.left_out)} if step.left_out else {}), "output": told}


def _hear_ctrl_c() -> None:
    """Let a command be asked to stop where this one, as a job in the background, is deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(command: Sequence[str], limit_s: float, environment: Mapping[str, str], output: IO[bytes]) -> int | None:
    """Return a command's exit status; None where it was stopped, and with it all that it had started.

    It is asked first, as by Ctrl-C, on which pytest writes what it has measured.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    ) as child:
        try:
            return child.wait(timeout=max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=GRACE_S)
            return None
        finally:
            # compilers and workers outlive their parent, and would disturb what is timed next
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def counts_of(told: str) -> dict[str, int] | None:
    """Return how many tests passed, failed and were skipped, as pytest's last line says; None where it says nothing."""
    lines = [
        line for line in told.splitlines() if re.search(r"\d+ (passed|failed|skipped|errors?)\b.* in [\d.]+s", line)
    ]
    if not lines:
        return None
    return {
        name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error|xfailed|deselected)", lines[-1])
    }


def find_gpu() -> str | None:
    """Return what nvidia-smi says of the GPUs, a line each that ends with the capability; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = "name,driver_version,memory.total,power.limit,compute_cap"
    query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def environment_of() -> dict[str, str]:
    """Return the environment of every part: the sources are read where they are, and nothing needs an installation."""
    paths = [str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(_search_path())}
    return {**os.environ, **own, "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def report(
    out: Path, wheels: Path | None = None, run: Callable[[Step, float, Mapping[str, str]], dict[str, Any]] = run_step
) -> dict[str, Any]:
    """Run every part that can run, write summary.json after each stage, and return it.

    What one stage leaves of its time, later ones may use. A stage that is late is stopped when the next is due, so that
    none goes without.
    """
    started, ends, gpu = time.perf_counter(), 0.0, find_gpu()
    shutil.rmtree(SITE, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier run, which would answer for a part that is skipped in this one
        (out / name).unlink(missing_ok=True)
    if wheels is not None:
        sys.path.append(str(SITE))
    environment = environment_of()
    parts: dict[str, Any] = {}
    about = {"gpu": gpu, "python": sys.version.split()[0]}

    def ended(step: Step, left_s: float) -> dict[str, Any]:
        why = reason_to_skip(step, left_s, has, find_program)
        return {"state": f"skipped: {why}"} if why else run(step, left_s, environment)

    for stage in stages(out, wheels, gpu or ""):
        ends += max(step.at_most_s for step in stage)
        left = ends - (time.perf_counter() - started)
        with ThreadPoolExecutor(len(stage)) as at_once:
            done = list(at_once.map(lambda step, left=left: ended(step, left), stage))
        for step, part in zip(stage, done, strict=True):
            parts[step.name] = _kept(step, part, out / "log.txt")
            print(f"{step.name}: {part['state']} {part.get('counts', '')}".rstrip(), flush=True)
        found = figures(out)
        summary = {"answers": answers(found), **about, "figures": found, "parts": parts}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _kept(step: Step, part: dict[str, Any], log: Path) -> dict[str, Any]:
    """Return what the summary keeps of a part; all that it said is added to the log."""
    told = part.get("output", "")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"==== {step.name}: {part['state']}\n{told}\n")
    lines = told.splitlines()
    skips = [line for line in lines if line.startswith("SKIPPED")]  # of a bench there are hundreds
    rest = "\n".join(line for line in lines if not line.startswith("SKIPPED"))
    part = {**part, "skips": skips[:SKIPS]} if skips else part
    return {**part, "output": rest[-TAIL:]} if "output" in part else part


def plan(wheels: Path | None) -> str:
    """Return a line for each part: its time, and what it would lack in this environment, the GPU aside."""
    lines = []
    for stage in stages(SCRATCH / "nowhere", wheels, ""):
        for step in stage:
            why = reason_to_skip(step, step.at_most_s, has, find_program)
            lines.append(f"  {step.name}, {step.at_most_s:.0f} s: {f'skipped: {why}' if why else 'would run'}")
            lines += [f"    without {file}: {lacking}" for file, lacking in step.left_out.items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install beside the interpreter's packages")
    options = parser.parse_args(words)
    if options.wheels is not None and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: there is no wheel in {options.wheels}")
    if find_gpu() is None:
        refusal = "gpu-report needs an NVIDIA GPU, and nvidia-smi finds none here; nothing was run"
        lacking = "What is not built or installed yet counts as missing"
        print(f"{refusal}. {lacking}; the parts in this environment:\n{plan(options.wheels)}", file=sys.stderr)
        return 1
    # a shell's background jobs ignore Ctrl-C, and so would every part, which is stopped by it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    summary = report(options.out.absolute(), options.wheels)
    print(json.dumps(summary["answers"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
