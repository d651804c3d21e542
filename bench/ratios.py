"""How much faster the native losses are than eager PyTorch and torch.compile, forward and backward, on this CPU.

    python bench/ratios.py OUT.json [--rounds 60] [--threads 2]

The arms of a case take turns, round by round, so that what else the machine does falls on all of them; a figure is a
median over the rounds. Beside the wall time stands the process's CPU time, which a busy machine disturbs less; with
more than one thread it counts all of them.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import cases
from lago_fast import ops, runs

CASES = [("categorical", rows, 40) for rows in (64, 2048, 65536)] + [
    ("gaussian", rows, 4) for rows in (64, 2048, 65536)
]
CALLS_ROWS = 16384  # rows that one turn of an arm goes through, in one call or several
SEED = 0


def arms(kind: str, rows: int, width: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return the arms of a case, each a whole forward and backward, and the bytes that none can avoid."""
    x: Any
    if kind == "categorical":
        x = cases.categorical(rows, width, seed=SEED)
        c = cases.coefficients(ops.CategoricalCoefficients)
        op, differentiable = ops.ppo_kl_categorical_loss_and_grads, ops.ppo_kl_categorical
        names = ["logits", "values"]
    else:
        x = cases.gaussian(rows, width, seed=SEED)
        c = cases.coefficients(ops.GaussianCoefficients)
        op, differentiable = ops.ppo_kl_gaussian_loss_and_grads, ops.ppo_kl_gaussian
        names = ["mean", "log_std", "values"]
    expected = op(x, c, impl="reference")
    returned = {}
    for impl in ("reference", "inductor", "cpp"):
        returned[impl] = op(x, c, impl=impl)
        cases.check([*returned[impl][0], *returned[impl][1]], [*expected[0], *expected[1]])
    leaves = [getattr(x, name).clone().requires_grad_() for name in names]
    inputs = x._replace(**dict(zip(names, leaves, strict=True)))

    def backward(impl: str) -> None:
        for leaf in leaves:
            leaf.grad = None
        differentiable(inputs, c, impl=impl).loss.backward()

    least_bytes = cases.bytes_of([t for name, t in x._asdict().items() if name != "old_values"])
    least_bytes += cases.bytes_of(returned["cpp"][1])
    source = torch.zeros(least_bytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        # what autograd returns would only be copied to buffers
        "eager": lambda: op(x, c, impl="reference"),
        "inductor": lambda: op(x, c, impl="inductor"),
        "cpp": lambda: op(x, c, impl="cpp", out=returned["cpp"]),
        "eager_autograd": lambda: backward("reference"),
        "inductor_autograd": lambda: backward("inductor"),
        "cpp_autograd": lambda: backward("cpp"),
        "copy": lambda: target.copy_(source),
    }, least_bytes


def measure(kind: str, rows: int, width: int, rounds: int) -> dict[str, Any]:
    """Time the arms of one case in turns."""
    functions, least_bytes = arms(kind, rows, width)
    calls = max(1, CALLS_ROWS // rows)
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            function()  # the caches are those of this arm
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                function()
            cpu[name].append((time.process_time() - start_cpu) / calls)
            wall[name].append((time.perf_counter() - start) / calls)
    result: dict[str, Any] = {"kind": kind, "rows": rows, "width": width, "least_bytes": least_bytes}
    for clock, times in (("wall", wall), ("cpu", cpu)):
        median = {name: statistics.median(values) for name, values in times.items()}
        result[f"{clock}_us"] = {name: value * 1e6 for name, value in median.items()}
        result[f"{clock}_ratios"] = {
            "eager/cpp": median["eager"] / median["cpp"],
            "inductor/cpp": median["inductor"] / median["cpp"],
            "eager/cpp_autograd": median["eager_autograd"] / median["cpp_autograd"],
            "inductor/cpp_autograd": median["inductor_autograd"] / median["cpp_autograd"],
            "copy/cpp": median["copy"] / median["cpp"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if cases.DEVICE.type != "cpu":
        parser.error("this script compares CPU implementations; hide the GPU with CUDA_VISIBLE_DEVICES=")
    # torch.compile looks at .grad of tensors that are no leaves
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
    torch.set_num_threads(options.threads)
    results = []
    for kind, rows, width in CASES:
        results.append(measure(kind, rows, width, options.rounds))
        shown = {name: round(value, 2) for name, value in results[-1]["wall_ratios"].items()}
        print(kind, rows, width, shown, flush=True)
    record = {
        **runs.provenance(),
        "seed": SEED,
        "rounds": options.rounds,
        "load_average": os.getloadavg(),
        "results": results,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
