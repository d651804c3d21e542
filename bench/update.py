"""Milliseconds of an update per minibatch: natively and by PyTorch on a CPU; by kernels and by a graph on a GPU.

    python -m bench.update OUT.json [--rounds 20] [--device cpu]

An update of a rollout of Meta-World push (64 envs, 128 steps), MLP 64x64, no prior: gathering the rows, both passes,
loss, clipping and Adam. The arms take turns, round by round; a figure is the median over the rounds. "native" is what
FastKLPPO does on a CPU; "autograd" leaves the networks to PyTorch's modules, all other ops as they are; "eager" has no
native op (`impl="reference"`). On a GPU, "kernels" launches each kernel of a step, and "graph" replays them all
(`cuda_graph=True`).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lago_fast import FastKLPPO, make_metaworld, runs

ROWS = (256, 2048)
THREADS = {"cpu": (1, 2), "cuda": (1,)}  # of torch
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"native": {}, "autograd": {}, "eager": {"impl": "reference"}},
    "cuda": {"kernels": {}, "graph": {"cuda_graph": True}},
}
NUM_ENVS, N_STEPS, EPOCHS = 64, 128, 2


def models(rows: int, device: str) -> dict[str, FastKLPPO]:
    """Return a model per arm that has collected one rollout."""
    found = {}
    for name, own in ARMS[device].items():
        env = make_metaworld(["push"], NUM_ENVS, normalize_reward=True)
        settings: Any = {"n_steps": N_STEPS, "batch_size": rows, "n_epochs": EPOCHS, "device": device, "seed": 0}
        model = found[name] = FastKLPPO("MlpPolicy", env, **settings, **own)
        if name == "autograd":
            assert model._head.networks is not None
            model._head.networks.impl = "reference"
        model.learn(1, log_interval=1000)
        env.close()
        assert model.impls["mlp"] == ("cpp" if name == "native" else "reference"), name
    return found


def measure(rows: int, threads: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Let the arms of a case take turns."""
    torch.set_num_threads(threads)
    minibatches = EPOCHS * NUM_ENVS * N_STEPS // rows
    arms = models(rows, device)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(rounds + 1):
        for name, model in arms.items():
            started = time.perf_counter()
            model.train()
            if k:  # the first warms up
                times[name].append((time.perf_counter() - started) / minibatches * 1e3)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {"rows": rows, "threads": threads, "ms_per_minibatch": median, "rounds_ms": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=sorted(ARMS), default="cpu")
    options = parser.parse_args()
    device = options.device
    results = [measure(rows, threads, options.rounds, device) for rows in ROWS for threads in THREADS[device]]
    for result in results:
        print(result["rows"], "rows,", result["threads"], "threads:", result["ms_per_minibatch"], flush=True)
    record = {
        **runs.provenance(),
        "device": device,
        "rounds": options.rounds,
        "load_average": os.getloadavg(),
        "results": results,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
