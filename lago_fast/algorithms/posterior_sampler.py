"""PosteriorSampler: choosing by any Q among what a language prior proposes, at decision time and without training.

As k grows, its choices tend to the policy pi(a) = p(a) exp(Q(a) / alpha) / Z, which maximises
E[Q] - alpha KL(pi || p).
Source: arXiv 2410.07927 (direct posterior sampling). Test: pytest tests/algorithms/test_posterior_sampler.py
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Generator, Tensor

from lago_fast.algorithms.proposals import check_alpha, draw, draws_of, greedy, posterior, propose, typical
from lago_fast.algorithms.text_states import TextState, check_frozen, playing_rows, prior_answer, rows_of
from lago_fast.errors import NonFiniteError, UnsupportedArgument, check_seed
from lago_fast.priors.text_base import TextActionPrior


@runtime_checkable
class HasQValues(Protocol):
    def q_values(self, state: TextState) -> Tensor:
        """Return Q [B, A] of all admissible actions of B states; what stands where a row is padded is not read."""
        ...


class PosteriorSampler:
    """Draws k proposals from a prior and one of them in proportion to exp(Q / alpha).

    Args:
        prior: frozen; None proposes every admissible action.
        q: a learner (`DQNPrior`, `CQLPrior`), or a function from states to Q [B, A], padded at the end.
        alpha: temperature, in units of Q.
        k: proposals per state; None: all that the prior does not exclude, weighted by it.
        seed: of what is drawn.

    Raises:
        UnsupportedArgument: alpha is not above 0, or k is not a number of proposals.
        TrainablePrior: the prior has a parameter that requires a gradient.
    """

    def __init__(
        self,
        prior: TextActionPrior | None,
        q: HasQValues | Callable[[TextState], Tensor],
        alpha: float = 0.1,
        k: int | None = 5,
        *,
        seed: int | None = None,
    ) -> None:
        check_alpha(alpha)
        check_frozen(prior)
        self.prior, self.alpha, self.draws = prior, alpha, draws_of(prior, k)
        self._q: Callable[[TextState], Tensor] = q.q_values if isinstance(q, HasQValues) else q
        self.generator = Generator()
        if seed is None:
            self.generator.seed()
        else:
            check_seed("seed", seed)
            self.generator.manual_seed(seed)

    @torch.no_grad()
    def predict(self, observation: TextState, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """Return for each of N states the index [N] int64 of an admissible action, and None, as in Stable-Baselines3.

        Args:
            observation: the states; one without actions, of which the episode is over, gets 0, which a text
                environment ignores there and refuses elsewhere.
            deterministic: the posterior's likeliest action, argmax of Q / alpha + log p over what `k` draws from the
                prior hold more often than not.

        Raises:
            UnsupportedArgument: Q has another shape than the admissible actions.
            NonFiniteError: Q of a proposal is NaN or infinite.
        """
        rows = playing_rows(observation)
        choice = np.zeros(len(observation.observation), dtype=np.int64)
        if not len(rows):
            return choice, None
        states = rows_of(observation, rows)
        said, q = prior_answer(self.prior, states), self._q(states)
        if q.shape != said.shape:
            raise UnsupportedArgument(f"q: it returned {tuple(q.shape)} for actions of shape {tuple(said.shape)}")
        weights = typical(said, self.draws) if deterministic else propose(said, self.draws, self.generator)
        if not bool(torch.isfinite(q[weights > -torch.inf]).all()):
            raise NonFiniteError("q: of a proposed action it is NaN or infinite; mend it")
        drawn = greedy(posterior(q, weights, self.alpha), weights) if deterministic else self._draw(q, weights)
        choice[rows] = drawn.numpy()
        return choice, None

    def _draw(self, q: Tensor, weights: Tensor) -> Tensor:
        return draw(posterior(q, weights, self.alpha).exp(), 1, self.generator).squeeze(1)
