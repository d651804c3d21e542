"""The guard: how much the KL to a prior counts, found out per group of rows while training.

A policy that moves a little towards the prior, pi^(1-e) p^e renormalised, changes its return by e E[A x], where A is
the advantage and x = log p(a|s) - log pi(a|s) + KL(pi(.|s) || p(.|s)), whose mean in every state is 0. A rollout holds
an estimate of that slope for each group; where it is clearly negative the prior's weight falls, and it recovers where
it is not. Reasons, measurements and what failed: docs/guard.md. Test: pytest tests/algorithms/test_guard.py
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from lago_fast.algorithms.heads import CategoricalHead, GaussianHead
from lago_fast.algorithms.lanes import array_lane_of
from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import UnsupportedArgument

ROWS_OF_GROUP = 256  # of a rollout, that an instruction must have on average to be a group of its own
LOGGED_GROUPS = 16  # more are not logged one by one


@dataclass(frozen=True)
class GuardSettings:
    """How the guard decides; evidence is counted in standard errors.

    Args:
        memory: share of the evidence that is kept from rollout to rollout, in [0, 1).
        doubt: from this much evidence on a weight moves by it, down or up, at least 0.
        step: how much the log of a weight moves per standard error beyond `doubt`, above 0.
        proof: this much evidence that its means help earns a prior the benefit of the doubt, and this much against
            either of its parts loses it, above 0.
        burden: how much the log of a weight falls per rollout while nothing was earned, at least 0.
        recovery: how much it rises per rollout with the benefit of the doubt, at least 0.
        least: smallest weight, in (0, 1].
        start: first weight, from `least` to 1.
        block_steps: neighbouring steps of one env that count as one observation, since their advantages share what
            happened; at least 1.

    Raises UnsupportedArgument when one is out of range.
    """

    memory: float = 0.7
    proof: float = 2.0
    burden: float = 0.1
    doubt: float = 1.0
    step: float = 1.0
    recovery: float = 0.1
    least: float = 0.001
    start: float = 0.01
    block_steps: int = 32

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, fits, wanted in (
            ("memory", 0 <= self.memory < 1, "in [0, 1)"),
            ("proof", 0 < self.proof < math.inf, "above 0"),
            ("burden", 0 <= self.burden < math.inf, "at least 0"),
            ("doubt", 0 <= self.doubt < math.inf, "at least 0"),
            ("step", 0 < self.step < math.inf, "above 0"),
            ("recovery", 0 <= self.recovery < math.inf, "at least 0"),
            ("least", 0 < self.least <= 1, "in (0, 1]"),
            ("start", self.least <= self.start <= 1, "from `least` to 1"),
            ("block_steps", self.block_steps >= 1, "at least 1"),
        ):
            if not fits:
                raise UnsupportedArgument(f"guard: {name}={getattr(self, name)}: give a number {wanted}")


def settings_of(guard: "bool | GuardSettings | Mapping[str, Any] | None") -> GuardSettings | None:
    """Return the settings that FastKLPPO's `guard` means, None for no guard; a mapping is read from a saved model.

    Raises UnsupportedArgument for anything else.
    """
    if guard is None or guard is False:
        return None
    if guard is True:
        return GuardSettings()
    if isinstance(guard, GuardSettings):
        return guard
    if isinstance(guard, Mapping) and set(guard) == set(asdict(GuardSettings())):
        return GuardSettings(**guard)
    raise UnsupportedArgument(f"guard={guard!r}: give True, False or a GuardSettings")


def slope_of_return(
    advantages: Tensor, towards: Tensor, valid: Tensor, group: Tensor, groups: int, block_steps: int
) -> Tensor:
    """Return what moving towards the prior would do to the return of each group, in standard errors, float64 [G].

    The error is that of independent blocks of `block_steps` steps of one env, with mean 0 (cluster-robust; Liang and
    Zeger, Biometrika 73, 1986). A group without a valid row has 0.

    Args:
        advantages: [T, N].
        towards: [T, N], x of the module's docstring.
        valid: [T, N] bool.
        group: [T, N] int64, below `groups`.
        groups: G.
        block_steps: steps of one block.
    """
    steps, envs = valid.shape
    counts = torch.zeros(groups, dtype=torch.float64, device=valid.device)
    totals = torch.zeros_like(counts)
    kept = valid.double()
    advantages = torch.where(valid, advantages.double(), 0.0)
    counts.index_add_(0, group.flatten(), kept.flatten())
    totals.index_add_(0, group.flatten(), advantages.flatten())
    # a constant is no reason to go anywhere, and where values are not learnt yet it is large
    centred = advantages - (totals / counts.clamp(min=1))[group]
    product = torch.where(valid, centred * towards.double(), 0.0)
    block = torch.arange(steps, device=valid.device)[:, None] // block_steps * envs
    block = block + torch.arange(envs, device=valid.device)
    blocks = (steps - 1) // block_steps * envs + envs
    sums = torch.zeros(blocks * groups, dtype=torch.float64, device=valid.device)
    sums.index_add_(0, (block * groups + group).flatten(), product.flatten())
    sums = sums.view(blocks, groups)
    error = sums.square().sum(dim=0).sqrt()
    return torch.where(error > 0, sums.sum(dim=0) / error, 0.0)


class Guard:
    """The weights of the KL, one per group of rows.

    Args:
        settings: how it decides.
        names: of the groups, as they are logged.
        group: [T, N] int64, of each row; None: `instruction_id` of the rollout's rows is their group.
        state: of a guard before, as `state` returns it; None, or one of other groups: a new start.
    """

    def __init__(
        self,
        settings: GuardSettings,
        names: Sequence[str],
        group: Tensor | None = None,
        state: Mapping[str, list[float]] | None = None,
    ) -> None:
        self.settings, self.names, self.group = settings, list(names), group
        count = len(self.names)
        self.weights, self.earned = [settings.start] * count, [0.0] * count
        # of the means and of the spread; in standard errors, of variance 1 where the prior makes no difference
        self.direction, self.spread = [0.0] * count, [0.0] * count
        if state is not None and len(state["weights"]) == count:
            for name, column in state.items():
                setattr(self, name, list(column))

    @property
    def state(self) -> dict[str, list[float]]:
        """Return all that it has learnt, as plain numbers."""
        return {name: list(getattr(self, name)) for name in ("weights", "earned", "direction", "spread")}

    def observe(self, direction: Tensor, spread: Tensor) -> None:
        """Take the slopes [G] of a rollout into the evidence and move the weights; what is not finite is left out."""
        s = self.settings
        for g, found in enumerate(zip(direction.tolist(), spread.tolist(), strict=True)):
            if not all(map(math.isfinite, found)) or found == (0.0, 0.0):
                continue
            # Stouffer's sum, so that the evidence keeps its variance
            for evidence, new in zip((self.direction, self.spread), found, strict=True):
                evidence[g] = s.memory * evidence[g] + math.sqrt(1 - s.memory**2) * new
            worst = min(self.direction[g], self.spread[g])
            if worst < -s.proof:
                self.earned[g] = 0.0
            elif self.direction[g] > s.proof:
                self.earned[g] = 1.0
            if worst < -s.doubt:
                change = s.step * (worst + s.doubt)
            else:
                change = s.step * max(0.0, self.direction[g] - s.doubt)
                change += s.recovery if self.earned[g] else -s.burden
            self.weights[g] = min(1.0, max(s.least, self.weights[g] * math.exp(change)))

    def weigh(
        self, head: GaussianHead | CategoricalHead, buffer: RolloutBuffer, temperature: float, logger: Logger
    ) -> dict[str, list[float]]:
        """Look at a finished rollout, write its `kl_weight` for the update to come, and return the new `state`."""
        group = buffer.instruction_id if self.group is None else self.group
        outputs, prior = (
            tuple(column.flatten(0, 1) for column in columns)
            for columns in (buffer.policy_outputs, buffer.prior_outputs)
        )
        towards = head.towards_prior(outputs, prior, buffer.actions.flatten(0, 1), temperature)
        self.observe(
            *(
                slope_of_return(
                    buffer.advantages,
                    part.reshape(group.shape),
                    buffer.valid,
                    group,
                    len(self.names),
                    self.settings.block_steps,
                )
                for part in towards
            )
        )
        weights = torch.tensor(self.weights, dtype=torch.float32, device=group.device)[group]
        buffer.kl_weight = weights if buffer.trust is None else weights * buffer.trust
        self._record(logger, buffer)
        return self.state

    def _record(self, logger: Logger, buffer: RolloutBuffer) -> None:
        assert buffer.kl_weight is not None
        logger.record("prior/guard_weight", buffer.kl_weight[buffer.valid].mean().item())
        if buffer.trust is not None:
            logger.record("prior/trust", buffer.trust[buffer.valid].mean().item())
        if len(self.names) <= LOGGED_GROUPS:
            for g, name in enumerate(self.names):
                logger.record(f"prior/guard_weight_{name}", self.weights[g])
                logger.record(f"prior/guard_direction_{name}", self.direction[g])
                logger.record(f"prior/guard_spread_{name}", self.spread[g])


def guard_for(
    settings: GuardSettings | None, env: VecEnv, buffer: RolloutBuffer, state: Mapping[str, list[float]] | None
) -> Guard | None:
    """Return the guard of a training, None without settings.

    A group is a task where the env's array lane names tasks; else an instruction, where the env names several and a
    rollout has ROWS_OF_GROUP rows for each; else there is one group.
    """
    if settings is None:
        return None
    about: Any = array_lane_of(env) or env
    rows = buffer.n_steps, buffer.n_envs
    task_id = getattr(about, "task_id", None)
    if task_id is not None:
        group = torch.as_tensor(task_id, device=buffer.device).expand(rows).contiguous()
        return Guard(settings, about.tasks, group, state)
    texts = getattr(about, "instructions", [])
    if len(texts) > 1 and math.prod(rows) >= ROWS_OF_GROUP * len(texts):
        return Guard(settings, texts, None, state)
    return Guard(settings, ["all"], torch.zeros(rows, dtype=torch.int64, device=buffer.device), state)
