"""Vector environments side by side as one, so that some can step while a policy answers for the others.

Nothing of what an environment does depends on how it is grouped: with the same seed and actions the rows are those
of one ungrouped environment, bit for bit. Tests: tests/envs/test_groups.py
"""

from collections.abc import Sequence

import numpy as np

from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv, ReturnNormalizer
from lago_fast.errors import UnsupportedArgument


class GroupedArrayEnv(ArrayVecEnv):
    """Array-lane environments of one kind as one whose rows are theirs, one group behind the other.

    Args:
        members: G environments of equal spaces, tasks and size, whose rewards are not scaled.
        normalizer: scales the rewards of all of them; None: they stay as they are.

    Raises:
        UnsupportedArgument: members that differ in size.
    """

    def __init__(self, members: Sequence[ArrayVecEnv], normalizer: ReturnNormalizer | None = None) -> None:
        self.members, self.normalizer = list(members), normalizer
        first, size = self.members[0], self.members[0].num_envs
        if any(member.num_envs != size for member in self.members):
            raise UnsupportedArgument("members: groups of environments must have one size")
        self.num_envs = size * len(self.members)
        self.groups = [slice(g * size, (g + 1) * size) for g in range(len(self.members))]  # rows of each member
        self.observation_space, self.action_space = first.observation_space, first.action_space
        self.state_dim, self.instructions, self.tasks = first.state_dim, first.instructions, first.tasks
        self.task_id = np.concatenate([member.task_id for member in self.members])
        self.instruction_id = np.zeros(self.num_envs, np.int64)

    def reset(self) -> ArrayReset:
        """Start a new episode everywhere; steps under way are waited for and dropped."""
        if self.normalizer is not None:
            self.normalizer.start_episodes()
        parts = [member.reset() for member in self.members]
        fresh = ArrayReset(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        self.instruction_id = fresh.instruction_id.copy()
        return fresh

    def reset_envs(self, ids: np.ndarray) -> ArrayReset:
        """Start a new episode now in the environments `ids` [n]; their next row is valid."""
        ids = np.asarray(ids)
        observation = np.zeros((self.num_envs, *(self.observation_space.shape)), np.float32)
        for member, rows in zip(self.members, self.groups, strict=True):
            chosen = ids[(ids >= rows.start) & (ids < rows.stop)]
            if len(chosen):
                observation[chosen], self.instruction_id[chosen] = member.reset_envs(chosen - rows.start)
        return ArrayReset(observation[ids], self.instruction_id[ids])

    def send(self, actions: np.ndarray) -> None:
        """Start one step everywhere with actions [N, D]."""
        if len(actions) != self.num_envs:
            raise UnsupportedArgument(f"actions has {len(actions)} rows; expected {self.num_envs}")
        for g, rows in enumerate(self.groups):
            self.send_group(g, actions[rows])

    def recv(self) -> ArrayStep:
        """Wait for the step that `send` started."""
        return self.join([self.recv_group(g) for g in range(len(self.groups))])

    def send_group(self, g: int, actions: np.ndarray) -> None:
        """Start one step in group g with its actions [N / G, D]."""
        self.members[g].send(actions)

    def recv_group(self, g: int) -> ArrayStep:
        """Wait for group g's step; `join` has to see it before its rewards are the learner's."""
        return self.members[g].recv()

    def join(self, parts: Sequence[ArrayStep]) -> ArrayStep:
        """Return one step of every group as a step of all, its rewards scaled together."""
        step = ArrayStep(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        self.instruction_id = step.instruction_id.copy()
        if self.normalizer is None:
            return step
        return step._replace(reward=self.normalizer(step.reward, step.valid, step.terminated | step.truncated))

    def seed(self, seed: int) -> list[int]:
        """Reseed from the next `reset` on; returns the seed of each environment."""
        return [one for member in self.members for one in member.seed(seed)]

    def close(self) -> None:
        """Free the simulators; a second call does nothing."""
        for member in self.members:
            member.close()
