"""What collecting the next rollout during the update gains: iterations of FastKLPPO with and without, in turns.

    python -m bench.overlap OUT.json [--rounds 20] [--batch-size 2048]

Meta-World push, 64 envs in two groups, 128 steps, 10 epochs, no prior. With it, torch has half of its threads on either
side: the arm "update, 2 threads" begins with four, so that the learner has two beside the simulators.
"""

import argparse
import json
import os
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from bench.gpu_hours.rungs import steady
from bench.gpu_hours.work import Work, plain
from lago_fast import runs

# name -> overlap, torch's threads outside of it
ARMS = {
    "none, 1 thread": ("none", 1),
    "none, 2 threads": ("none", 2),
    "update, 1 thread": ("update", 2),
    "update, 2 threads": ("update", 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=Work.batch_size)
    options = parser.parse_args()
    work = replace(Work(), batch_size=options.batch_size)
    rates: dict[str, list[float]] = {name: [] for name in ARMS}
    cores: dict[str, list[float]] = {name: [] for name in ARMS}
    with ExitStack() as opened:
        slices = {name: opened.enter_context(steady(work, None, overlap)) for name, (overlap, _) in ARMS.items()}
        for k in range(options.rounds + 1):
            for name, (_, threads) in ARMS.items():
                torch.set_num_threads(threads)
                found = slices[name]()
                if k:  # the first warms up
                    rates[name].append(found.env_steps / found.cost.wall_s)
                    cores[name].append(found.cost.cpu_s / found.cost.wall_s)
    median = {name: statistics.median(values) for name, values in rates.items()}
    record = {
        **runs.provenance(),
        "work": plain(work),
        "load_average": os.getloadavg(),
        "env_steps_per_s": median,
        "cores_busy": {name: statistics.median(values) for name, values in cores.items()},
        # of the same round, over the faster arm without
        "gain": {
            name: statistics.median(
                a / max(b, c) for a, b, c in zip(rates[name], *list(rates.values())[:2], strict=True)
            )
            for name in list(ARMS)[2:]
        },
        "rounds": rates,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: record[key] for key in ("env_steps_per_s", "cores_busy", "gain")}))


if __name__ == "__main__":
    main()
