"""The categorical loss against hand-computed numbers, torch.distributions, and float64 gradients."""

import math

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.ppo_kl_categorical.reference import Coefficients, Inputs, ppo_kl_categorical

COEFFICIENTS = {"clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "kl_coef": 0.3, "prior_temperature": 1.0}


def coefficients(dtype=torch.float64, **changes) -> Coefficients:
    values = {**COEFFICIENTS, **changes}
    return Coefficients(**{k: None if v is None else torch.tensor(v, dtype=dtype) for k, v in values.items()})


def random_inputs(rows=7, actions=5, dtype=torch.float64, seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(rows, actions)
    chosen = torch.randint(actions, (rows,), generator=generator)
    log_prob = logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
    weight = (torch.arange(rows) % 4 != 3).double()
    floats = (
        logits,
        normal(rows),
        log_prob + 0.3 * normal(rows),
        normal(rows),
        normal(rows),
        normal(rows),
        weight,
        normal(rows, actions).log_softmax(-1),
    )
    logits, values, old_log_prob, advantages, returns, old_values, weight, prior = (t.to(dtype) for t in floats)
    return Inputs(logits, values, chosen, old_log_prob, advantages, returns, old_values, weight, prior)


def test_hand_computed():
    # probabilities (3/4, 1/4) in both rows; the prior is uniform; ratios 1.5 and 1
    logits = torch.tensor([[math.log(3.0), 0.0]] * 2)
    inputs = Inputs(
        logits=logits,
        values=torch.tensor([1.0, 2.0]),
        actions=torch.tensor([0, 1]),
        old_log_prob=torch.tensor([math.log(0.5), math.log(0.25)]),
        advantages=torch.tensor([2.0, -1.0]),
        returns=torch.tensor([0.0, 4.0]),
        old_values=torch.zeros(2),
        weight=torch.ones(2),
        prior_log_probs=torch.full((2, 2), math.log(0.5)),
    )
    out = ppo_kl_categorical(inputs, coefficients(torch.float32), normalize_advantage=False)
    assert out.policy_loss.item() == pytest.approx(-0.7, abs=1e-6)  # (min(3, 2.4) - 1) / 2
    assert out.value_loss.item() == pytest.approx(2.5, abs=1e-6)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert out.entropy.item() == pytest.approx(entropy, abs=1e-6)
    kl = math.log(2) - entropy  # against the uniform distribution
    assert out.prior_kl.item() == pytest.approx(kl, abs=1e-6)
    assert out.approx_kl.item() == pytest.approx((0.5 - math.log(1.5)) / 2, abs=1e-6)
    assert out.clip_fraction.item() == pytest.approx(0.5)
    assert out.loss.item() == pytest.approx(-0.7 + 0.5 * 2.5 - 0.01 * entropy + 0.3 * kl, abs=1e-6)

    # row 0's KL counts for 2, row 1's for a half: 1.25 on average; prior_kl stays what it is
    weighed = inputs._replace(kl_weight=torch.tensor([2.0, 0.5]))
    out = ppo_kl_categorical(weighed, coefficients(torch.float32), normalize_advantage=False)
    assert out.prior_kl.item() == pytest.approx(kl, abs=1e-6)
    assert out.loss.item() == pytest.approx(-0.7 + 0.5 * 2.5 - 0.01 * entropy + 0.3 * 1.25 * kl, abs=1e-6)
    # row 0's surrogate is clipped: what is left is q (l + H) of the entropy and q (l - log p - KL) of the KL
    grads = ops.ppo_kl_categorical_loss_and_grads(
        weighed, coefficients(torch.float32), normalize_advantage=False, impl="reference"
    )[1]
    of_entropy = 0.75 * (math.log(0.75) + entropy)
    of_kl = 0.75 * (math.log(0.75) + math.log(2) - kl)
    assert grads.logits[0, 0].item() == pytest.approx((0.01 * of_entropy + 0.3 * 2 * of_kl) / 2, abs=1e-6)


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
def test_prior_kl_is_that_of_torch_distributions(direction):
    x = random_inputs()._replace(weight=torch.ones(7).double())
    policy = torch.distributions.Categorical(logits=x.logits)
    prior = torch.distributions.Categorical(logits=x.prior_log_probs / 1.7)
    pair = (policy, prior) if direction == "policy_prior" else (prior, policy)
    out = ppo_kl_categorical(x, coefficients(prior_temperature=1.7), kl_direction=direction)
    torch.testing.assert_close(out.prior_kl, torch.distributions.kl_divergence(*pair).mean())


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(direction, normalize):
    x = random_inputs()._replace(kl_weight=torch.linspace(0, 2, 7).double())
    leaves = [t.clone().requires_grad_() for t in x[:2]]

    def loss(*leaves):
        return ppo_kl_categorical(
            Inputs(*leaves, *x[2:]),
            coefficients(clip_range_vf=0.4),
            kl_direction=direction,
            normalize_advantage=normalize,
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("rows", [1, 2, 7, 63])
@pytest.mark.parametrize("actions", [2, 5, 40])
def test_float32_gradients_against_float64(rows, actions):
    truth, true_grads = ops.ppo_kl_categorical_loss_and_grads(
        random_inputs(rows, actions), coefficients(), impl="reference"
    )
    out, grads = ops.ppo_kl_categorical_loss_and_grads(
        random_inputs(rows, actions, torch.float32), coefficients(torch.float32), impl="reference"
    )
    for got, expected in zip((*out, *grads), (*truth, *true_grads), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_invalid_rows_change_nothing():
    x = random_inputs(rows=8)
    keep = x.weight > 0
    a, a_grads = ops.ppo_kl_categorical_loss_and_grads(x, coefficients(), impl="reference")
    b, b_grads = ops.ppo_kl_categorical_loss_and_grads(
        Inputs(*(t[keep] for t in x if t is not None)), coefficients(), impl="reference"
    )
    for got, expected in zip(a, b, strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(a_grads.logits[keep], b_grads.logits)
    assert a_grads.logits[~keep].abs().sum() == 0
    assert a_grads.values[~keep].abs().sum() == 0


def test_an_action_the_policy_excludes_adds_nothing():
    x = random_inputs(actions=3)
    masked = x.logits.clone()
    masked[:, 2] = -torch.inf
    out, grads = ops.ppo_kl_categorical_loss_and_grads(
        x._replace(logits=masked, actions=x.actions.clamp(max=1), old_log_prob=torch.zeros(7).double() - 1),
        coefficients(),
        impl="reference",
    )
    left = torch.distributions.Categorical(logits=masked[:, :2])
    expected = (left.probs * (left.logits - x.prior_log_probs[:, :2])).sum(-1)
    torch.testing.assert_close(out.prior_kl, (expected * x.weight).sum() / x.weight.sum())
    assert torch.isfinite(out.loss)
    assert torch.isfinite(grads.logits[:, :2]).all()
