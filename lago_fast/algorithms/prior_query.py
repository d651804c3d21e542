"""Asking a prior about a whole rollout, once.

Test: pytest tests/algorithms/test_fast_kl_ppo.py tests/algorithms/test_micro_batches.py
"""

import torch
from torch import Tensor

from lago_fast.algorithms.heads import CategoricalHead, GaussianHead, TextHead
from lago_fast.algorithms.micro_batches import Halving
from lago_fast.algorithms.numbers import check_rollout
from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import PriorMismatch
from lago_fast.priors.base import ActionPrior, PriorOutput


def states_of(prior: ActionPrior, head: GaussianHead | CategoricalHead, observations: Tensor) -> Tensor:
    """Return what the prior reads of observations [B, ...], in its dtype: float32, and ids of texts as they are."""
    states = observations.flatten(1)[:, : prior.state_dim]
    return states if isinstance(head, TextHead) else states.float()


def said_of(head: GaussianHead | CategoricalHead, answer: PriorOutput, rows: int) -> tuple[Tensor, ...]:
    """Return a prior's answer about some rows as the head reads it, and its trust last where it has one.

    Raises:
        PriorMismatch: the answer is of another kind, shape or range than the policy's head reads.
    """
    if not isinstance(answer, PriorOutput):
        raise PriorMismatch(f"prior: query() returned a {type(answer).__name__}; return a lago_fast.priors.PriorOutput")
    width, of_all = head.action_dim, (head.action_dim,)
    for part, shapes in (
        (answer.log_probs, [(rows, width)]),
        (answer.mean, [(rows, width)]),
        (answer.log_std, [(rows, width), of_all]),
        (answer.trust, [(rows,)]),
    ):
        if part is not None and not (isinstance(part, Tensor) and part.shape in shapes):
            found = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise PriorMismatch(
                f"prior: query() answered {rows} rows with {found}; the policy reads a tensor of {shapes[0]}"
            )
    if answer.trust is not None and not bool(((answer.trust >= 0) & (answer.trust <= 1)).all()):
        raise PriorMismatch("prior: query() returned a trust that is NaN or outside of 0 to 1")
    return (*head.prior_outputs(answer), *(() if answer.trust is None else (answer.trust,)))


def query_prior(
    prior: ActionPrior, buffer: RolloutBuffer, head: GaussianHead | CategoricalHead, ids: Tensor, halving: Halving
) -> None:
    """Store what the prior says of every collected step, and how far it is to be trusted there.

    Args:
        prior: asked once, or in parts where its memory does not suffice.
        buffer: whose observations begin with the raw states.
        head: of the policy.
        ids: the prior's id of each of the env's instructions, [M] int64.
        halving: how many rows it is asked at once.

    Raises:
        NonFiniteError: NaN or infinity in the answer; a log-probability may be minus infinity.
        PriorMismatch: an answer of another kind than the policy's.
    """
    assert isinstance(buffer.observations, Tensor)
    states = states_of(prior, head, buffer.observations.flatten(0, 1))
    of_the_prior = ids[buffer.instruction_id.flatten()]

    def ask(at_once: int) -> list[Tensor]:
        rows = zip(states.split(at_once), of_the_prior.split(at_once), strict=True)
        parts = [said_of(head, prior.query(*row), len(row[0])) for row in rows]
        return [torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)]

    lowest = torch.finfo(torch.float32).min if head.kind == "categorical" else -torch.inf
    checked = {}
    said = halving(ask, len(states))
    trust = said[len(buffer.prior_outputs) :]
    buffer.trust = trust[0].reshape(buffer.values.shape) if trust else None
    for i, (column, output) in enumerate(zip(buffer.prior_outputs, said, strict=False)):
        column.copy_(output.reshape(column.shape))
        checked[f"answer {i} of the prior in the state"] = column.clamp(min=lowest)
    check_rollout(checked, "check the prior's files with `lago info`, or fit it again")


def check_support(log_probs: Tensor) -> None:
    """Raise PriorMismatch where log-probabilities [T, N, A] give an action no chance: KL(policy || prior) is infinite.

    A policy over actions that are never masked gives each of them some.
    """
    impossible = log_probs == -torch.inf
    if bool(impossible.any()):
        t, env, action = impossible.nonzero()[0].tolist()
        raise PriorMismatch(
            f"prior: in the state of env {env} at step {t} of this rollout action {action} has probability 0, from "
            "which KL(policy || prior) is infinite; mix some of a uniform distribution in, or use "
            "kl_direction='prior_policy'"
        )
