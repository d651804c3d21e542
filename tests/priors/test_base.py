"""The contract's helpers: exact KL, refusals, instructions matched by their text."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from lago_fast.errors import NonFiniteError, PriorMismatch, TrainablePrior
from lago_fast.priors.base import (
    PriorOutput,
    check_frozen,
    check_query,
    match_instructions,
    prior_kl,
)


class Fixed(nn.Module):
    """A prior that answers nothing: enough for the helpers."""

    kind, state_dim, action_dim, digest = "gaussian", 3, 2, "none"

    def __init__(self) -> None:
        super().__init__()
        self.instructions = ["open the drawer", "push the button"]
        self.weight = nn.Parameter(torch.zeros(5))


def test_prior_kl_of_gaussians_is_torchs():
    mean_p, mean_q, log_std_p, log_std_q = 0.5 * torch.randn(4, 7, 3)
    ours = prior_kl(PriorOutput(mean=mean_p, log_std=log_std_p), PriorOutput(mean=mean_q, log_std=log_std_q))
    p, q = (Independent(Normal(m, s.exp()), 1) for m, s in ((mean_p, log_std_p), (mean_q, log_std_q)))
    torch.testing.assert_close(ours, kl_divergence(p, q), rtol=1e-5, atol=1e-5)


def test_prior_kl_of_categoricals_is_torchs_and_takes_impossible_actions():
    p, q = torch.randn(2, 7, 5).log_softmax(-1)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(
        prior_kl(PriorOutput(log_probs=p), PriorOutput(log_probs=q)), expected, rtol=1e-5, atol=1e-5
    )
    impossible, even = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.5, 0.5]]).log()
    assert prior_kl(PriorOutput(log_probs=impossible), PriorOutput(log_probs=even)).item() == pytest.approx(0.6931472)


def test_prior_kl_refuses_to_mix_kinds():
    gaussian = PriorOutput(mean=torch.zeros(1, 2), log_std=torch.zeros(1, 2))
    with pytest.raises(PriorMismatch, match="compare priors of one kind"):
        prior_kl(gaussian, PriorOutput(log_probs=torch.zeros(1, 1)))


def test_a_trainable_prior_is_refused():
    prior = Fixed()
    with pytest.raises(TrainablePrior, match=r"5 of its parameters.*requires_grad_\(False\)"):
        check_frozen(prior)
    check_frozen(prior.requires_grad_(False))


def test_instructions_are_matched_by_text():
    assert match_instructions(Fixed(), ["push the button", "open the drawer", "push the button"]).tolist() == [1, 0, 1]
    with pytest.raises(PriorMismatch, match=r"'wash the car'.*extend_instructions"):
        match_instructions(Fixed(), ["push the button", "wash the car"])


@pytest.mark.parametrize(
    ("state", "ids", "error", "says"),
    [
        (torch.zeros(2, 4), [0, 0], PriorMismatch, "rows of 3"),
        (torch.zeros(3), [0, 0, 0], PriorMismatch, "rows of 3"),
        (torch.zeros(2, 3), [0], PriorMismatch, "one id per state"),
        (torch.zeros(2, 3), [0, 2], PriorMismatch, r"outside of 0\.\.1"),
        (torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.nan, 0.0]]), [0, 1], NonFiniteError, "first: row 1"),
    ],
)
def test_a_query_that_cannot_be_answered_is_refused(state, ids, error, says):
    with pytest.raises(error, match=says):
        check_query(Fixed(), state, torch.tensor(ids))
