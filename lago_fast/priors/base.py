"""What a prior is: the contract between stage 1 and the trainers.

A prior reads raw states and an instruction id and answers with a distribution over actions. It owns its
normaliser, and it is frozen before a trainer sees it.
Test: pytest tests/priors/test_base.py
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lago_fast import ops
from lago_fast.errors import NonFiniteError, PriorMismatch, TrainablePrior

Kind = Literal["gaussian", "categorical"]


class PriorOutput(NamedTuple):
    log_probs: Tensor | None = None  # [B, A], normalised
    mean: Tensor | None = None  # [B, D]
    log_std: Tensor | None = None  # [B, D]
    latent: Tensor | None = None  # [B, Z]
    trust: Tensor | None = None  # [B], in [0, 1]


@runtime_checkable
class ActionPrior(Protocol):
    @property
    def kind(self) -> Kind:
        """Return "gaussian" or "categorical"."""
        ...

    @property
    def state_dim(self) -> int:
        """Return S, the width of a raw state."""
        ...

    @property
    def action_dim(self) -> int:
        """Return D of a Gaussian, A of a categorical."""
        ...

    @property
    def instructions(self) -> list[str]:
        """Return the texts that an instruction id indexes."""
        ...

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that can change an answer."""
        ...

    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Answer for raw states [B, S] float32 and instruction ids [B] int64, without gradients."""
        ...

    def instruction_table(self) -> Tensor:
        """Return the instruction latents [M, Z] float32, each of length 1."""
        ...

    def telemetry(self) -> dict[str, float]:
        """Return the figures to log that were gathered since the last call."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return every parameter; none may require a gradient once a trainer has the prior."""
        ...


@runtime_checkable
class LearningPrior(Protocol):
    """A prior that learns while it answers: a checkpoint of a training run must hold what it has learnt."""

    def learnt(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON-able figures from which `take_back` makes the prior what it is now."""
        ...

    def take_back(self, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Become what `learnt` was asked of; raise PriorMismatch when that was another prior."""
        ...


def prior_kl(p: PriorOutput, q: PriorOutput) -> Tensor:
    """Return KL(p || q) [B] in nats between two answers of the same kind; differentiable by `p`."""
    if p.log_probs is not None and q.log_probs is not None:
        return ops.prior_kl_categorical(p.log_probs, q.log_probs)
    if p.mean is None or p.log_std is None or q.mean is None or q.log_std is None:
        raise PriorMismatch("p, q: one is categorical and the other Gaussian; compare priors of one kind")
    return ops.prior_kl_gaussian(p.mean, p.log_std, q.mean, q.log_std)


def trust_at(squared: Tensor) -> Tensor:
    """Return the trust at a squared distance, in units of what is fully trusted."""
    return ((1 - squared) / 2).exp().clamp(max=1)


def squared_distance(trust: Tensor) -> Tensor:
    """Return the squared distance of which a trust tells; of a trust of 1 the largest such, 1."""
    return 1 - 2 * trust.log()


def check_frozen(prior: ActionPrior) -> None:
    """Raise TrainablePrior when any parameter of `prior` requires a gradient."""
    trainable = sum(p.numel() for p in prior.parameters() if p.requires_grad)
    if trainable:
        raise TrainablePrior(
            f"prior: {trainable:,} of its parameters require a gradient; stage 2 needs a frozen prior: "
            "call prior.requires_grad_(False), or load the one that fit_prior saved"
        )


def match_instructions(prior: ActionPrior, instructions: Sequence[str]) -> Tensor:
    """Return for each text in `instructions` its id in the prior, int64 [len(instructions)].

    Raises PriorMismatch when the prior does not know one of the texts.
    """
    index = {text: i for i, text in enumerate(prior.instructions)}
    missing = [text for text in instructions if text not in index]
    if missing:
        shown = ", ".join(repr(text) for text in missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise PriorMismatch(
            f"instructions: the prior does not know {len(missing)} of the environment's texts ({shown}); "
            "add them with prior.extend_instructions(texts), or fit the prior on these tasks"
        )
    return torch.tensor([index[text] for text in instructions], dtype=torch.int64)


def check_query(prior: ActionPrior, state: Tensor, instruction_id: Tensor) -> None:
    """Raise PriorMismatch or NonFiniteError when a query's arguments cannot be answered."""
    if state.ndim != 2 or state.shape[1] != prior.state_dim:
        raise PriorMismatch(
            f"state: shape {tuple(state.shape)}, but the prior was fitted on rows of {prior.state_dim}; "
            "give it the raw state columns only, or fit a prior for this environment"
        )
    if instruction_id.shape != state.shape[:1]:
        raise PriorMismatch(f"instruction_id: shape {tuple(instruction_id.shape)}; give one id per state, {len(state)}")
    if len(state) and not 0 <= int(instruction_id.min()) <= int(instruction_id.max()) < len(prior.instructions):
        raise PriorMismatch(
            f"instruction_id: outside of 0..{len(prior.instructions) - 1}; "
            "map the environment's ids with match_instructions, or add texts with extend_instructions"
        )
    if not bool(torch.isfinite(state).all()):
        rows = (~torch.isfinite(state).all(dim=1)).nonzero().flatten()
        raise NonFiniteError(
            f"state: NaN or infinity in {len(rows)} of {len(state)} rows (first: row {int(rows[0])}); "
            "a prior cannot answer for it: look at the environment that produced this observation"
        )
