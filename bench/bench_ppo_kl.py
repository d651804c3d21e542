"""The Gaussian PPO + prior-KL loss with its gradients: every implementation beside the reference.

Run: pytest bench/bench_ppo_kl.py --benchmark-only
"""

import pytest
import torch

from lago_fast import ops

DIMS = 4


def batch(rows: int) -> ops.GaussianInputs:
    """Draw a minibatch as the trainer makes it: a std of the policy's own, a prior's per state."""
    torch.manual_seed(0)
    mean, log_std = torch.randn(rows, DIMS), torch.full((DIMS,), -0.7)
    actions = mean + log_std.exp() * torch.randn(rows, DIMS)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    advantages, returns, values, old_values = torch.randn(4, rows).unbind()
    return ops.GaussianInputs(
        mean=mean,
        log_std=log_std,
        values=values,
        actions=actions,
        old_log_prob=log_prob + 0.1 * torch.randn(rows),
        advantages=advantages,
        returns=returns,
        old_values=old_values,
        weight=torch.ones(rows),
        prior_mean=torch.randn(rows, DIMS),
        prior_log_std=0.2 * torch.randn(rows, DIMS) - 1,
    )


@pytest.mark.parametrize("rows", [64, 2048, 65536])
@pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["ppo_kl_gaussian"]))
def test_ppo_kl_gaussian(benchmark, impl, rows):
    inputs = batch(rows)
    coefficients = ops.GaussianCoefficients(
        **ops.coefficients_on(
            torch.device("cpu"),
            clip_range=0.2,
            ent_coef=0.01,
            vf_coef=0.5,
            kl_coef=0.3,
            prior_temperature=1.0,
        )
    )
    # An op that is wrong is not timed.
    expected = ops.ppo_kl_gaussian_loss_and_grads(inputs, coefficients, impl="reference")
    for part, truth in zip(ops.ppo_kl_gaussian_loss_and_grads(inputs, coefficients, impl=impl), expected, strict=True):
        for got, wanted in zip(part, truth, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    # Five [B, D] arrays and six [B] ones are read or written, of four bytes each.
    benchmark.extra_info.update(impl=impl, rows=rows, dims=DIMS, least_bytes=4 * rows * (5 * DIMS + 6))
    benchmark(ops.ppo_kl_gaussian_loss_and_grads, inputs, coefficients, impl=impl)
