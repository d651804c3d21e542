"""An array lane in numpy, the cheapest env that has everything: invalid rows, truncations, normalised rewards."""

import numpy as np
from gymnasium.spaces import Box

from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv, ReturnNormalizer


class ArrayPoints(ArrayVecEnv):
    """Points that move in a plane, all of them in one array: the cheapest env that has everything."""

    instructions, tasks, state_dim = ["move to the origin"], ["point"], 2
    observation_space = Box(-2, 2, (2,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, num_envs):
        self.num_envs, self.task_id = num_envs, np.zeros(num_envs, np.int64)
        self.instruction_id = np.zeros(num_envs, np.int64)
        self.normalizer = ReturnNormalizer(num_envs)
        self.seed(0)

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)
        return [seed] * self.num_envs

    def reset(self):
        self.at = self.rng.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32)
        self.t, self.ended = self.rng.integers(16, size=self.num_envs), np.zeros(self.num_envs, bool)
        if self.normalizer is not None:
            self.normalizer.start_episodes()
        return ArrayReset(self.at.copy(), self.instruction_id.copy())

    def reset_envs(self, ids):
        self.at[ids] = self.rng.uniform(-1, 1, (len(ids), 2))
        self.t[ids], self.ended[ids] = 0, False
        return ArrayReset(self.at[ids], self.instruction_id[ids])

    def send(self, actions):
        self.actions = actions

    def recv(self):
        valid = ~self.ended
        fresh = self.rng.uniform(-1, 1, self.at.shape).astype(np.float32)
        self.at = np.where(valid[:, None], np.clip(self.at + 0.2 * self.actions, -2, 2), fresh).astype(np.float32)
        self.t = np.where(valid, self.t + 1, 0)
        raw = np.where(valid, -np.linalg.norm(self.at, axis=1), 0.0).astype(np.float32)
        self.ended = valid & (self.t >= 16)
        nothing = np.zeros(self.num_envs, bool)
        reward = raw.copy() if self.normalizer is None else self.normalizer(raw, valid, self.ended)
        success = np.linalg.norm(self.at, axis=1) < 0.1
        return ArrayStep(
            self.at.copy(), reward, raw, nothing, self.ended.copy(), valid, success, self.instruction_id.copy()
        )

    def close(self):
        """Hold nothing."""
