"""Posterior sampling tends to the KL-regularised optimum, and refuses what it cannot choose from."""

import itertools
import math

import numpy as np
import pytest
import torch

from lago_fast.algorithms.dqn_prior import DQNPrior
from lago_fast.algorithms.posterior_sampler import PosteriorSampler
from lago_fast.envs.text_env import TextState
from lago_fast.errors import NonFiniteError, UnsupportedArgument
from tests.algorithms.text_fakes import END, UNIFORM, FakeEncoder, FakePrior, state_of

N, ALPHA = 20_000, 0.5
ACTIONS = tuple("abcdef")
WEIGHT = dict(zip(ACTIONS, (0.4, 0.25, 0.2, 0.1, 0.05, 0.0), strict=True))
P = np.array(list(WEIGHT.values()))
Q = np.array([0.0, 0.3, -0.5, 0.8, 1.0, 2.0])
PRIOR = FakePrior(lambda _, action: WEIGHT[action])
OPTIMUM = P * np.exp(Q / ALPHA) / np.sum(P * np.exp(Q / ALPHA))
# of a frequency's distance from its own probabilities: half the sum of A standard deviations
MONTE_CARLO = 0.5 * np.sum(np.sqrt(OPTIMUM * (1 - OPTIMUM) / N))


def q(state):
    return torch.tensor(Q, dtype=torch.float32).expand(len(state.observation), -1)


def frequencies(k: int | None) -> np.ndarray:
    sampler = PosteriorSampler(PRIOR, q, ALPHA, k, seed=0)
    choice, _ = sampler.predict(TextState(["play"] * N, ["here"] * N, [ACTIONS] * N))
    return np.bincount(choice, minlength=len(ACTIONS)) / N


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return 0.5 * float(np.abs(one - other).sum())


def test_it_tends_to_the_regularised_optimum_as_k_grows():
    far = {k: distance(frequencies(k), OPTIMUM) for k in (1, 2, 4, 16, 64, 256)}
    assert far[1] > 0.3
    for fewer, more in itertools.pairwise(far):
        assert far[more] < max(far[fewer], 3 * MONTE_CARLO)
    # a ratio of two means over k draws is off by a term of 1 / k
    assert far[16] < far[1] / 4
    assert far[256] < 3 * MONTE_CARLO


def test_all_weighted_by_the_prior_are_the_optimum_itself():
    assert distance(frequencies(None), OPTIMUM) < 3 * MONTE_CARLO


def test_one_proposal_is_the_prior_and_two_are_as_enumerated():
    assert distance(frequencies(1), P) < 3 * MONTE_CARLO
    pairs = np.zeros(len(P))
    for i, j in itertools.product(range(len(P)), repeat=2):
        first = 1 / (1 + math.exp((Q[j] - Q[i]) / ALPHA))
        pairs[i] += P[i] * P[j] * first
        pairs[j] += P[i] * P[j] * (1 - first)
    assert distance(frequencies(2), pairs) < 3 * MONTE_CARLO


def test_an_excluded_action_is_never_chosen_however_good():
    assert frequencies(None)[5] == 0
    assert frequencies(64)[5] == 0


def test_samples_of_a_prior_are_its_proposals():
    """A prior that answers with 4 samples is asked as it stands: softmax(Q / alpha) over the samples."""
    samples = FakePrior(lambda _, a: {"a": 3.0, "d": 1.0}.get(a, 0.0), k=4)
    sampler = PosteriorSampler(samples, q, ALPHA, 4, seed=0)
    choice, _ = sampler.predict(TextState(["play"] * N, ["here"] * N, [ACTIONS] * N))
    first = 3 * math.exp(Q[0] / ALPHA)
    expected = first / (first + math.exp(Q[3] / ALPHA))
    assert np.mean(choice == 0) == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(N))
    assert set(choice) == {0, 3}


@pytest.mark.parametrize(("k", "best"), [(1, 0), (64, 3), (None, 3)])
def test_deterministic_is_the_mode_of_the_optimum(k, best):
    """Log p + Q / alpha is -0.92, -0.79, -2.61, -0.70, -1.00: the fourth, neither the prior's nor Q's own choice.

    One draw holds it too seldom.
    """
    state = TextState(["play"], ["here"], [ACTIONS])
    assert PosteriorSampler(PRIOR, q, ALPHA, k).predict(state, deterministic=True)[0].tolist() == [best]


def test_a_learner_is_a_q_and_an_ended_episode_gets_zero():
    learner = DQNPrior(None, UNIFORM, FakeEncoder(), seed=0)
    choice, rest = PosteriorSampler(UNIFORM, learner, seed=0).predict(state_of(["hall", END, "roof"]))
    assert rest is None
    assert choice[1] == 0
    assert choice[2] in (0, 1)
    assert PosteriorSampler(UNIFORM, learner, seed=0).predict(state_of([END]))[0].tolist() == [0]


def test_the_same_seed_chooses_the_same():
    assert (frequencies(3) == frequencies(3)).all()


def test_what_is_refused():
    state = TextState(["play"], ["here"], [ACTIONS])
    with pytest.raises(UnsupportedArgument, match="q: it returned"):
        PosteriorSampler(PRIOR, lambda _: torch.zeros(1, 2)).predict(state)
    with pytest.raises(NonFiniteError, match="q: of a proposed action"):
        PosteriorSampler(PRIOR, lambda _: torch.full((1, 6), torch.nan)).predict(state)
    with pytest.raises(UnsupportedArgument, match="alpha="):
        PosteriorSampler(PRIOR, q, 0.0)
    with pytest.raises(UnsupportedArgument, match="seed=-1"):
        PosteriorSampler(PRIOR, q, 1.0, seed=-1)
    with pytest.raises(UnsupportedArgument, match="k=0"):
        PosteriorSampler(PRIOR, q, 1.0, 0)
