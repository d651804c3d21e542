"""A peer in an interpreter of its own: one iteration per line that it reads, one line of JSON per iteration.

The settings of the work are the first argument: python -m bench.gpu_hours.sbx_worker '{"task": "push", ...}'
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench.gpu_hours.rungs import iteration
from bench.gpu_hours.work import Work


def serve(make: Callable[[Work], Any]) -> None:
    """Train the model that `make` returns, iteration by iteration, until nothing more is asked."""
    settings = json.loads(sys.argv[1])
    model = make(Work(**{**settings, "net_arch": tuple(settings["net_arch"])}))
    for _ in sys.stdin:
        one = iteration(model)
        print(json.dumps({"cost": asdict(one.cost), "env_steps": one.env_steps}), flush=True)
