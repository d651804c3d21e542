"""Device-resident rollout storage: [T, N] tensors, filled step by step, read as shuffled minibatches.

Rows whose `valid` is False (the step after an end on the array lane) stay in place and weigh 0 everywhere.
Test: pytest tests/test_buffers.py
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lago_fast import ops

Observations = Tensor | dict[str, Tensor]  # a Dict observation space has one tensor per key


def map_observations(function: Callable[[Any], Tensor], observations: Any) -> Observations:
    """Return `function` of observations, key by key where they are a dictionary."""
    if isinstance(observations, dict):
        return {key: function(column) for key, column in observations.items()}
    return function(observations)


def put(array: np.ndarray, place: Tensor) -> None:
    """Copy an array [...] to a tensor of its shape; to one on a GPU from pinned memory, and the host does not wait."""
    source = torch.from_numpy(array)
    if place.device.type == "cuda":
        source = source.to(place.dtype).pin_memory()
    place.copy_(source, non_blocking=True)


class RolloutBatch(NamedTuple):
    observations: Observations  # [B, ...]
    actions: Tensor  # [B, D] or [B] int64
    old_values: Tensor  # [B]
    old_log_prob: Tensor  # [B]
    advantages: Tensor  # [B]
    returns: Tensor  # [B]
    weight: Tensor  # [B], 0 on invalid rows
    prior: tuple[Tensor, ...]  # what the prior said: (log_probs [B, A],) or (mean [B, D], log_std [B, D])
    kl_weight: Tensor | None = None  # [B], of each row's KL in the loss; None: 1


class RolloutBuffer:
    """Storage for `n_steps` steps of `n_envs` environments on one device.

    Args:
        n_steps: T, steps per rollout.
        n_envs: N, environments.
        one_observation: an array of the shape and dtype of one observation, or a dictionary of such (uint8 images
            stay uint8).
        action_shape: shape of one action: (D,) of a Box, () of a Discrete space.
        action_dtype: of the actions.
        policy_widths: widths of what the policy outputs per state, stored for the KL as a reward:
            (A,) for log-probabilities, (D, D) for mean and log std, () without a prior's form.
        device: where every tensor lives.
    """

    def __init__(
        self,
        n_steps: int,
        n_envs: int,
        one_observation: np.ndarray | dict[str, np.ndarray],
        action_shape: tuple[int, ...],
        action_dtype: torch.dtype,
        policy_widths: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.n_steps, self.n_envs, self.device = n_steps, n_envs, device

        def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros((n_steps, n_envs, *shape), dtype=dtype, device=device)

        def stored(example: np.ndarray) -> Tensor:
            dtype = torch.from_numpy(np.zeros(1, example.dtype)).dtype
            return rows(*example.shape, dtype=torch.float32 if dtype == torch.float64 else dtype)

        self.observations = map_observations(stored, one_observation)
        self.actions = rows(*action_shape, dtype=action_dtype)
        self.rewards, self.values, self.next_values, self.log_probs = rows(), rows(), rows(), rows()
        self.terminated, self.truncated, self.valid = (rows(dtype=torch.bool) for _ in range(3))
        self.instruction_id = rows(dtype=torch.int64)
        self.policy_outputs = tuple(rows(width) for width in policy_widths)
        self.prior_outputs = tuple(rows(width) for width in policy_widths)
        self.advantages, self.returns = rows(), rows()
        self.trust: Tensor | None = None  # [T, N], the prior's own, where it has one
        self._views = self._seen_by_numpy()
        self.kl_weight: Tensor | None = None  # [T, N], a guard's

    def _seen_by_numpy(self) -> dict[str, np.ndarray]:
        """Return the columns that a step is written to as arrays of the same memory; none on a GPU.

        After a simulator has had the cores, each of torch's calls costs tens of microseconds; one of numpy's does not.
        """
        names = ("rewards", "terminated", "truncated", "valid", "instruction_id", "actions")
        columns: dict[str, Any] = {name: getattr(self, name) for name in names}
        if isinstance(self.observations, Tensor):
            columns["observations"] = self.observations
        return {name: column.numpy() for name, column in columns.items()} if self.device.type == "cpu" else {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy keeps; arrays of the same memory would not be such any more."""
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._views = self._seen_by_numpy()

    def write(self, name: str, t: int, array: np.ndarray, envs: slice = slice(None)) -> None:
        """Copy an array [n, ...] to the column `name` of some envs at step t."""
        if name in self._views:
            self._views[name][t, envs] = array
        else:
            put(array, getattr(self, name)[t, envs])

    def actions_at(self, t: int, envs: slice = slice(None)) -> np.ndarray:
        """Return a copy of the actions of some envs at step t, [n, ...]."""
        if "actions" in self._views:
            return self._views["actions"][t, envs].copy()
        return self.actions[t, envs].cpu().numpy()

    def store_observation(self, t: int, observation: Any, envs: slice = slice(None)) -> None:
        """Store what the policy sees of `envs` at step t, [n, ...] or a dictionary of such."""
        if isinstance(self.observations, Tensor):
            self.write("observations", t, observation, envs)
            return
        for key, column in self.observations.items():
            put(observation[key], column[t, envs])

    def observation_at(self, t: int, envs: slice = slice(None)) -> Observations:
        """Return what the policy saw of `envs` at step t."""
        return map_observations(lambda column: column[t, envs], self.observations)

    def as_tensors(self, observation: Any) -> Observations:
        """Return arrays of observations on the buffer's device, in the dtype that they are stored in."""
        if isinstance(self.observations, dict):
            return {k: self._like(observation[k], column) for k, column in self.observations.items()}
        return self._like(observation, self.observations)

    def _like(self, array: np.ndarray, column: Tensor) -> Tensor:
        return torch.as_tensor(array, device=self.device, dtype=column.dtype)

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

    def get(self, batch_size: int, *, reuse: bool = False, impl: str = "auto") -> Iterator[RolloutBatch]:
        """Yield every row once, in minibatches of a fresh permutation.

        Args:
            batch_size: rows of a minibatch; the last may have fewer.
            reuse: let each minibatch overwrite the one before it.
            impl: implementation of the op `take_rows`.
        """
        columns = ops.columns(self.columns(), reuse=reuse, impl=impl)
        for rows in self.shuffled(batch_size):
            yield self.as_batch(columns.take(rows))

    def shuffled(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the number of every row of `columns` once, [<= batch_size] int64 each, in a fresh permutation.

        Rows are numbered environment by environment and permuted by numpy's global generator, as in
        Stable-Baselines3, so that the same seed gives the same minibatches there and here.
        """
        order = np.random.permutation(self.n_steps * self.n_envs)
        rows = torch.empty(len(order), dtype=torch.int64, device=self.device)
        put((order % self.n_steps) * self.n_envs + order // self.n_steps, rows)
        yield from rows.split(batch_size)

    def columns(self) -> list[Tensor]:
        """Return what minibatches are taken from, [T * N, ...] each; `as_batch` names rows of them."""
        return [
            column.flatten(0, 1)
            for column in (
                *(self.observations.values() if isinstance(self.observations, dict) else (self.observations,)),
                self.actions,
                self.values,
                self.log_probs,
                self.advantages,
                self.returns,
                self.valid.to(torch.float32),
                *self.prior_outputs,
                *(() if self.kl_weight is None else (self.kl_weight,)),
            )
        ]

    def as_batch(self, taken: Sequence[Tensor]) -> RolloutBatch:
        """Return rows [B, ...] of each of `columns` as a minibatch."""
        keys = list(self.observations) if isinstance(self.observations, dict) else []
        observations: Observations = dict(zip(keys, taken, strict=False)) if keys else taken[0]
        actions, values, log_prob, advantages, returns, weight, *prior = taken[max(1, len(keys)) :]
        kl_weight = None if self.kl_weight is None else prior.pop()
        return RolloutBatch(
            observations, actions, values, log_prob, advantages, returns, weight, tuple(prior), kl_weight
        )
