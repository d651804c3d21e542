"""The Gaussian loss against hand-computed numbers, torch.distributions, and float64 gradients."""

import math

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.ppo_kl_gaussian.reference import Coefficients, Inputs, ppo_kl_gaussian

COEFFICIENTS = {"clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "kl_coef": 0.3, "prior_temperature": 1.0}


def coefficients(dtype=torch.float64, **changes) -> Coefficients:
    values = {**COEFFICIENTS, **changes}
    return Coefficients(**{k: None if v is None else torch.tensor(v, dtype=dtype) for k, v in values.items()})


def random_inputs(rows=7, dims=3, dtype=torch.float64, seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean, log_std = normal(rows, dims), 0.3 * normal(dims) - 0.5
    actions = mean + log_std.exp() * normal(rows, dims)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    weight = (torch.arange(rows) % 4 != 3).double()
    inputs = Inputs(
        mean,
        log_std,
        normal(rows),
        actions,
        log_prob + 0.3 * normal(rows),
        normal(rows),
        normal(rows),
        normal(rows),
        weight,
        normal(rows, dims),
        0.2 * normal(rows, dims) - 1,
    )
    return Inputs(*(None if t is None else t.to(dtype) for t in inputs))


def test_hand_computed():
    # Two rows, one dimension, sigma = 1, actions at the mean, so log_prob = -log(2 pi) / 2.
    # old_log_prob is lower by log 1.5 in row 0 and equal in row 1: ratios 1.5 and 1.
    base = -0.5 * math.log(2 * math.pi)
    inputs = Inputs(
        mean=torch.tensor([[0.0], [1.0]]),
        log_std=torch.tensor([0.0]),
        values=torch.tensor([1.0, 2.0]),
        actions=torch.tensor([[0.0], [1.0]]),
        old_log_prob=torch.tensor([base - math.log(1.5), base]),
        advantages=torch.tensor([2.0, -1.0]),
        returns=torch.tensor([0.0, 4.0]),
        old_values=torch.tensor([0.0, 0.0]),
        weight=torch.ones(2),
        prior_mean=torch.tensor([[0.5], [1.0]]),
        prior_log_std=torch.tensor([math.log(2.0)]),
    )
    out = ppo_kl_gaussian(inputs, coefficients(torch.float32), normalize_advantage=False)
    # row 0: min(2 * 1.5, 2 * 1.2) = 2.4; row 1: -1; mean 0.7
    assert out.policy_loss.item() == pytest.approx(-0.7, abs=1e-6)
    # the mean of 1 and 4
    assert out.value_loss.item() == pytest.approx(2.5, abs=1e-6)
    # of a standard normal
    assert out.entropy.item() == pytest.approx(0.5 + 0.5 * math.log(2 * math.pi), abs=1e-6)
    # log 2 + (1 + d^2) / 8 - 1/2 with d = 0.5 and 0: mean log 2 + (1.25 + 1) / 16 - 1/2
    kl = math.log(2) + 2.25 / 16 - 0.5
    assert out.prior_kl.item() == pytest.approx(kl, abs=1e-6)
    # k3: (1.5 - 1) - log 1.5 in row 0, 0 in row 1
    assert out.approx_kl.item() == pytest.approx((0.5 - math.log(1.5)) / 2, abs=1e-6)
    assert out.clip_fraction.item() == pytest.approx(0.5)
    total = -0.7 + 0.5 * 2.5 - 0.01 * out.entropy.item() + 0.3 * kl
    assert out.loss.item() == pytest.approx(total, abs=1e-6)

    # row 0's KL counts for 2, row 1's for a half; prior_kl stays what it is
    weighed = inputs._replace(kl_weight=torch.tensor([2.0, 0.5]))
    out = ppo_kl_gaussian(weighed, coefficients(torch.float32), normalize_advantage=False)
    assert out.prior_kl.item() == pytest.approx(kl, abs=1e-6)
    weighted_kl = (2 * (math.log(2) + 1.25 / 8 - 0.5) + 0.5 * (math.log(2) + 1 / 8 - 0.5)) / 2
    assert out.loss.item() == pytest.approx(total - 0.3 * kl + 0.3 * weighted_kl, abs=1e-6)
    # of the entropy nothing; z = 0; d KL / dm = d / 4 of row 0 alone, over two rows
    grads = ops.ppo_kl_gaussian_loss_and_grads(
        weighed, coefficients(torch.float32), normalize_advantage=False, impl="reference"
    )[1]
    torch.testing.assert_close(grads.mean, torch.tensor([[0.3 * 2 * -0.5 / 4 / 2], [0.0]]))


def test_hand_computed_clipped_value():
    inputs = random_inputs(rows=1, dims=1)._replace(
        values=torch.tensor([3.0]).double(),
        old_values=torch.tensor([1.0]).double(),
        returns=torch.tensor([2.0]).double(),
        weight=torch.ones(1).double(),
    )
    # the prediction may move by 0.5: 1.5, hence (2 - 1.5)^2
    out = ppo_kl_gaussian(inputs, coefficients(clip_range_vf=0.5))
    assert out.value_loss.item() == pytest.approx(0.25)


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
def test_prior_kl_is_that_of_torch_distributions(direction):
    x = random_inputs()._replace(weight=torch.ones(7).double())
    policy = torch.distributions.Normal(x.mean, x.log_std.exp())
    prior = torch.distributions.Normal(x.prior_mean, x.prior_log_std.exp())
    pair = (policy, prior) if direction == "policy_prior" else (prior, policy)
    expected = torch.distributions.kl_divergence(*pair).sum(-1).mean()
    out = ppo_kl_gaussian(x, coefficients(), kl_direction=direction)
    torch.testing.assert_close(out.prior_kl, expected)


def test_temperature_is_the_renormalised_power():
    x = random_inputs()
    tempered = x._replace(prior_log_std=x.prior_log_std + 0.5 * math.log(2.0))
    a = ppo_kl_gaussian(x, coefficients(prior_temperature=2.0)).prior_kl
    torch.testing.assert_close(a, ppo_kl_gaussian(tempered, coefficients()).prior_kl)


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(direction, normalize):
    x = random_inputs()._replace(kl_weight=torch.linspace(0, 2, 7).double())
    leaves = [t.clone().requires_grad_() for t in x[:3]]

    def loss(*leaves):
        return ppo_kl_gaussian(
            Inputs(*leaves, *x[3:]),
            coefficients(clip_range_vf=0.4),
            kl_direction=direction,
            normalize_advantage=normalize,
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("rows", [1, 2, 7, 63])
@pytest.mark.parametrize("dims", [1, 4, 17])
def test_float32_gradients_against_float64(rows, dims):
    truth, true_grads = ops.ppo_kl_gaussian_loss_and_grads(random_inputs(rows, dims), coefficients(), impl="reference")
    out, grads = ops.ppo_kl_gaussian_loss_and_grads(
        random_inputs(rows, dims, torch.float32), coefficients(torch.float32), impl="reference"
    )
    for got, expected in zip((*out, *grads), (*truth, *true_grads), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_invalid_rows_change_nothing():
    x = random_inputs(rows=8)
    keep = x.weight > 0
    fewer = Inputs(*(t[keep] if t is not None and t.shape[:1] == keep.shape else t for t in x))
    a, a_grads = ops.ppo_kl_gaussian_loss_and_grads(x, coefficients(), impl="reference")
    b, b_grads = ops.ppo_kl_gaussian_loss_and_grads(fewer, coefficients(), impl="reference")
    for got, expected in zip(a, b, strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(a_grads.mean[keep], b_grads.mean)
    torch.testing.assert_close(a_grads.log_std, b_grads.log_std)
    assert a_grads.mean[~keep].abs().sum() == 0
    assert a_grads.values[~keep].abs().sum() == 0


def test_all_rows_invalid_is_zero_and_finite():
    x = random_inputs()
    out, grads = ops.ppo_kl_gaussian_loss_and_grads(
        x._replace(weight=torch.zeros(7).double()), coefficients(), impl="reference"
    )
    for tensor in (*out, *grads):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_kl_coefficient_zero_ignores_the_prior():
    x = random_inputs()
    other = x._replace(prior_mean=x.prior_mean + 1)
    a = ops.ppo_kl_gaussian_loss_and_grads(x, coefficients(kl_coef=0.0), impl="reference")[1]
    b = ops.ppo_kl_gaussian_loss_and_grads(other, coefficients(kl_coef=0.0), impl="reference")[1]
    for got, expected in zip(a, b, strict=True):
        assert torch.equal(got, expected)
