"""The vector-environment contract of the array lane, and the running scale of rewards.

Array lane: plain numpy columns, NEXT_STEP autoreset. The row after an end is not a transition: it carries
the first observation of the new episode and `valid=False`, and belongs in no loss, statistic or step count.
Tests: tests/envs/test_vec_env.py; for a concrete environment tests/envs/test_metaworld.py.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from gymnasium.spaces import Box


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
    action_space: Box  # of one environment
    state_dim: int
    instructions: list[str]
    tasks: list[str]
    task_id: np.ndarray
    render_mode: str | None = None

    @abstractmethod
    def reset(self) -> ArrayReset:
        """Start a new episode in every environment."""

    @abstractmethod
    def send(self, actions: np.ndarray) -> None:
        """Start one step with actions [N, D]; those of rows that start a new episode are ignored."""

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


class ReturnNormalizer:
    """Divide rewards by the running std of the discounted return, as SB3's VecNormalize does.

    The same numbers as `VecNormalize(norm_obs=False)` where all rows are valid; invalid rows are skipped.

    Args:
        num_envs: N.
        gamma: discount of the return.
        clip: scaled rewards are clipped to [-clip, clip].
        epsilon: added to the variance.
    """

    def __init__(self, num_envs: int, gamma: float = 0.99, clip: float = 10.0, epsilon: float = 1e-8) -> None:
        self.gamma, self.clip, self.epsilon = gamma, clip, epsilon
        self.returns = np.zeros(num_envs, np.float64)
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, reward: np.ndarray, valid: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Learn from one step of rewards [N] and return them scaled, float32, 0 where not valid [N].

        `ended` [N] bool marks the rows whose episode is over: their return starts again from zero.
        """
        self.returns[valid] = self.returns[valid] * self.gamma + reward[valid]
        if valid.any():
            self._merge(self.returns[valid])
        scaled = np.clip(reward / np.sqrt(self.var + self.epsilon), -self.clip, self.clip)
        self.returns[ended] = 0.0
        return np.where(valid, scaled, 0.0).astype(np.float32)

    def start_episodes(self) -> None:
        """Forget the running returns, as a full reset of the environments does; keep the statistics."""
        self.returns[:] = 0.0

    def _merge(self, values: np.ndarray) -> None:
        # Chan et al.'s parallel mean and variance, in the order of operations of SB3's RunningMeanStd
        delta, total = float(values.mean()) - self.mean, self.count + len(values)
        spread = self.var * self.count + float(values.var()) * len(values)
        spread += delta**2 * self.count * len(values) / total
        self.mean += delta * len(values) / total
        self.var, self.count = spread / total, total

    def state_dict(self) -> dict[str, float]:
        """The statistics, for a checkpoint."""
        return {"mean": self.mean, "var": self.var, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the statistics of another normaliser; running returns start from zero."""
        self.mean, self.var, self.count = (float(state[key]) for key in ("mean", "var", "count"))
        self.start_episodes()
