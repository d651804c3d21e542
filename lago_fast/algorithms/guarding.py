"""Where the guard stands in a training: the prior plays before it, and each rollout's episodes are its evidence.

Test: pytest tests/algorithms/test_guard.py
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lago_fast.algorithms.guard import Guard, guard_for, settings_of
from lago_fast.algorithms.heads import Head, PolicysOwnHead
from lago_fast.algorithms.lanes import Episode, bounded_actions
from lago_fast.algorithms.saving import KeptPPO
from lago_fast.buffers import RolloutBuffer
from lago_fast.priors.base import ActionPrior


class GuardedPPO(KeptPPO):
    """PPO whose prior counts by what it is worth; without a guard, nothing of this happens."""

    prior: ActionPrior | None
    guard: dict[str, Any] | None  # settings, as plain numbers
    guard_state: dict[str, list[float]] | None
    _guard: Guard | None
    _buffer: RolloutBuffer
    _head: Head
    _prior_ids: Tensor

    def _take_lane(self) -> None:
        super()._take_lane()
        assert self.env is not None
        self._guard = guard_for(settings_of(self.guard), self.env, self._buffer, self.guard_state)

    def _note_returns(self, episodes: list[Episode]) -> None:
        """Count episodes that just ended as the policy's."""
        if self._guard is not None:
            self._guard.note(self._guard.policy, episodes, self._instruction_id)

    def _let_guard_weigh(self) -> None:
        """Have the guard decide how much each row's KL counts in the update to come."""
        if self._guard is not None:
            self.guard_state = self._guard.weigh(self._buffer, self.logger)

    def _let_prior_play(self, total_timesteps: int) -> None:
        """Have the guard see episodes of the prior, which count as env steps; the env starts anew after them."""
        if self._guard is None or self._guard.knows_prior:
            return
        assert self.env is not None
        most = self._guard.settings.probe_share * total_timesteps
        self.num_timesteps += self._guard.watch_prior(
            self._lane, self._prior_actions, self._last_obs, self._instruction_id, most
        )
        self._last_obs = self.env.reset()  # type: ignore[assignment]  # as SB3's own reset
        self._instruction_id = self._lane.begin()

    @torch.no_grad()
    def _prior_actions(self, observations: Any, instruction_id: np.ndarray) -> np.ndarray:
        """Return actions drawn from the prior as the env takes them."""
        assert self.prior is not None
        assert not isinstance(self._head, PolicysOwnHead)
        seen = self._buffer.as_tensors(observations)
        assert isinstance(seen, Tensor)
        ids = self._prior_ids[torch.from_numpy(instruction_id).to(self.device)]
        answer = self.prior.query(seen.flatten(1)[:, : self.prior.state_dim], ids)
        actions = self._head.sample(self._head.prior_outputs(answer))[0].cpu().numpy()
        return bounded_actions(self.policy, actions.reshape(self.n_envs, *self.action_space.shape))  # type: ignore[misc]
