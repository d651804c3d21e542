"""Which actions a prior proposes in a state, and how a Q function chooses among them.

A prior's answer is a row of log-probabilities, -inf where an action is excluded or padding. k proposals are k draws
from it with replacement. An action drawn twice is one proposal of twice the weight: only so does softmax(Q / alpha)
over the draws tend to p(a) exp(Q(a) / alpha) as k grows. A prior that samples completions answers with their
frequencies, which are these weights already: its proposals are its answer as it stands, and are not drawn again.
Source: arXiv 2410.07927. Test: pytest tests/algorithms/test_proposals.py
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor

from lago_fast.errors import UnsupportedArgument

RARE = 0.5  # probability of being proposed below which an action is not chosen deterministically


def check_alpha(alpha: float) -> None:
    """Raise UnsupportedArgument unless the temperature of the posterior is above 0."""
    if not 0 < alpha < float("inf"):
        raise UnsupportedArgument(f"alpha={alpha}: give a number above 0; a small one is nearly greedy")


def draws_of(prior: Any, k: int | None) -> int | None:
    """Return how many draws are made from a prior's answers; None: each answer is taken as it stands.

    Args:
        prior: None proposes every admissible action. One whose answer consists of samples says how many in its
            attribute `k`, itself or as the `inner` one behind a cache.
        k: draws asked for; None: the whole answer.

    Raises:
        UnsupportedArgument: k is below 1, or not the number of samples of a prior that samples by itself.
    """
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise UnsupportedArgument(f"k={k}: give a number of proposals from 1 on, or None for all of them")
    samples, asked = None, prior
    while asked is not None and samples is None:
        samples, asked = getattr(asked, "k", None), getattr(asked, "inner", None)
    if samples is not None and k not in (None, samples):
        raise UnsupportedArgument(
            f"k={k}: this prior answers with {samples} samples of its own; pass k={samples}, or another prior"
        )
    return None if prior is None or samples is not None else k


def draw(weights: Tensor, k: int, generator: Generator | None = None) -> Tensor:
    """Return k indices [B, k] int64 drawn with replacement in proportion to each row of `weights` [B, A].

    A row of zeros gets index 0.
    """
    reached = weights.double().cumsum(dim=1)
    uniform = 1 - torch.rand(len(weights), k, dtype=torch.float64, generator=generator)  # in (0, 1]
    # the first index that reaches a number above 0 has a weight above 0
    return torch.searchsorted(reached, uniform * reached[:, -1:])


def propose(log_probs: Tensor, k: int | None, generator: Generator | None = None) -> Tensor:
    """Return the log-weights [B, A] of the actions proposed, -inf where an action is not.

    Args:
        log_probs: [B, A], a prior's answer; a row of -inf alone proposes nothing.
        k: draws, an action's weight is its share of them; None: everything above -inf, weighted by the prior.
    """
    if k is None or log_probs.numel() == 0:
        return log_probs
    drawn = draw(log_probs.exp(), k, generator)
    count = torch.zeros_like(log_probs).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=log_probs.dtype))
    return (count / k).log().masked_fill(log_probs == -torch.inf, -torch.inf)


def typical(log_probs: Tensor, k: int | None) -> Tensor:
    """Return the log-weights [B, A] of the actions that k draws hold more often than not, and of the likeliest one.

    What is chosen deterministically is chosen among these: of an action that is hardly ever proposed, Q was hardly
    ever corrected.

    Args:
        log_probs: [B, A], a prior's answer.
        k: draws; None: the whole answer.
    """
    if k is None or log_probs.numel() == 0:
        return log_probs
    missed = k * torch.log1p(-log_probs.exp().clamp(max=1))  # log-probability that no draw is the action
    rare = (missed > math.log(1 - RARE)).scatter(1, log_probs.argmax(dim=1, keepdim=True), False)
    return log_probs.masked_fill(rare, -torch.inf)


def posterior(q: Tensor, log_weights: Tensor, alpha: float) -> Tensor:
    """Return log-probabilities [B, A] of p(a) exp(Q(a) / alpha), normalised over the actions proposed.

    Args:
        q: [B, A]; not read where nothing is proposed.
        log_weights: [B, A], -inf where an action is not proposed.
        alpha: temperature, above 0.
    """
    # in double and below 0: a large Q over a small alpha would be infinite
    known = q.double().masked_fill(log_weights == -torch.inf, -torch.inf)
    gaps = known - known.amax(dim=1, keepdim=True)
    return (gaps / alpha + log_weights).log_softmax(dim=1).to(log_weights.dtype)


def greedy(q: Tensor, log_weights: Tensor) -> Tensor:
    """Return the index [B] of the best of the actions proposed, the first of equals."""
    return q.masked_fill(log_weights == -torch.inf, -torch.inf).argmax(dim=1)
