"""Sampling actions with their figures: every implementation that runs here, beside the reference.

Run: pytest bench/bench_sample.py --benchmark-only
"""

import pytest
import torch

from bench import cases
from lago_fast import ops

ROWS = [64, 2048, 32768]


@pytest.mark.parametrize("actions", [4, 40])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["sample"]))
def test_sample_categorical(benchmark, impl, rows, actions):
    cases.require("sample", impl)
    x = cases.categorical(rows, actions)
    state = torch.tensor([7, 3], device=cases.DEVICE)
    temperature = torch.tensor(1.0, device=cases.DEVICE)

    def draw(impl: str = impl) -> ops.SampleOutputs:
        options = {"prior_log_probs": x.prior_log_probs, "prior_temperature": temperature, "impl": impl}
        return ops.sample_categorical(x.logits, state, **options)

    outputs, expected = draw(), draw("reference")
    # an action may differ where its uniform number is at an edge; its log-probability then differs too
    same = outputs.actions == expected.actions
    assert same.float().mean() > 0.999
    cases.check(
        [outputs.log_prob[same], outputs.entropy, outputs.prior_kl],
        [expected.log_prob[same], expected.entropy, expected.prior_kl],
    )
    least_bytes = cases.bytes_of([x.logits, x.prior_log_probs, *outputs])
    facts = {"op": "sample categorical", "impl": impl, "shape": [rows, actions], "dtype": "float32"}
    cases.run(benchmark, draw, least_bytes, **facts)


@pytest.mark.parametrize("dims", [4, 17])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["sample"]))
def test_sample_gaussian(benchmark, impl, rows, dims):
    cases.require("sample", impl)
    x = cases.gaussian(rows, dims)
    state = torch.tensor([7, 3], device=cases.DEVICE)
    temperature = torch.tensor(1.0, device=cases.DEVICE)

    def draw(impl: str = impl) -> ops.SampleOutputs:
        return ops.sample_gaussian(
            x.mean,
            x.log_std,
            state,
            prior_mean=x.prior_mean,
            prior_log_std=x.prior_log_std,
            prior_temperature=temperature,
            impl=impl,
        )

    outputs = draw()
    cases.check(outputs, draw("reference"))
    least_bytes = cases.bytes_of([x.mean, x.log_std, x.prior_mean, x.prior_log_std, *outputs])
    facts = {"op": "sample gaussian", "impl": impl, "shape": [rows, dims], "dtype": "float32"}
    cases.run(benchmark, draw, least_bytes, **facts)
