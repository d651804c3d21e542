"""Generalised advantage estimation: every implementation that runs here, beside the reference.

Run: pytest bench/bench_gae.py --benchmark-only
"""

import pytest
import torch

from lago_fast import ops


@pytest.mark.parametrize("shape", [(128, 64), (256, 256)], ids=["128x64", "256x256"])
@pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["gae"]))
def test_gae(benchmark, impl, shape):
    torch.manual_seed(0)
    floats = torch.randn(3, *shape).unbind()
    terminated, truncated = (torch.rand(2, *shape) < 0.01).unbind()
    rollout = (*floats, terminated, truncated, torch.rand(shape) > 0.01)
    # An op that is wrong is not timed.
    expected = ops.gae(*rollout, gamma=0.99, gae_lambda=0.95, impl="reference")
    for got, wanted in zip(ops.gae(*rollout, gamma=0.99, gae_lambda=0.95, impl=impl), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    # Three float columns and three flags are read, two float columns written.
    benchmark.extra_info.update(impl=impl, shape=shape, least_bytes=shape[0] * shape[1] * (5 * 4 + 3))
    benchmark(ops.gae, *rollout, gamma=0.99, gae_lambda=0.95, impl=impl)
