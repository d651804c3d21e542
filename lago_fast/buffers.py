"""Device-resident rollout storage: [T, N] tensors, filled step by step, read as shuffled minibatches.

Rows whose `valid` is False (the step after an end on the array lane) stay in place and weigh 0 everywhere.
Test: pytest tests/test_buffers.py
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lago_fast import ops


class RolloutBatch(NamedTuple):
    observations: Tensor  # [B, ...]
    actions: Tensor  # [B, D] or [B] int64
    old_values: Tensor  # [B]
    old_log_prob: Tensor  # [B]
    advantages: Tensor  # [B]
    returns: Tensor  # [B]
    weight: Tensor  # [B], 0 on invalid rows
    prior: tuple[Tensor, ...]  # what the prior said: (log_probs [B, A],) or (mean [B, D], log_std [B, D])


class RolloutBuffer:
    """Storage for `n_steps` steps of `n_envs` environments on one device.

    Args:
        n_steps: T, steps per rollout.
        n_envs: N, environments.
        obs_shape: shape of one observation.
        obs_dtype: its dtype (uint8 images stay uint8).
        action_shape: (D,) of a Box, () of a Discrete space.
        policy_widths: widths of what the policy outputs per state, stored for the KL as a reward:
            (A,) for log-probabilities, (D, D) for mean and log std.
        device: where every tensor lives.
    """

    def __init__(
        self,
        n_steps: int,
        n_envs: int,
        obs_shape: tuple[int, ...],
        obs_dtype: torch.dtype,
        action_shape: tuple[int, ...],
        policy_widths: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.n_steps, self.n_envs, self.device = n_steps, n_envs, device
        discrete = action_shape == ()

        def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((n_steps, n_envs, *shape), dtype=dtype, device=device)

        self.observations = rows(*obs_shape, dtype=obs_dtype)
        self.actions = rows(*action_shape, dtype=torch.int64 if discrete else torch.float32)
        self.rewards, self.values, self.next_values, self.log_probs = rows(), rows(), rows(), rows()
        self.terminated, self.truncated, self.valid = (rows(dtype=torch.bool) for _ in range(3))
        self.instruction_id = rows(dtype=torch.int64)
        self.policy_outputs = tuple(rows(width) for width in policy_widths)
        self.prior_outputs = tuple(rows(width) for width in policy_widths)
        self.advantages, self.returns = rows(), rows()

    def bootstrap(self, last_values: Tensor, terminal_values: list[tuple[int, Tensor, Tensor]]) -> None:
        """Fill `next_values` from the stored values.

        Args:
            last_values: [N], V of the observations after the last step.
            terminal_values: (t, env indices [k], V of their true last observations [k]) for vector envs that
                return the next episode's first observation in place of the last one.
        """
        self.next_values[:-1] = self.values[1:]
        self.next_values[-1] = last_values
        for t, envs, values in terminal_values:
            self.next_values[t, envs] = values

    def compute_returns_and_advantage(self, gamma: float, gae_lambda: float, impl: str) -> None:
        """Fill `advantages` and `returns` by the op `gae`."""
        self.advantages, self.returns = ops.gae(
            self.rewards,
            self.values,
            self.next_values,
            self.terminated,
            self.truncated,
            self.valid,
            gamma=gamma,
            gae_lambda=gae_lambda,
            impl=impl,
        )

    def get(self, batch_size: int) -> Iterator[RolloutBatch]:
        """Yield every row once, in minibatches of a fresh permutation.

        Rows are numbered environment by environment and permuted by numpy's global generator, as in
        Stable-Baselines3, so that the same seed gives the same minibatches there and here.
        """
        order = np.random.permutation(self.n_steps * self.n_envs)
        rows = torch.as_tensor((order % self.n_steps) * self.n_envs + order // self.n_steps, device=self.device)
        weight = self.valid.to(torch.float32)
        columns = [
            t.flatten(0, 1)
            for t in (
                self.observations,
                self.actions,
                self.values,
                self.log_probs,
                self.advantages,
                self.returns,
                weight,
                *self.prior_outputs,
            )
        ]
        for start in range(0, len(order), batch_size):
            picked = rows[start : start + batch_size]
            obs, actions, values, log_prob, advantages, returns, rows_weight, *prior = (
                column.index_select(0, picked) for column in columns
            )
            yield RolloutBatch(obs, actions, values, log_prob, advantages, returns, rows_weight, tuple(prior))
