"""Where the guard stands in a training: each rollout's episodes are its evidence, and some that the prior plays.

Test: pytest tests/algorithms/test_guard.py
"""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from lago_fast.algorithms.guard import Guard, check_returns, guard_for, settings_of
from lago_fast.algorithms.heads import Head, PolicysOwnHead
from lago_fast.algorithms.lanes import LaneStep, bounded_actions, example_of
from lago_fast.algorithms.numbers import check_answers
from lago_fast.algorithms.prior_query import said_of, states_of
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
    envs_anew_at: int  # env steps when the envs last started anew without the policy's doing
    _played: RolloutBuffer | None  # rows of the prior's episodes that the policy is still to be fitted to

    def _take_lane(self) -> None:
        super()._take_lane()
        assert self.env is not None
        self._guard = guard_for(settings_of(self.guard), self.env, self._buffer, self.guard_state)

    def _note_returns(self, step: LaneStep) -> None:
        """Count episodes that just ended as the policy's."""
        if self._guard is not None:
            check_returns(step)
            self._guard.note(self._guard.policy, step.episodes, self._instruction_id)

    def _let_guard_weigh(self) -> None:
        """Have the guard decide how much each row's KL counts in the update to come."""
        if self._guard is not None:
            if self._guard.wants_prior_to_play(self._total_timesteps):
                self._let_prior_play(self._guard)
            self.guard_state = self._guard.weigh(self._buffer, self.logger)

    def _let_prior_play(self, guard: Guard) -> None:
        """Have the guard see episodes of the prior, which count as env steps; the envs start anew before and after.

        Where they are the better ones, the policy is fitted to the prior on their rows after the update to come, unless
        the guard's settings have it not.
        """
        assert self.env is not None
        self._start_envs_anew()
        said: list[tuple[Any, np.ndarray, tuple[Tensor, ...], Tensor | None]] = []

        def act(observations: Any, instruction_id: np.ndarray) -> np.ndarray:
            seen, outputs, trust = self._ask_prior(observations, instruction_id)
            check_answers(seen, outputs, len(said))
            said.append((observations, instruction_id, outputs, trust))
            return self._drawn(outputs)

        before = guard.prior_steps
        try:
            valid = guard.watch_prior(self._lane, act, self._last_obs, self._instruction_id, self._total_timesteps)
        finally:
            self.num_timesteps += guard.prior_steps - before
        self._start_envs_anew()
        if not said:
            return
        ids = torch.from_numpy(np.stack([instruction_id for _, instruction_id, *_ in said])).to(self.device)
        of_prior = torch.from_numpy(np.stack(valid)).to(self.device)
        trust = [told for *_, told in said if told is not None]
        if trust:
            guard.learn_reach(torch.stack(trust), ids, of_prior)
        if not guard.settings.imitate:
            return
        played = self._new_buffer(len(said))
        played.instruction_id, played.valid = ids, of_prior
        for t, (observations, _, outputs, _) in enumerate(said):
            played.store_observation(t, observations)
            for column, output in zip(played.prior_outputs, outputs, strict=True):
                column[t] = output
        played.valid &= guard.rows_to_imitate(played.instruction_id)
        self._played = played if played.valid.any() else None

    def _new_buffer(self, n_steps: int) -> RolloutBuffer:
        """Return an empty buffer for so many steps of the model's envs."""
        return RolloutBuffer(
            n_steps,
            self.n_envs,
            example_of(self.observation_space),
            self._head.action_shape,
            torch.int64 if isinstance(self.action_space, spaces.Discrete | spaces.MultiDiscrete) else torch.float32,
            self._head.widths,
            self.device,
        )

    def _start_envs_anew(self) -> None:
        assert self.env is not None
        self._last_obs = self.env.reset()  # type: ignore[assignment]  # as SB3's own reset
        self._instruction_id = self._lane.begin()
        self._last_episode_starts = np.ones(self.n_envs, dtype=bool)
        self.envs_anew_at = self.num_timesteps

    @torch.no_grad()
    def _ask_prior(
        self, observations: Any, instruction_id: np.ndarray
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Return observations as tensors, what the prior says of them as the head reads it, and its trust [N]."""
        assert self.prior is not None
        assert not isinstance(self._head, PolicysOwnHead)
        seen = self._buffer.as_tensors(observations)
        assert isinstance(seen, Tensor)
        ids = self._prior_ids[torch.from_numpy(instruction_id).to(self.device)]
        answer = self.prior.query(states_of(self.prior, self._head, seen), ids)
        outputs = said_of(self._head, answer, len(seen))[: len(self._head.widths)]
        return seen, outputs, answer.trust

    def _drawn(self, outputs: tuple[Tensor, ...]) -> np.ndarray:
        """Return actions drawn from a prior's answers, as the env takes them."""
        assert not isinstance(self._head, PolicysOwnHead)
        actions = self._head.sample(outputs)[0].cpu().numpy()
        return bounded_actions(self.policy, actions.reshape(self.n_envs, *self.action_space.shape))  # type: ignore[misc]
