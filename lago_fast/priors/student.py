"""The student network of an amortised prior, its settings, and the KL that it is distilled by.

Test: pytest tests/priors/test_amortised.py
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lago_fast import ops
from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.base import Kind, PriorOutput
from lago_fast.priors.folder import check_choice

Direction = Literal["exact_student", "student_exact"]


LARGEST_NORM = 5.0  # of the gradient of the answers' KL
CENTRES = 256  # taught states from which the student's trust is measured
SLACK = 1e-4  # a learnt trust is never quite 0 or 1, where it could not be learnt any more

# a file that asks for more asks for the machine's memory
MAX_WIDTH, MAX_ROWS = 2**13, 2**26


@dataclass(frozen=True)
class StudentConfig:
    """What the student is, and how it is audited and refitted."""

    hidden: int = 256
    instruction_width: int = 64  # of the projected instruction latent
    direction: Direction = "exact_student"  # of the distilled KL
    audit_rows: int = 128  # rows put to the exact prior ...
    audit_window: int = 8192  # ... out of so many queried
    audit_batch: int = 32  # rows gathered before the exact prior is asked
    refresh: bool = True
    refresh_kl: float = 0.03  # nats; above it, the student learns from the next rows before it answers
    refresh_rows: int = 256  # rows that it then learns from, out of `audit_window`
    refresh_steps: int = 40  # optimiser steps per `refresh_rows` rows
    refresh_lr: float = 5e-4
    fallback_kl: float | None = 0.1  # nats; above it, the exact prior answers until the student is below; None: never
    batch_size: int = 512
    live_rows: int = 16384  # newest audited rows that are kept
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        check_choice("direction", self.direction, ("exact_student", "student_exact"))
        if not 1 <= self.audit_batch <= self.audit_rows <= self.audit_window:
            raise UnsupportedArgument("audit_batch, audit_rows, audit_window: need 1 <= batch <= rows <= window")
        sizes = ("hidden", "instruction_width", "refresh_rows", "refresh_steps", "batch_size", "live_rows")
        if min(getattr(self, name) for name in sizes) < 1:
            raise UnsupportedArgument(f"{', '.join(sizes)}: at least 1")
        if max(self.hidden, self.instruction_width) > MAX_WIDTH or max(self.live_rows, self.audit_window) > MAX_ROWS:
            raise UnsupportedArgument(
                f"hidden, instruction_width: at most {MAX_WIDTH:,}; live_rows, audit_window: at most {MAX_ROWS:,}"
            )
        if self.fallback_kl is not None and self.fallback_kl <= 0:
            raise UnsupportedArgument(f"fallback_kl: {self.fallback_kl}; give positive nats, or None for never")


class Nearness(nn.Module):
    """A trust learnt from another: how near something is to centres, wherever it lies.

    Args:
        width: of what is seen.

    What is far from everything that was taught is far from the centres too: a plain network could say anything there.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = nn.Linear(width, width, bias=False)
        self.centres = nn.Parameter(torch.zeros(CENTRES, width))

    def forward(self, seen: Tensor) -> Tensor:
        """Return the trust [B] in 0..1 of [B, width]: exp((1 - d^2) / 2), at a distance d from the nearest centre."""
        placed = self.place(seen)
        with torch.no_grad():  # gradients of all distances would take longer than all else
            nearest = torch.cdist(placed, self.centres).argmin(dim=1)
        squared = (placed - self.centres[nearest]).square().sum(dim=1)
        return ((1 - squared) / 2).exp().clamp(SLACK, 1 - SLACK)

    @torch.no_grad()
    def start_at(self, seen: Tensor) -> None:
        """Begin with centres in rows [n, width], apart from each other by the distance that is fully trusted."""
        centres = seen[torch.linspace(0, len(seen) - 1, CENTRES).round().long().to(seen.device)]
        apart = torch.cdist(centres, centres)
        nearest = apart.masked_fill(apart == 0, torch.inf).amin(dim=1)
        scale = nearest[nearest.isfinite()].median() if bool(nearest.isfinite().any()) else torch.ones(())
        nn.init.eye_(self.place.weight)
        self.place.weight /= scale
        self.centres.copy_(centres / scale)


class Student(nn.Module):
    """An MLP on a normalised state and a projected instruction latent; a second one says how far to trust it there.

    Args:
        kind: what it answers with.
        state_dim: S.
        action_dim: D of a Gaussian, A of a categorical.
        latent_dim: Z, width of an instruction latent.
        config: widths and seed.
        trusts: learn the exact prior's trust too, without a say in what the answers are.
    """

    def __init__(
        self, kind: Kind, state_dim: int, action_dim: int, latent_dim: int, config: StudentConfig, *, trusts: bool
    ) -> None:
        super().__init__()
        self.kind, self.action_dim = kind, action_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.instruction = nn.Linear(latent_dim, config.instruction_width)
            self.net = nn.Sequential(
                nn.Linear(state_dim + config.instruction_width, config.hidden),
                nn.SiLU(),
                nn.Linear(config.hidden, config.hidden),
                nn.SiLU(),
                nn.Linear(config.hidden, action_dim * (2 if kind == "gaussian" else 1)),
            )
            self.trust = Nearness(state_dim + config.instruction_width) if trusts else None

    def forward(self, normal: Tensor, table: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Return the unclamped, unfloored answer for normalised states [B, S], latents [M, Z] and ids [B]."""
        seen = self.seen(normal, table, instruction_id)
        out, trust = self.net(seen), None if self.trust is None else self.trust(seen.detach())
        if self.kind == "categorical":
            return PriorOutput(log_probs=out.log_softmax(dim=-1), trust=trust)
        mean, log_std = out.chunk(2, dim=-1)
        return PriorOutput(mean=mean, log_std=log_std, trust=trust)

    def seen(self, normal: Tensor, table: Tensor, instruction_id: Tensor) -> Tensor:
        """Return what the networks read for the arguments of `forward`."""
        scale = table.shape[1] ** 0.5
        if len(table) > len(instruction_id):
            text = self.instruction(table[instruction_id] * scale)
        else:  # fewer rows of words than of states
            text = self.instruction(table * scale)[instruction_id]
        return torch.cat([normal, text], dim=-1)

    def step(
        self,
        optimiser: torch.optim.Optimizer,
        answer: PriorOutput,
        exact: PriorOutput,
        low: Tensor,
        high: Tensor,
        direction: Direction,
    ) -> float:
        """Take an optimiser step from its answer towards the exact one, trust and all; return their mean KL in nats."""
        loss = distillation_kl(answer, exact, low, high, direction).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*self.instruction.parameters(), *self.net.parameters()], LARGEST_NORM)
        if answer.trust is not None and exact.trust is not None:
            nn.functional.binary_cross_entropy(answer.trust, exact.trust).backward()
        optimiser.step()
        return float(loss.detach())

    @torch.no_grad()
    def start_at(self, log_std: Tensor) -> None:
        """Let a Gaussian student answer with about this log std [D], whatever the state."""
        last = self.net[-1]
        last.get_parameter("weight")[self.action_dim :] *= 0.01
        last.get_parameter("bias")[self.action_dim :] = log_std


def distillation_kl(
    student: PriorOutput, exact: PriorOutput, low: Tensor, high: Tensor, direction: Direction
) -> Tensor:
    """Return the KL [B] in nats between an exact answer and a student's unclamped one, with gradients.

    Where the exact mean lies on a bound, a student's mean beyond that bound is right once it is clamped.
    """
    towards: ops.Direction = "prior_policy" if direction == "exact_student" else "policy_prior"
    if student.log_probs is not None and exact.log_probs is not None:
        return ops.prior_kl_categorical(student.log_probs, exact.log_probs, kl_direction=towards)
    assert student.mean is not None
    assert student.log_std is not None
    assert exact.mean is not None
    assert exact.log_std is not None
    beyond = ((exact.mean >= high) & (student.mean > high)) | ((exact.mean <= low) & (student.mean < low))
    mean = student.mean.where(~beyond, exact.mean)
    return ops.prior_kl_gaussian(mean, student.log_std, exact.mean, exact.log_std, kl_direction=towards)


def trust_error(student: PriorOutput, exact: PriorOutput) -> float | None:
    """Return how far a student's trust is from the exact one on average; None where there is none."""
    if student.trust is None or exact.trust is None:
        return None
    return float((student.trust - exact.trust).abs().mean())
