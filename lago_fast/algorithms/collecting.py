"""Collecting a rollout: act, step, store; then the checks, the prior's answers and the advantages.

Test: pytest tests/algorithms/test_fast_kl_ppo.py tests/algorithms/test_sb3_parity.py tests/algorithms/test_numbers.py
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from lago_fast import ops
from lago_fast.algorithms.captured import CapturedStep
from lago_fast.algorithms.heads import (
    CategoricalHead,
    GaussianHead,
    PolicysOwnHead,
    TextHead,
    decides_itself,
    make_head,
)
from lago_fast.algorithms.kl_coefficient import KLCoefficient
from lago_fast.algorithms.lanes import LaneStep, bounded_actions, episode_info
from lago_fast.algorithms.micro_batches import Halving
from lago_fast.algorithms.numbers import Numbers, check_last, check_rollout, check_unnormalised, observation_columns
from lago_fast.algorithms.overlapping import Actor, OverlappingPPO
from lago_fast.algorithms.prior_query import check_support, query_prior
from lago_fast.algorithms.stage_clock import StageClock
from lago_fast.algorithms.stepping import steps, torch_threads_beside
from lago_fast.algorithms.workers import name_env
from lago_fast.buffers import Observations, map_observations
from lago_fast.errors import NonFiniteError, UnsupportedArgument
from lago_fast.priors.base import ActionPrior


class CollectingPPO(OverlappingPPO):
    """PPO's first half; `FastKLPPO` sets up what is declared here."""

    prior_digest: str | None
    kl_coef: Any
    target_prior_kl: float | None
    auto_kl_coef: float
    impls: dict[str, str]
    stage_clock: StageClock
    kl_direction: str
    kl_placement: str
    prior_temperature: float
    _numbers: Numbers
    _kl_coefficient: KLCoefficient
    _prior_rows: Halving
    impl: str
    cuda_graph: bool
    set_prior: Callable[[ActionPrior], None]
    _captured: CapturedStep | None
    _dropped: bool  # whether the rollout was, so that nothing is learnt from it

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: SB3RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with one rollout; the signature is Stable-Baselines3's.

        Raises:
            NonFiniteError: an observation, a reward or the prior is NaN or infinite, with on_nan="raise".
            EnvironmentFailed: the process of an env died or does not answer.
        """
        if rollout_buffer is not self.rollout_buffer or n_rollout_steps != self.n_steps or env is not self.env:
            raise UnsupportedArgument("env, rollout_buffer, n_rollout_steps: only the model's own can be collected")
        own: Any = self._buffer
        if self.rollout_buffer is not own:
            raise UnsupportedArgument("rollout_buffer: it is part of this trainer; set n_steps, and it is made anew")
        self.policy.set_training_mode(False)
        callback.on_rollout_start()  # where checkpoints are written: before anything is drawn
        self._look_at_policy()
        if self.use_sde:
            self.policy.reset_noise(self.n_envs)
        clock = self.stage_clock
        clock.lap("logging")
        terminal_values: list[tuple[int, Tensor, Tensor]] = []
        n_steps = 0
        ahead = self._take_ahead()
        buffer, rollout_buffer = self._buffer, self.rollout_buffer
        if ahead is None:
            self._numbers.remember_normalisation(self)
            act = partial(self._act, Actor(self._head, buffer, clock, None))
            rollout = steps(self._lane, act, n_rollout_steps, self._last_obs, self._instruction_id, clock)
        else:
            rollout = self._replayed(ahead)
        # all at once: a call of torch's costs several times as much between two steps of a simulator
        seen = [buffer.observation_at(t) for t in range(n_rollout_steps)]
        said = list(zip(buffer.values[..., None], buffer.log_probs, strict=True))
        try:
            with closing(rollout), torch_threads_beside(self._lane):
                for n_steps in range(n_rollout_steps):
                    actions, clipped_actions, step = self._advance(rollout, n_steps)
                    self.num_timesteps += int(step.valid.sum())
                    # under the names by which callbacks read them in Stable-Baselines3, and the episodes that ended
                    dones, episodes = step.terminated | step.truncated, step.episodes
                    new_obs, rewards, infos = step.observation, step.reward, step.infos
                    obs_tensor, (values, log_probs) = seen[n_steps], said[n_steps]
                    callback.update_locals(locals())
                    if not callback.on_step():
                        return False
                    clock.lap("logging")
                    self._store(n_steps, step, terminal_values)
            self._finish_rollout(terminal_values, None if ahead is None else ahead.last_values)
        except NonFiniteError as error:
            self._numbers.drop_rollout(self, error, n_steps + 1)
            self._dropped = True
        n_steps = n_rollout_steps
        callback.update_locals(locals())
        callback.on_rollout_end()
        self.iterations += 1
        return True

    def _advance(
        self, rollout: Iterator[tuple[np.ndarray, np.ndarray, LaneStep]], t: int
    ) -> tuple[np.ndarray, np.ndarray, LaneStep]:
        """Act and step; return the actions, the actions as the env took them, and what came of them."""
        try:
            actions, bounded, step = next(rollout)
        except NonFiniteError:
            raise
        except Exception as error:
            # a policy that saw NaN cannot be sampled from, and an env may choke on what it says
            check_rollout(observation_columns(self._buffer), "mend the env", t + 1)
            check_rollout({"reward": self._buffer.rewards}, "mend the env", t)
            assert self.env is not None
            name_env(error, self.env, t, self.iterations)
            raise
        if self._vec_normalize_env is not None:
            check_unnormalised(self._vec_normalize_env, t)
        return actions, bounded, step

    def _store(self, t: int, step: LaneStep, terminal_values: list[tuple[int, Tensor, Tensor]]) -> None:
        """Keep what a step returned."""
        self._note_returns(step)
        for episode in step.episodes:
            self.ep_info_buffer.append(episode_info(episode, self.start_time / 1e9))  # type: ignore[union-attr]
        self.ep_success_buffer.extend(step.successes)  # type: ignore[union-attr]
        buffer = self._buffer
        buffer.write("rewards", t, step.reward)
        buffer.write("terminated", t, step.terminated)
        buffer.write("truncated", t, step.truncated)
        buffer.write("valid", t, step.valid)
        self.stage_clock.lap("transfer")
        if len(step.replaced):
            self._check_last(step.last_observation, step.replaced, t)
            envs = torch.as_tensor(step.replaced, device=self.device)
            terminal_values.append((t, envs, self._values(step.last_observation)))
        self._last_obs, self._instruction_id = step.observation, step.instruction_id
        self._last_episode_starts = step.terminated | step.truncated

    def _check_last(self, observation: Any, envs: np.ndarray, t: int) -> None:
        """Check observations that no column holds, seen after step t; what was bad before them is named first."""
        try:
            check_last(observation, envs, t)
        except NonFiniteError:
            columns = {**observation_columns(self._buffer), "reward": self._buffer.rewards}
            check_rollout(columns, "mend the env", t + 1)
            raise

    def _finish_rollout(
        self, terminal_values: list[tuple[int, Tensor, Tensor]], last_values: Tensor | None = None
    ) -> None:
        """Check the collected rows, ask the prior about them, and compute their advantages.

        Args:
            terminal_values: see `RolloutBuffer.bootstrap`.
            last_values: [N], V of the last observations; None: the present policy's.
        """
        buffer = self._buffer
        clock = self.stage_clock
        if isinstance(self._head, TextHead):
            self._head.fit_inputs(buffer.observations)
        self._check_last(self._last_obs, np.arange(self.n_envs), self.n_steps - 1)
        buffer.bootstrap(self._values(self._last_obs) if last_values is None else last_values, terminal_values)
        clock.lap("policy")
        check_rollout({**observation_columns(buffer), "reward": buffer.rewards}, "mend the env")
        clock.lap("transfer")
        if self.prior is not None:
            self._query_prior(self.prior)
            clock.lap("prior")
        buffer.compute_returns_and_advantage(self.gamma, self.gae_lambda, self.impls["gae"])
        clock.lap("advantage")
        self._let_guard_weigh()
        check_rollout({"advantage": buffer.advantages, "return": buffer.returns}, "scale the rewards")

    def _take_head(self) -> None:
        """Make what computes by the policy's networks."""
        self._head = make_head(self.policy, self._impl_of("mlp"))
        self.impls = {self._head.op: ops.resolve(self._head.op, self.device.type, self.impl)[0]}
        for op in ("adam", "gae", "mlp", "take_rows"):
            self.impls[op] = ops.resolve(op, self.device.type, self._impl_of(op))[0]
        graphed = self.cuda_graph and self.device.type == "cuda"  # a model from a GPU is loaded on a CPU, too
        self._captured = CapturedStep(self._head, self.impls["take_rows"]) if graphed else None

    def _look_at_policy(self) -> None:
        """Find policy, networks and the KL's weight where they are now: whoever holds the model may have changed them.

        Raises:
            UnsupportedArgument: a weight that has no meaning, or a policy that has no KL to the prior.
        """
        head = self._head
        replaced = type(head) in (GaussianHead, CategoricalHead) and decides_itself(self.policy)
        if head.policy is not self.policy or replaced:
            self._take_head()
            if self.prior is not None:
                self.set_prior(self.prior)
        if self._buffer.n_steps != self.n_steps or self._head.widths != head.widths:
            if self.overlap != "none":
                raise UnsupportedArgument("n_steps, policy: rollouts of another form need overlap='none'")
            self._buffer = self._new_buffer(self.n_steps)
            self.rollout_buffer = self._buffer  # type: ignore[assignment]  # under the name that callbacks read
        self._kl_coefficient = KLCoefficient(self.kl_coef, self.target_prior_kl, self.auto_kl_coef)
        if self._head.networks is not None:
            self._head.networks.refresh()
            self.impls["mlp"] = "cpp" if self._head.networks.native else "reference"

    def _impl_of(self, op: str) -> str:
        """Return the implementation wanted of an op beside the loss: the same where it is written for that op."""
        return self.impl if self.impl in ops.IMPLEMENTATIONS[op] else "auto"

    @torch.no_grad()
    def _act(
        self, actor: Actor, t: int, rows: slice, observation: Any, instruction_id: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Store what the policy sees, says and chooses at step t for some envs; return the actions, and in bounds."""
        if self.use_sde and self.sde_sample_freq > 0 and t % self.sde_sample_freq == 0:
            self.policy.reset_noise(self.n_envs)
        buffer, clock = actor.buffer, actor.clock
        buffer.write("instruction_id", t, instruction_id, rows)
        buffer.store_observation(t, observation, rows)
        clock.lap("transfer")
        head = actor.head
        if isinstance(head, PolicysOwnHead) or not head.act_into(buffer, t, rows, actor.generator):
            acted = head.act(buffer.observation_at(t, rows), actor.generator)
            for column, output in zip(
                (buffer.actions, buffer.values, buffer.log_probs, *buffer.policy_outputs),
                (acted.actions, acted.values, acted.log_prob, *acted.outputs),
                strict=True,
            ):
                column[t, rows] = output
        clock.lap("policy")
        actions = buffer.actions_at(t, rows).reshape(-1, *self.action_space.shape)  # type: ignore[misc]
        bounded = bounded_actions(actor.head.policy, actions)
        clock.lap("transfer")
        return actions, bounded

    @torch.no_grad()
    def _values(self, observations: Any) -> Tensor:
        return self.policy.predict_values(self._buffer.as_tensors(observations)).flatten()

    def _query_prior(self, prior: ActionPrior) -> None:
        """Ask the prior once about every collected step; charge its KL unless kl_placement="loss"."""
        buffer = self._buffer
        assert not isinstance(self._head, PolicysOwnHead)
        query_prior(prior, buffer, self._head, self._prior_ids, self._prior_rows)
        if self.kl_direction == "policy_prior" and type(self._head) is CategoricalHead:  # which masks no action
            check_support(buffer.prior_outputs[0])
        for key, value in prior.telemetry().items():
            self.logger.record(key, value)
        if self.kl_placement != "loss":
            kl = self._prior_kl(
                tuple(o.flatten(0, 1) for o in buffer.policy_outputs),
                tuple(o.flatten(0, 1) for o in buffer.prior_outputs),
                map_observations(lambda column: column.flatten(0, 1), buffer.observations),
            )
            # which Stable-Baselines3 brings up to date between a rollout and its update
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            coefficient = self._kl_coefficient.value(self._current_progress_remaining)
            buffer.rewards -= coefficient * kl.reshape_as(buffer.rewards)

    def _prior_kl(self, outputs: tuple[Tensor, ...], prior: tuple[Tensor, ...], observations: Observations) -> Tensor:
        head = self._head
        assert not isinstance(head, PolicysOwnHead)
        options: dict[str, Any] = {"kl_direction": self.kl_direction, "prior_temperature": self.prior_temperature}
        if isinstance(head, CategoricalHead):
            options["action_mask"] = head.action_mask(observations)
        return head.prior_kl(outputs, prior, **options)
