"""Asking a prior about a whole rollout, once.

Test: pytest tests/algorithms/test_fast_kl_ppo.py tests/algorithms/test_micro_batches.py
"""

import torch
from torch import Tensor

from lago_fast.algorithms.heads import CategoricalHead, GaussianHead
from lago_fast.algorithms.micro_batches import Halving
from lago_fast.algorithms.numbers import check_rollout
from lago_fast.buffers import RolloutBuffer
from lago_fast.priors.base import ActionPrior


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
    states = buffer.observations.flatten(0, 1).flatten(1)[:, : prior.state_dim]
    of_the_prior = ids[buffer.instruction_id.flatten()]

    def ask(at_once: int) -> list[Tensor]:
        rows = zip(states.split(at_once), of_the_prior.split(at_once), strict=True)
        answers = [prior.query(*row) for row in rows]
        parts = [(*head.prior_outputs(a), *(() if a.trust is None else (a.trust,))) for a in answers]
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
