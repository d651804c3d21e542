"""Heads sample what stable-baselines3's distributions describe."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from lago_fast.algorithms.heads import GaussianHead, PolicysOwnHead, make_head
from lago_fast.buffers import RolloutBatch
from lago_fast.errors import PriorMismatch
from lago_fast.priors.base import PriorOutput

OBS = spaces.Box(-1, 1, (3,), np.float32)


def policy(space, **options):
    torch.manual_seed(0)
    return ActorCriticPolicy(OBS, space, lambda _: 1e-3, **options)


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(5)])
@pytest.mark.parametrize("share", [True, False])
def test_log_probs_and_values_are_those_of_the_policy(space, share):
    actor_critic = policy(space, share_features_extractor=share)
    head = make_head(actor_critic)
    obs = torch.randn(64, 3)
    with torch.no_grad():
        outputs, values = head.forward(obs)
        actions, log_prob = head.sample(outputs)
        expected_values, expected_log_prob, _ = actor_critic.evaluate_actions(obs, actions)
    torch.testing.assert_close(values, expected_values.flatten())
    torch.testing.assert_close(log_prob, expected_log_prob)


def test_gaussian_samples_have_the_std():
    head = make_head(policy(spaces.Box(-1, 1, (2,), np.float32)))
    torch.manual_seed(0)
    actions, _ = head.sample((torch.ones(20_000, 2), torch.tensor([-1.0, 0.0])))
    torch.testing.assert_close(actions.std(0), torch.tensor([-1.0, 0.0]).exp(), rtol=0.03, atol=0)
    torch.testing.assert_close(actions.mean(0), torch.ones(2), rtol=0, atol=0.03)


def test_an_answer_of_the_other_kind_is_refused():
    gaussian, categorical = (make_head(policy(s)) for s in (spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)))
    with pytest.raises(PriorMismatch, match="mean"):
        gaussian.prior_outputs(PriorOutput(log_probs=torch.zeros(1, 2)))
    with pytest.raises(PriorMismatch, match="log_probs"):
        categorical.prior_outputs(PriorOutput(mean=torch.zeros(1, 2), log_std=torch.zeros(1, 2)))


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3])])
def test_a_policy_without_a_closed_kl_speaks_for_itself(space):
    actor_critic = policy(space)
    head = make_head(actor_critic)
    assert isinstance(head, PolicysOwnHead)
    with torch.no_grad():
        acted = head.act(torch.randn(6, 3))
    assert acted.actions.shape == (6, *space.shape)
    assert acted.values.shape == acted.log_prob.shape == (6,)


class Scaled(ActorCriticPolicy):
    """A policy class whose own method decides what is done."""

    def forward(self, obs, deterministic=False):
        return super().forward(2 * obs, deterministic)


def test_an_overridden_policy_is_not_passed_over():
    space = spaces.Box(-1, 1, (2,), np.float32)
    assert isinstance(make_head(policy(space)), GaussianHead)
    assert isinstance(make_head(policy(space, use_sde=True)), PolicysOwnHead)
    assert isinstance(make_head(Scaled(OBS, space, lambda _: 1e-3)), PolicysOwnHead)


def minibatch(space, rows):
    """Return a minibatch of any observations, with a prior for each."""
    discrete = isinstance(space, spaces.Discrete)
    prior = (torch.zeros(rows, 5),) if discrete else (torch.zeros(rows, 2), torch.zeros(rows, 2))
    return RolloutBatch(
        observations=torch.randn(rows, 3),
        actions=torch.randint(5, (rows,)) if discrete else torch.randn(rows, 2),
        **{name: torch.randn(rows) for name in ("old_values", "old_log_prob", "advantages", "returns")},
        weight=torch.ones(rows),
        prior=prior,
    )


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(5)])
def test_a_loss_overwrites_what_it_returned_for_as_many_rows(space):
    torch.manual_seed(0)
    head = make_head(policy(space))
    numbers = {"clip_range": 0.2, "ent_coef": 0.01, "vf_coef": 0.5, "kl_coef": 0.3, "prior_temperature": 1.0}
    coefficients = {name: torch.tensor(value) for name, value in numbers.items()}

    def loss_of(batch, own_head=head):
        return own_head.loss_and_grads(*own_head.evaluate(batch), batch, coefficients, impl="auto")

    batches = [minibatch(space, rows) for rows in (16, 16, 7)]
    first, second, of_fewer = (loss_of(batch) for batch in batches)
    assert all(a is b for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))
    for got, batch in ((second, batches[1]), (of_fewer, batches[2])):
        expected = loss_of(batch, make_head(head.policy))
        assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True))
