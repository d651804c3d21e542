"""What the kernels' benchmarks share: inputs as a trainer makes them, the check, and the copy beside each time."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from lago_fast import ops, runs
from lago_fast.errors import ImplUnavailable

COEFFICIENTS = {"clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "kl_coef": 0.3, "prior_temperature": 1.0}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COPY_ROUNDS = 20


def categorical(rows: int, actions: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> ops.CategoricalInputs:
    """Draw a minibatch of a categorical policy whose ratios lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    logits, prior = (torch.randn(rows, actions, generator=generator) for _ in range(2))
    chosen = torch.randint(actions, (rows,), generator=generator)
    log_prob = logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
    noise, values, advantages, returns, old_values = torch.randn(5, rows, generator=generator).unbind()
    x = ops.CategoricalInputs(
        logits=logits,
        values=values,
        actions=chosen,
        old_log_prob=log_prob + _log_ratio(noise),
        advantages=advantages,
        returns=returns,
        old_values=old_values,
        weight=torch.ones(rows),
        prior_log_probs=prior.log_softmax(-1),
    )
    return _placed(x, dtype)


def gaussian(rows: int, dims: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> ops.GaussianInputs:
    """Draw a minibatch of a Gaussian policy: a std of the policy's own, a prior's per state."""
    generator = torch.Generator().manual_seed(seed)
    mean, noise, prior_mean, prior_noise = torch.randn(4, rows, dims, generator=generator).unbind()
    log_std = torch.full((dims,), -0.7)
    actions = mean + log_std.exp() * noise
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    shift, values, advantages, returns, old_values = torch.randn(5, rows, generator=generator).unbind()
    x = ops.GaussianInputs(
        mean=mean,
        log_std=log_std,
        values=values,
        actions=actions,
        old_log_prob=log_prob + _log_ratio(shift),
        advantages=advantages,
        returns=returns,
        old_values=old_values,
        weight=torch.ones(rows),
        prior_mean=prior_mean,
        prior_log_std=0.2 * prior_noise - 1,
    )
    return _placed(x, dtype)


def _log_ratio(noise: Tensor) -> Tensor:
    """Return log-ratios of about 0.1 of which none is at the edge of the clip, where rounding decides the gradient."""
    log_ratio = 0.1 * noise
    at_edge = (((-log_ratio).exp() - 1).abs() - COEFFICIENTS["clip_range"]).abs() < 1e-3
    return log_ratio.masked_fill(at_edge, 0.0)


def _placed(inputs: Any, dtype: torch.dtype) -> Any:
    def place(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(DEVICE, dtype if t.is_floating_point() else None)

    return type(inputs)(*map(place, inputs))


def coefficients(kind: type) -> Any:
    """Build the coefficients of a loss on the device."""
    return kind(**ops.coefficients_on(DEVICE, **COEFFICIENTS))


def require(op: str, impl: str) -> None:
    """Skip a benchmark whose implementation cannot run on the device."""
    try:
        ops.resolve(op, DEVICE.type, impl)
    except ImplUnavailable as reason:
        pytest.skip(str(reason))


def check(got: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    """Refuse to time what is wrong: half types are compared at their own precision."""
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        rough = a.dtype in (torch.float16, torch.bfloat16)
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2 if rough else 1e-4, atol=1e-3 if rough else 1e-5)


def synchronised(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that ends when the device has done its work."""
    if DEVICE.type == "cpu":
        return function

    def call() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return call


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Return how many bytes the tensors hold."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def run(benchmark: Any, function: Callable[[], Any], least_bytes: int, **facts: Any) -> None:
    """Time a call, and beside it a plain copy that moves the same bytes; `least_bytes` counts reads and writes."""
    call = synchronised(function)
    call()
    # half is read and half written
    source = torch.zeros(max(least_bytes // 2, 1), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = synchronised(lambda: target.copy_(source))
    copy()
    times = []
    for _ in range(COPY_ROUNDS):
        start = time.perf_counter()
        copy()
        times.append(time.perf_counter() - start)
    benchmark(call)
    benchmark.extra_info.update(facts, least_bytes=least_bytes, **runs.provenance())
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["gb_per_s"] = least_bytes / seconds / 1e9
    benchmark.extra_info["copy_gb_per_s"] = least_bytes / statistics.median(times) / 1e9
    benchmark.extra_info["ratio_to_copy"] = statistics.median(times) / seconds
