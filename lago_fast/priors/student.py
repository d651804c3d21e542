"""The student network of an amortised prior, its settings, and the KL that it is distilled by.

Test: pytest tests/priors/test_amortised.py
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lago_fast import ops
from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import Kind, PriorOutput, squared_distance, trust_at
from lago_fast.priors.folder import check_choice

Direction = Literal["exact_student", "student_exact"]


LARGEST_NORM = 5.0  # of the gradient of the answers' KL
DISTANCE_WIDTH = 64  # of the network that learns the exact prior's trust
BEYOND = 10.0  # squared distance of one standard deviation beyond all taught states

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


class Distance(nn.Module):
    """What a learnt trust is reckoned by: the squared distance from the demonstrations, as the exact prior has it.

    Args:
        state_dim: S.
        width: of what is seen, the normalised state first.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(width, DISTANCE_WIDTH), nn.SiLU(), nn.Linear(DISTANCE_WIDTH, DISTANCE_WIDTH), nn.SiLU()),
            *(nn.Linear(DISTANCE_WIDTH, 1), nn.Softplus(), nn.Flatten(0)),
        )
        self.register_buffer("lowest", torch.full((state_dim,), -torch.inf))
        self.register_buffer("highest", torch.full((state_dim,), torch.inf))

    def forward(self, seen: Tensor) -> Tensor:
        """Return the squared distances [B] of [B, width]; the unit is what is fully trusted."""
        normal = seen[:, : len(self.lowest)]
        # a network could say anything of what is beyond all that it was taught
        beyond = (normal - self.highest).clamp(min=0) + (self.lowest - normal).clamp(min=0)
        return self.net(seen) + BEYOND * beyond.square().sum(dim=1)

    def take_range(self, normal: Tensor) -> None:
        """Note between which numbers normalised states [n, S] lie that it will be taught."""
        self.lowest.copy_(normal.amin(dim=0))
        self.highest.copy_(normal.amax(dim=0))


def check_fit(*, epochs: int, noisy_copies: int, val_fraction: float = 0.1) -> None:
    """Raise UnsupportedArgument for what a student cannot be taught by."""
    if not 0 < val_fraction < 1 or epochs < 1 or noisy_copies < 0:
        raise UnsupportedArgument(
            f"student: epochs={epochs}, at least 1; noisy_copies={noisy_copies}, 0 or more; "
            f"val_fraction={val_fraction}, between 0 and 1"
        )


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
            self.distance = Distance(state_dim, state_dim + config.instruction_width) if trusts else None

    def forward(self, normal: Tensor, table: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Return the unclamped, unfloored answer for normalised states [B, S], latents [M, Z] and ids [B]."""
        seen = self.seen(normal, table, instruction_id)
        trust = None if self.distance is None else trust_at(self.distance(seen))
        return self.answer(seen)._replace(trust=trust)

    def answer(self, seen: Tensor) -> PriorOutput:
        """Return the answer alone, for what `seen` returns."""
        out = self.net(seen)
        if self.kind == "categorical":
            return PriorOutput(log_probs=out.log_softmax(dim=-1))
        mean, log_std = out.chunk(2, dim=-1)
        return PriorOutput(mean=mean, log_std=log_std)

    def seen(self, normal: Tensor, table: Tensor, instruction_id: Tensor) -> Tensor:
        """Return what the networks read for the arguments of `forward`."""
        if len(table) > len(instruction_id):
            text = self.words(table[instruction_id])
        else:  # fewer rows of words than of states
            # an index's gradient is added up by several threads in any order, an embedding's is not
            text = nn.functional.embedding(instruction_id, self.words(table))
        return torch.cat([normal, text], dim=-1)

    def words(self, latents: Tensor) -> Tensor:
        """Return what it makes of instruction latents [M, Z], [M, instruction_width]: what tells actions apart."""
        return self.instruction(latents * latents.shape[1] ** 0.5)

    def step(
        self,
        optimiser: torch.optim.Optimizer,
        seen: Tensor,
        exact: PriorOutput,
        low: Tensor,
        high: Tensor,
        direction: Direction,
    ) -> float:
        """Take an optimiser step towards the exact answer, trust and all, for what `seen` returns; return the KL.

        It is the mean before the step, in nats; `low` and `high` are as `distillation_kl` has them.
        """
        loss = distillation_kl(self.answer(seen), exact, low, high, direction).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*self.instruction.parameters(), *self.net.parameters()], LARGEST_NORM)
        if self.distance is not None and exact.trust is not None:
            distance_loss(self.distance(seen.detach()), exact.trust).backward()
        optimiser.step()
        return float(loss.detach())

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Become the student whose `state_dict` these are; PriorMismatch where that one did not learn the trust."""
        if self.distance is not None and not any(name.startswith("distance.") for name in tensors):
            raise PriorMismatch(
                "prior: this student was saved before students learnt their prior's trust; fit it again"
            )
        self.load_state_dict(tensors)

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


def distance_loss(squared: Tensor, trust: Tensor) -> Tensor:
    """Return how far squared distances [B] are from what an exact trust [B] means, by their logarithms.

    A trust may be so small that nothing could be learnt from its own difference.
    """
    wanted = squared_distance(trust.clamp(min=torch.finfo(torch.float32).tiny))
    difference = squared.log1p() - wanted.log1p()
    # what is fully trusted may be as near as it likes
    return difference.where(trust < 1, difference.clamp(min=0)).square().mean()


def trust_error(student: PriorOutput, exact: PriorOutput) -> float | None:
    """Return how far a student's trust is from the exact one on average; None where there is none."""
    if student.trust is None or exact.trust is None:
        return None
    return float((student.trust - exact.trust).abs().mean())
