"""Everything that a machine with an NVIDIA GPU can say about this package, in nine minutes, as small files.

    python -m bench.gpu_hours.gpu_report OUT          (make gpu-report OUT=dir)

Builds the CUDA kernels, runs the tests marked `gpu`, the benches of kernels and priors, and a short ladder with a prior
of Llama-2-7B's shape and random weights. A part whose packages are missing, or for which no time is left, is skipped,
and the summary says why. Without a GPU it does nothing and ends with 1. Needs the standard library alone.
Test: pytest tests/bench/test_gpu_report.py
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 530  # of the nine minutes; the rest is for starting and writing
LEAST_S = 20  # a part is not begun with less
TAIL = 4000  # characters of a part's output that are kept


@dataclass(frozen=True)
class Step:
    """One part: what it needs, and what it runs."""

    name: str
    needs: tuple[str, ...]  # modules
    command: tuple[str, ...]
    at_most_s: float
    programs: tuple[str, ...] = ()


def steps(out: Path) -> list[Step]:
    """Return the parts in the order in which they run."""
    python = sys.executable

    def bench(name: str, at_most_s: float, *words: str, needs: tuple[str, ...] = ()) -> Step:
        made = f"--benchmark-json={out / name}.json"
        command = (python, "-m", "pytest", *words, "--benchmark-only", "-q", "--benchmark-max-time=0.2", made)
        return Step(name, ("torch", "pytest", "pytest_benchmark", "numpy", *needs), command, at_most_s)

    build = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT))
    tests = (python, "-m", "pytest", *_gpu_tests(), "-m", "gpu", "-q")
    update = (python, "-m", "bench.update", str(out / "update.json"), "--device", "cuda")
    language = ("torch", "transformers", "tokenizers", "pytest")
    ladder = (python, "-m", "bench.gpu_hours.llama_ladder", str(out / "ladder.json"))
    llama = ("bench/bench_prior.py", "-k", "llama2 and not amortised")
    return [
        Step("build", ("scikit_build_core", "pybind11"), build, 150, programs=("nvcc", "cmake")),
        Step("gpu_tests", ("torch", "pytest", "hypothesis"), tests, 120),
        bench("kernels", 60, "bench/bench_ppo_kl.py", "bench/bench_gae.py", "bench/bench_sample.py"),
        Step("update", ("torch", "stable_baselines3", "gymnasium", "envpool"), update, 40),
        Step("ladder", (*language, "stable_baselines3", "gymnasium", "envpool", "minari"), ladder, 280),
        Step("report", ("matplotlib",), (python, "-m", "bench.gpu_hours.report", str(out / "ladder.json")), 30),
        bench("priors", 120, *llama, needs=language),
    ]


def _gpu_tests() -> tuple[str, ...]:
    """Return the folders whose tests can be imported here."""
    return ("tests",) if find_spec("stable_baselines3") and find_spec("envpool") else ("tests/kernels",)


def reason_to_skip(step: Step, left_s: float, has: Callable[[str], bool], which: Callable[[str], Any]) -> str | None:
    """Return why a part cannot run, None where it can."""
    missing = [module for module in step.needs if not has(module)]
    missing += [program for program in step.programs if not which(program)]
    if missing:
        return f"{', '.join(missing)} not installed"
    if left_s < LEAST_S:
        return f"{left_s:.0f} s of the nine minutes were left"
    return None


def run_step(step: Step, left_s: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part within its time, and return how it ended."""
    limit, started = min(step.at_most_s, left_s), time.perf_counter()
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env=environment,
            timeout=limit,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        state, told = "ok" if done.returncode == 0 else f"failed with {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as late:
        raw = late.stdout or b""
        state, told = f"stopped after {limit:.0f} s", raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    return {"state": state, "seconds": time.perf_counter() - started, "output": told[-TAIL:]}


def find_gpu() -> str | None:
    """Return what nvidia-smi says of the GPUs, None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def report(out: Path, run: Callable[..., dict[str, Any]] = run_step) -> dict[str, Any]:
    """Run every part that can run, write summary.json after each, and return it."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # an installation is not needed: the sources are read where they are
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SKBUILD_CMAKE_DEFINE": "LAGO_CUDA=ON"}
    summary: dict[str, Any] = {"gpu": find_gpu(), "python": sys.version.split()[0], "parts": {}}
    for step in steps(out):
        left = BUDGET_S - (time.perf_counter() - started)
        why = reason_to_skip(step, left, lambda module: find_spec(module) is not None, shutil.which)
        if why is None and step.name == "report" and not (out / "ladder.json").exists():
            why = "the ladder left no result"
        part = {"state": f"skipped: {why}"} if why else run(step, left, environment)
        summary["parts"][step.name] = part
        print(f"{step.name}: {part['state']}", flush=True)
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args(words).out.absolute()
    if find_gpu() is None:
        print("gpu-report needs an NVIDIA GPU, and nvidia-smi finds none here; nothing was run", file=sys.stderr)
        return 1
    summary = report(out)
    print(json.dumps({name: part["state"] for name, part in summary["parts"].items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
