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
# by the device's own clock: rounds, and calls of each, as many as fill so many seconds
DEVICE_ROUNDS, DEVICE_ROUND_S, MOST_CALLS = 15, 2e-3, 200


def categorical(rows: int, actions: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> ops.CategoricalInputs:
    """Draw a minibatch of a categorical policy whose ratios lie around 1, on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "device": DEVICE}
    logits, prior = (torch.randn(rows, actions, **drawn) for _ in range(2))
    chosen = torch.randint(actions, (rows,), **drawn)
    log_prob = logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
    noise, values, advantages, returns, old_values = torch.randn(5, rows, **drawn).unbind()
    x = ops.CategoricalInputs(
        logits=logits,
        values=values,
        actions=chosen,
        old_log_prob=log_prob + _log_ratio(noise),
        advantages=advantages,
        returns=returns,
        old_values=old_values,
        weight=torch.ones(rows, device=DEVICE),
        prior_log_probs=prior.log_softmax(-1),
    )
    return _converted(x, dtype)


def gaussian(rows: int, dims: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> ops.GaussianInputs:
    """Draw a minibatch of a Gaussian policy on the device: a std of the policy's own, a prior's per state."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "device": DEVICE}
    mean, noise, prior_mean, prior_noise = torch.randn(4, rows, dims, **drawn).unbind()
    log_std = torch.full((dims,), -0.7, device=DEVICE)
    actions = mean + log_std.exp() * noise
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    shift, values, advantages, returns, old_values = torch.randn(5, rows, **drawn).unbind()
    x = ops.GaussianInputs(
        mean=mean,
        log_std=log_std,
        values=values,
        actions=actions,
        old_log_prob=log_prob + _log_ratio(shift),
        advantages=advantages,
        returns=returns,
        old_values=old_values,
        weight=torch.ones(rows, device=DEVICE),
        prior_mean=prior_mean,
        prior_log_std=0.2 * prior_noise - 1,
    )
    return _converted(x, dtype)


def _log_ratio(noise: Tensor) -> Tensor:
    """Return log-ratios of about 0.1 of which none is at the edge of the clip, where rounding decides the gradient."""
    log_ratio = 0.1 * noise
    at_edge = (((-log_ratio).exp() - 1).abs() - COEFFICIENTS["clip_range"]).abs() < 1e-3
    return log_ratio.masked_fill(at_edge, 0.0)


def _converted(inputs: Any, dtype: torch.dtype) -> Any:
    return type(inputs)(*(t if t is None or not t.is_floating_point() else t.to(dtype) for t in inputs))


def coefficients(kind: type) -> Any:
    """Build the coefficients of a loss on the device."""
    return kind(**ops.coefficients_on(DEVICE, **COEFFICIENTS))


def require(op: str, impl: str) -> None:
    """Skip a benchmark whose implementation cannot run on the device."""
    try:
        ops.resolve(op, DEVICE.type, impl)
    except ImplUnavailable as reason:
        pytest.skip(str(reason))


def free_bytes() -> int | None:
    """Return how many bytes a tensor may still take on the GPU; None on a CPU, where nobody counts them."""
    if DEVICE.type == "cpu":
        return None
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, for tensors to come
    return torch.cuda.mem_get_info()[0] + kept


def check(got: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    """Refuse to time what is wrong: half types are compared at their own precision.

    Gradients of a mean over a million rows are a millionth each: they are held to their own largest.
    """
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        rough = a.dtype in (torch.float16, torch.bfloat16)
        rtol, atol = (2e-2, 1e-3) if rough else (1e-4, 1e-5)
        if b.dim() and b.numel():
            atol = min(atol, rtol * float(b.abs().max()))
        torch.testing.assert_close(a.float(), b.float(), rtol=rtol, atol=atol)


def synchronised(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that ends when the device has done its work."""
    if DEVICE.type == "cpu":
        return function

    def call() -> Any:
        result = function()
        torch.cuda.synchronize()
        return result

    return call


def device_seconds(function: Callable[[], Any]) -> float:
    """Return the median seconds of a call by the GPU's own clock, calls following each other without a wait."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(calls: int) -> float:
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    timed(1)
    calls = min(max(int(DEVICE_ROUND_S / max(timed(1), 1e-7)), 1), MOST_CALLS)
    return statistics.median(timed(calls) for _ in range(DEVICE_ROUNDS))


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a call as a CUDA graph; what the first calls compile and allocate is no part of it."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(3):
            function()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Return how many bytes the tensors hold."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def run(benchmark: Any, function: Callable[[], Any], least_bytes: int, **facts: Any) -> None:
    """Time a call, and beside it a plain copy that moves the same bytes; `least_bytes` counts reads and writes.

    On a GPU the rates and `device_s` are by the GPU's own clock, and the benchmark's times are the host's.
    """
    call = synchronised(function)
    call()
    # half is read and half written; of zeros a GPU may copy faster
    source = torch.randint(256, (max(least_bytes // 2, 1),), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    benchmark(call)
    benchmark.extra_info.update(facts, least_bytes=least_bytes, **runs.provenance())
    if benchmark.stats is None:  # --benchmark-disable
        return
    if DEVICE.type == "cpu":
        seconds, copy_seconds = benchmark.stats.stats.median, _copy_seconds(source, target)
    else:
        seconds, copy_seconds = device_seconds(function), device_seconds(lambda: target.copy_(source))
        benchmark.extra_info["device_s"] = seconds
    benchmark.extra_info["gb_per_s"] = least_bytes / seconds / 1e9
    benchmark.extra_info["copy_gb_per_s"] = least_bytes / copy_seconds / 1e9
    benchmark.extra_info["ratio_to_copy"] = copy_seconds / seconds


def _copy_seconds(source: Tensor, target: Tensor) -> float:
    target.copy_(source)
    times = []
    for _ in range(COPY_ROUNDS):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
