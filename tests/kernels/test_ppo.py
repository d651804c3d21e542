"""The loss without a prior equals the fused ones' definition at kl_coef=0, on the same log-probabilities."""

import pytest
import torch
from torch.distributions import Categorical

from lago_fast import ops


def draw(rows=9, actions=4):
    torch.manual_seed(0)
    logits = torch.randn(rows, actions, dtype=torch.float64)
    chosen = torch.randint(actions, (rows,))
    old, values, advantages, returns, old_values = torch.randn(5, rows, dtype=torch.float64)
    old_log_prob = Categorical(logits=logits).log_prob(chosen) + 0.3 * old
    weight = (torch.arange(rows) % 4 != 3).double()
    return logits, values, chosen, (old_log_prob, advantages, returns, old_values, weight)


@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("clip_range_vf", [None, 0.3])
def test_it_is_the_categorical_loss_without_its_kl(normalize_advantage, clip_range_vf):
    logits, values, chosen, rest = draw()
    shared = {"clip_range": 0.2, "ent_coef": 0.05, "vf_coef": 0.5, "clip_range_vf": clip_range_vf}
    c = {k: None if v is None else torch.tensor(v, dtype=torch.float64) for k, v in shared.items()}
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    full = ops.CategoricalCoefficients(**c, kl_coef=zero, prior_temperature=one)
    inputs = ops.CategoricalInputs(logits, values, chosen, *rest, torch.zeros_like(logits))
    expected, grads = ops.ppo_kl_categorical_loss_and_grads(
        inputs, full, normalize_advantage=normalize_advantage, impl="reference"
    )
    leaf = logits.clone().requires_grad_()
    policy = Categorical(logits=leaf)
    log_prob, entropy = policy.log_prob(chosen), policy.entropy()
    out, own = ops.ppo_loss_and_grads(
        ops.PPOInputs(log_prob, entropy, values, *rest),
        ops.PPOCoefficients(**c),
        normalize_advantage=normalize_advantage,
    )
    torch.autograd.backward([log_prob, entropy], [own.log_prob, own.entropy])
    torch.testing.assert_close(leaf.grad, grads.logits)
    torch.testing.assert_close(own.values, grads.values)
    for name in set(out._fields) - {"prior_kl"}:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name))
    assert out.prior_kl == 0
