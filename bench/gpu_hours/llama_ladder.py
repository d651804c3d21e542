"""The ladder with a prior of Llama-2-7B's shape and random weights: the shape decides the time, nobody learns from it.

Without peers, whose plain PPO asks no prior. Rungs 5 to 7 ask the exact prior of rung 3, and a side row that of rung 4.

    python -m bench.gpu_hours.llama_ladder OUT.json
"""

import sys

from bench.bench_prior import folder_of
from bench.gpu_hours import compare

# one slice of every arm for warm-up and as many rounds as fit; rungs without the full prompt take seconds
SECONDS = 60
SLICE_ROWS = 256  # of the full prompt at seven billion weights


def main() -> None:
    words = ["--backbone-shape", str(folder_of("llama2-7b")), "--device", "cuda", "--quantization", "bf16"]
    words += ["--rounds", "5", "--seconds", str(SECONDS), "--slice-rows", str(SLICE_ROWS), "--carry", "shared"]
    compare.main([sys.argv[1], *words])


if __name__ == "__main__":
    main()
