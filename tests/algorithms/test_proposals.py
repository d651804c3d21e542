"""Proposals by hand, and what is refused."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from lago_fast.algorithms.proposals import check_alpha, draw, draws_of, greedy, posterior, propose, typical
from lago_fast.errors import UnsupportedArgument

P = torch.tensor([[0.7, 0.2, 0.1, 0.0]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_certain_action_is_the_only_proposal():
    weights = propose(torch.tensor([[0.0, 1.0, 0.0]]).log(), 5, seeded())
    assert weights.tolist() == [[-math.inf, 0.0, -math.inf]]


def test_an_action_drawn_twice_weighs_twice():
    half = torch.full((4000, 2), 0.5).log()
    drawn = Counter(tuple(row) for row in propose(half, 2, seeded()).exp().tolist())
    assert set(drawn) == {(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)}
    assert drawn[0.5, 0.5] / 4000 == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(4000))
    assert drawn[1.0, 0.0] / 4000 == pytest.approx(0.25, abs=5 * 0.433 / math.sqrt(4000))


def test_draws_have_the_given_frequencies_and_never_an_excluded_action():
    n = 100_000
    found = torch.bincount(draw(P, n, seeded())[0], minlength=4) / n
    assert found[3] == 0
    assert found[:3].tolist() == pytest.approx([0.7, 0.2, 0.1], abs=5 * 0.5 / math.sqrt(n))


def test_an_excluded_action_in_front_or_between_is_never_drawn():
    n = 20_000
    assert set(draw(torch.tensor([[0.0, 1e-30, 0.0, 1.0, 0.0]]), n, seeded()).flatten().tolist()) == {3}


def test_all_are_the_prior_itself():
    log_probs = P.log()
    assert propose(log_probs, None) is log_probs


def test_a_state_without_actions_proposes_nothing():
    assert propose(torch.full((2, 3), -math.inf), 4, seeded()).tolist() == [[-math.inf] * 3] * 2
    assert propose(torch.zeros(2, 0), 4, seeded()).shape == (2, 0)


def test_the_posterior_by_hand():
    found = posterior(torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[0.25, 0.75, 0.0]]).log(), 1.0).exp()
    first = 0.25 * math.e / (0.25 * math.e + 0.75)
    assert found.tolist()[0] == pytest.approx([first, 1 - first, 0.0])
    colder = posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.75]]).log(), 0.5).exp()
    assert colder[0, 0].item() == pytest.approx(0.25 * math.e**2 / (0.25 * math.e**2 + 0.75))


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (2, 2), (5, 3), (10, 4), (None, 4)])
def test_what_draws_hold_more_often_than_not(k, kept):
    """Of two draws 1 - 0.68^2 = 0.54 hold the second action, of five 0.502 the third, of ten 0.52 the last."""
    log_probs = torch.tensor([[0.48, 0.32, 0.13, 0.07]]).log()
    found = typical(log_probs, k)
    assert (found > -math.inf).sum() == kept
    assert found[0, :kept].tolist() == log_probs[0, :kept].tolist()
    assert typical(torch.full((1, 2), -math.inf), k).tolist() == [[-math.inf] * 2]


def test_the_best_is_looked_for_among_the_proposals():
    q = torch.tensor([[3.0, 2.0, 2.0]])
    assert greedy(q, torch.tensor([[-math.inf, -1.0, 0.0]])).tolist() == [1]


def test_whose_draws_they_are():
    density, sampling = SimpleNamespace(), SimpleNamespace(k=7)
    assert draws_of(density, 5) == 5
    assert draws_of(density, None) is None
    # its answer holds its samples' frequencies: to draw from them would lose some
    assert draws_of(sampling, 7) is None
    assert draws_of(sampling, None) is None
    assert draws_of(None, 5) is None
    assert draws_of(SimpleNamespace(inner=sampling), 7) is None
    assert draws_of(SimpleNamespace(inner=density), 5) == 5
    with pytest.raises(UnsupportedArgument, match=r"k=5.*7 samples"):
        draws_of(sampling, 5)


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_k_is_a_number_of_proposals(k):
    with pytest.raises(UnsupportedArgument, match="k="):
        draws_of(SimpleNamespace(), k)


@pytest.mark.parametrize("alpha", [0, -0.1, math.nan, math.inf])
def test_alpha_is_above_zero(alpha):
    with pytest.raises(UnsupportedArgument, match="alpha="):
        check_alpha(alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_q_over_a_small_alpha(dtype):
    q, even = torch.tensor([[0.0, 100.0, 99.0]], dtype=dtype), torch.zeros(1, 3)
    torch.testing.assert_close(posterior(q, even, 1e-3).exp(), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(posterior(q, even, 1e-40).exp(), torch.tensor([[0.0, 1.0, 0.0]]))
