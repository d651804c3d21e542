"""Generalised advantage estimation: every implementation that runs here, beside the reference.

Run: pytest bench/bench_gae.py --benchmark-only
"""

import pytest
import torch

from bench import cases
from lago_fast import ops


@pytest.mark.parametrize("shape", [(128, 64), (256, 256), (64, 4096)], ids=["128x64", "256x256", "64x4096"])
@pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["gae"]))
def test_gae(benchmark, impl, shape):
    cases.require("gae", impl)
    torch.manual_seed(0)
    floats = torch.randn(3, *shape).unbind()
    terminated, truncated = (torch.rand(2, *shape) < 0.01).unbind()
    rollout = [t.to(cases.DEVICE) for t in (*floats, terminated, truncated, torch.rand(shape) > 0.01)]
    options = {"gamma": 0.99, "gae_lambda": 0.95}
    outputs = ops.gae(*rollout, **options, impl=impl)
    cases.check(outputs, ops.gae(*rollout, **options, impl="reference"))
    least_bytes = cases.bytes_of((*rollout, *outputs))
    cases.run(
        benchmark,
        lambda: ops.gae(*rollout, **options, impl=impl),
        least_bytes,
        op="gae",
        impl=impl,
        shape=list(shape),
        dtype="float32",
    )
