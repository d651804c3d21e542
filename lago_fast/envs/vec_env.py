"""The vector-environment contract of the array lane, and the running scale of rewards.

Array lane: plain numpy columns, NEXT_STEP autoreset. The row after an end is not a transition: it carries
the first observation of the new episode and `valid=False`, and belongs in no loss, statistic or step count.
Tests: tests/envs/test_vec_env.py; for a concrete environment tests/envs/test_metaworld.py.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from gymnasium.spaces import Box, Discrete

from lago_fast.errors import NonFiniteError, UnsupportedArgument


class ArrayReset(NamedTuple):
    """First observations of new episodes, one row per environment that was reset."""

    observation: np.ndarray  # [N, O] float32
    instruction_id: np.ndarray  # [N] int64


class ArrayStep(NamedTuple):
    """One step of all environments; every array is fresh and belongs to the caller."""

    observation: np.ndarray  # [N, O] float32: the true terminal observation where an episode ended
    reward: np.ndarray  # [N] float32, as the learner sees it; 0 on invalid rows
    raw_reward: np.ndarray  # [N] float32, the simulator's; 0 on invalid rows
    terminated: np.ndarray  # [N] bool: no value follows
    truncated: np.ndarray  # [N] bool: ended, and to be bootstrapped from `observation`
    valid: np.ndarray  # [N] bool: False on the row after an end
    success: np.ndarray  # [N] bool, at this step
    instruction_id: np.ndarray  # [N] int64, of the episode that the observation belongs to


class ArrayVecEnv(ABC):
    """N environments stepped together, seen as numpy columns.

    `observation[:, :state_dim]` is the raw state that priors and experts see. `instruction_id` indexes
    `instructions`, `task_id` ([N] int64, fixed per environment) indexes `tasks`.
    """

    num_envs: int
    observation_space: Box  # of one environment
    action_space: Box | Discrete  # of one environment
    state_dim: int
    instructions: list[str]
    tasks: list[str]
    task_id: np.ndarray
    render_mode: str | None = None
    action_names: tuple[str, ...] = ()  # of the D dimensions or of the A choices, for people; (): they have none

    def describe_state(self, state: np.ndarray) -> str:
        """Return a raw state [S] in words; an environment that has none for it shows the numbers."""
        return ", ".join(f"{value:.3g}" for value in state)

    @abstractmethod
    def reset(self) -> ArrayReset:
        """Start a new episode in every environment."""

    @abstractmethod
    def send(self, actions: np.ndarray) -> None:
        """Start one step with actions [N, D], or [N] int64 where they are discrete; those of rows that start a new
        episode are ignored."""

    @abstractmethod
    def recv(self) -> ArrayStep:
        """Wait for the step that `send` started."""

    @abstractmethod
    def close(self) -> None:
        """Free the simulators; a second call does nothing."""

    def step(self, actions: np.ndarray) -> ArrayStep:
        """Send, then receive."""
        self.send(actions)
        return self.recv()

    def reset_envs(self, ids: np.ndarray) -> ArrayReset:
        """Start a new episode now in the environments `ids` [n], so that their next row is valid.

        Only the same-step (SB3) lane needs it. Raises NotImplementedError where it is not offered.
        """
        raise NotImplementedError(f"{type(self).__name__} offers no partial reset: use its array lane")

    def seed(self, seed: int) -> list[int]:
        """Reseed all environments from the next `reset` on; returns the seed of each.

        Raises NotImplementedError where seeds are fixed at construction.
        """
        raise NotImplementedError(f"{type(self).__name__} is seeded at construction only")


def checked_instruction_table(table: np.ndarray, instructions: list[str]) -> np.ndarray:
    """Return a table of encoded instructions [I, Z] as float32.

    Raises:
        UnsupportedArgument: not one row per instruction.
        NonFiniteError: it holds NaN or infinity.
    """
    table = np.asarray(table)
    if table.ndim != 2 or table.shape[0] != len(instructions):
        raise UnsupportedArgument(
            f"instruction_table has shape {table.shape}; expected [{len(instructions)}, Z]: "
            "one row per entry of this environment's `instructions`, in that order"
        )
    if not np.isfinite(table).all():
        raise NonFiniteError("instruction_table holds NaN or infinity: encode the instructions again")
    return table.astype(np.float32)


class ReturnNormalizer:
    """Divide rewards by the running std of the discounted return, as SB3's VecNormalize does.

    The same numbers as `VecNormalize(norm_obs=False)` where all rows are valid and of one group; invalid rows are
    skipped.

    Args:
        num_envs: N.
        gamma: discount of the return.
        clip: scaled rewards are clipped to [-clip, clip].
        epsilon: added to the variance.
        group: [N] int, counted from 0, the group of each environment; each group has a std of its own. Default: one.

    Raises:
        UnsupportedArgument: a discount that is none.
    """

    def __init__(
        self,
        num_envs: int,
        gamma: float = 0.99,
        clip: float = 10.0,
        epsilon: float = 1e-8,
        group: np.ndarray | None = None,
    ) -> None:
        if not 0 <= gamma <= 1:
            raise UnsupportedArgument(f"gamma={gamma}: give a discount from 0 to 1")
        self.gamma, self.clip, self.epsilon = gamma, clip, epsilon
        self.group = np.zeros(num_envs, np.int64) if group is None else group
        groups = int(self.group.max()) + 1
        self._members = [self.group == g for g in range(groups)]
        self.returns = np.zeros(num_envs, np.float64)
        self.mean, self.var, self.count = np.zeros(groups), np.ones(groups), np.full(groups, 1e-4)  # [G]

    def __call__(self, reward: np.ndarray, valid: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Learn from one step of rewards [N] and return them scaled, float32, 0 where not valid [N].

        `ended` [N] bool marks the rows whose episode is over: their return starts again from zero.
        """
        self.returns[valid] = self.returns[valid] * self.gamma + reward[valid]
        for g, members in enumerate(self._members):
            rows = self.returns[valid & members]
            if len(rows):
                self._merge(g, rows)
        std = np.sqrt(self.var + self.epsilon)[self.group]
        scaled = np.clip(reward / std, -self.clip, self.clip)
        self.returns[ended] = 0.0
        return np.where(valid, scaled, 0.0).astype(np.float32)

    def start_episodes(self) -> None:
        """Forget the running returns, as a full reset of the environments does; keep the statistics."""
        self.returns[:] = 0.0

    def _merge(self, g: int, values: np.ndarray) -> None:
        # Chan et al.'s parallel mean and variance, in the order of operations of SB3's RunningMeanStd
        count = self.count[g]
        delta, total = values.mean() - self.mean[g], count + len(values)
        spread = self.var[g] * count + values.var() * len(values)
        spread += delta**2 * count * len(values) / total
        self.mean[g] += delta * len(values) / total
        self.var[g], self.count[g] = spread / total, total

    def state_dict(self) -> dict[str, list[float]]:
        """The statistics of each group, for a checkpoint."""
        return {"mean": self.mean.tolist(), "var": self.var.tolist(), "count": self.count.tolist()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Take over the statistics of another normaliser; running returns start from zero.

        Raises UnsupportedArgument for statistics of another number of groups; nothing is taken over then.
        """
        columns = [np.array(state[key], np.float64) for key in ("mean", "var", "count")]
        for key, column in zip(("mean", "var", "count"), columns, strict=True):
            if column.shape != self.mean.shape:
                raise UnsupportedArgument(
                    f"state: {key!r} has shape {column.shape}, this normaliser {self.mean.shape}, one number per group "
                    "(task); load it into an environment of the tasks that it was saved with"
                )
        self.mean, self.var, self.count = columns
        self.start_episodes()
