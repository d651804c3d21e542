"""FastKLPPO: Stable-Baselines3's PPO with an exact KL towards a frozen prior, and a faster loop.

It inherits learn, callbacks, logging, predict, save and load; collection and update are its own.
Sources: PPO, arXiv 1707.06347; the prior's term, LaGO (arXiv 2606.24669) and arXiv 2410.07927.
Test: pytest tests/algorithms
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer as SB3RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from lago_fast import ops
from lago_fast.algorithms.atomic import replacing
from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.algorithms.guard import Guard, GuardSettings, guard_for, settings_of
from lago_fast.algorithms.gymnasium_vector import GymnasiumVecEnv
from lago_fast.algorithms.heads import PolicysOwnHead, make_head
from lago_fast.algorithms.kl_coefficient import AUTO_START, KLCoefficient
from lago_fast.algorithms.lanes import Episode, episode_info, lane_of
from lago_fast.algorithms.prior_match import check_prior, match_env
from lago_fast.algorithms.safe_load import safe_objects
from lago_fast.algorithms.update_log import record_update
from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import DeviceUnavailable, NonFiniteError, PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import ActionPrior

Schedule = Callable[[float], float]


def example_of(space: spaces.Space[Any]) -> np.ndarray | dict[str, np.ndarray]:
    """Return zeros of an observation's shape and dtype, key by key for a Dict."""
    if isinstance(space, spaces.Dict):
        return {key: np.zeros(part.shape or (), part.dtype) for key, part in space.items()}
    return np.zeros(space.shape or (), space.dtype)


class FastKLPPO(PPO):
    """PPO guided by a frozen action prior; without one, Stable-Baselines3's PPO.

    The positional arguments are Stable-Baselines3's, with its meanings and defaults. Refused by name:
    `rollout_buffer_class` and `rollout_buffer_kwargs`; a prior where the policy has no closed KL to one (action
    spaces other than Box and Discrete, `use_sde=True`, a policy class with a distribution of its own) or where the
    observation is a dictionary.

    Args:
        prior: frozen prior (`lago_fast.priors.base.ActionPrior`), queried once per collected step.
        kl_coef: weight of the KL: a number, a schedule of the progress remaining, or "auto".
        target_prior_kl: nats, for kl_coef="auto": the coefficient grows by 1.5 after a rollout whose mean
            KL is above 1.5 times the target and shrinks by 1.5 below the target over 1.5.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        kl_placement: "loss" adds the KL to the loss; "reward" subtracts it from each step's reward.
        prior_temperature: the prior is raised to 1 / temperature and renormalised.
        warm_start: spend the first rollout on fitting the policy to the prior, with no PPO update.
        guard: let the KL of a task (or instruction) count by whether the prior, which plays some episodes of its own
            first, does better than the policy: True, or `GuardSettings`; with kl_placement="loss", no kl_coef="auto".
        impl: implementation of the loss op (`lago_fast.ops`); the other ops take the same name where it is
            written for them, else "auto". `impls` says what came of it.

    Raises:
        UnsupportedArgument: a value that cannot be honoured.
        PriorMismatch: the prior was fitted for another space or other instructions.
        TrainablePrior: the prior has a parameter that requires a gradient.
        DeviceUnavailable: CUDA was asked for by name and is not there.
        ImplUnavailable: `impl` cannot run here.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: Any,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[SB3RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        prior: ActionPrior | None = None,
        kl_coef: float | Schedule | str = 0.1,
        target_prior_kl: float | None = None,
        kl_direction: str = "policy_prior",
        kl_placement: str = "loss",
        prior_temperature: float = 1.0,
        warm_start: bool = False,
        guard: bool | GuardSettings | None = None,
        impl: str = "auto",
    ) -> None:
        if rollout_buffer_class is not None or rollout_buffer_kwargs:
            raise UnsupportedArgument("rollout_buffer_class, rollout_buffer_kwargs: the buffer is part of this trainer")
        if kl_direction not in ("policy_prior", "prior_policy"):
            raise UnsupportedArgument(f"kl_direction={kl_direction!r}: choose 'policy_prior' or 'prior_policy'")
        if kl_placement not in ("loss", "reward"):
            raise UnsupportedArgument(f"kl_placement={kl_placement!r}: choose 'loss' or 'reward'")
        if prior_temperature <= 0:
            raise UnsupportedArgument(f"prior_temperature={prior_temperature}: give a number above 0")
        if warm_start and prior is None and _init_setup_model:
            raise UnsupportedArgument("warm_start: there is nothing to start from without a prior; pass prior=")
        guard_settings = settings_of(guard)
        if guard_settings is not None and (kl_placement == "reward" or kl_coef == "auto"):
            raise UnsupportedArgument(
                "guard: it weighs the KL in the loss by itself; use kl_placement='loss' and a kl_coef"
            )
        if guard_settings is not None and prior is None and _init_setup_model:
            raise UnsupportedArgument("guard: there is nothing to guard without a prior; pass prior=")
        if torch.device("cpu" if device == "auto" else device).type == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(f"device={device!r}: this machine has no CUDA device; use device='cpu' or 'auto'")
        self.kl_coef, self.target_prior_kl = kl_coef, target_prior_kl
        self.kl_direction, self.kl_placement = kl_direction, kl_placement
        self.prior_temperature, self.warm_start, self.impl = prior_temperature, warm_start, impl
        self.prior = prior
        self.prior_digest: str | None = None
        # plain numbers, which a saved model holds as text
        self.guard = None if guard_settings is None else asdict(guard_settings)
        self.guard_state: dict[str, list[float]] | None = None
        self._guard: Guard | None = None
        self.auto_kl_coef = AUTO_START  # what kl_coef="auto" has come to
        self._kl_coefficient = KLCoefficient(kl_coef, target_prior_kl)
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps,
            batch_size,
            n_epochs,
            gamma,
            gae_lambda,
            clip_range,
            clip_range_vf,
            normalize_advantage,
            ent_coef,
            vf_coef,
            max_grad_norm,
            use_sde,
            sde_sample_freq,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    # ---- setting up -------------------------------------------------------------------------------------------

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        if isinstance(env, VectorEnv):
            env = GymnasiumVecEnv(env)
        return PPO._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        own: dict[str, Any] = {}
        if "optimizer_class" not in self.policy_kwargs and "optimizer_kwargs" not in self.policy_kwargs:
            # Stable-Baselines3's Adam, in one call per step
            own = {
                "optimizer_class": FlatAdam,
                "optimizer_kwargs": {"eps": 1e-5, "impl": self._impl_of("adam")},
            }
        # `policy_kwargs` stay the user's: a saved model names nothing that Stable-Baselines3 does not know
        users, self.policy_kwargs = self.policy_kwargs, {**self.policy_kwargs, **own}
        super()._setup_model()
        self.policy_kwargs = users
        self._kl_coefficient = KLCoefficient(self.kl_coef, self.target_prior_kl, self.auto_kl_coef)
        self._head = make_head(self.policy, self._impl_of("mlp"))
        self.impls = {self._head.op: ops.resolve(self._head.op, self.device.type, self.impl)[0]}
        for op in ("adam", "gae", "mlp", "take_rows"):
            self.impls[op] = ops.resolve(op, self.device.type, self._impl_of(op))[0]
        self._buffer = RolloutBuffer(
            self.n_steps,
            self.n_envs,
            example_of(self.observation_space),
            self._head.action_shape,
            torch.int64 if isinstance(self.action_space, spaces.Discrete) else torch.float32,
            self._head.widths,
            self.device,
        )
        self.rollout_buffer = self._buffer  # type: ignore[assignment]  # under the name that callbacks read
        if self.prior is not None:
            self.set_prior(self.prior)

    def _impl_of(self, op: str) -> str:
        """Return the implementation wanted of an op beside the loss: the same where it is written for that op."""
        return self.impl if self.impl in ops.IMPLEMENTATIONS[op] else "auto"

    def _look_at_policy(self) -> None:
        """Find the policy's networks where they are now: whoever holds the model may have changed them."""
        if self._head.networks is not None:
            self._head.networks.refresh()
            self.impls["mlp"] = "cpp" if self._head.networks.native else "reference"

    def set_prior(self, prior: ActionPrior) -> None:
        """Take `prior` as this model's prior, after checking that it fits.

        Raises:
            TrainablePrior, PriorMismatch, UnsupportedArgument: see the class.
        """
        if isinstance(self._head, PolicysOwnHead):
            raise UnsupportedArgument(
                f"prior: {type(self.policy.action_dist).__name__} of {type(self.policy).__name__} has no closed KL to "
                "one; use a Box or Discrete action space without use_sde, or pass prior=None"
            )
        if isinstance(self.observation_space, spaces.Dict):
            raise UnsupportedArgument("prior: it reads one vector of states, the env has a Dict; flatten it")
        check_prior(prior, self._head, self.prior_digest)
        if self.env is not None:
            self._prior_ids = match_env(prior, self.env).to(self.device)
        self.prior, self.prior_digest = prior, prior.digest

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.prior is None and self.prior_digest is not None:
            raise PriorMismatch(
                f"prior: this model was trained with prior {self.prior_digest}; pass it to load(prior=...)"
            )
        fresh_env = self._last_obs is None or kwargs.get("reset_num_timesteps", args[2] if len(args) > 2 else True)
        result = super()._setup_learn(*args, **kwargs)
        if fresh_env:
            assert self.env is not None
            self._lane = lane_of(self.env)
            self._instruction_id = self._lane.begin()
            self._guard = guard_for(settings_of(self.guard), self.env, self._buffer, self.guard_state)
        self._let_prior_play(result[0])
        return result

    # ---- collection -------------------------------------------------------------------------------------------

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: SB3RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with one rollout; the signature is Stable-Baselines3's.

        Raises:
            NonFiniteError: an observation or a reward is NaN or infinite.
        """
        buffer = self._buffer
        if rollout_buffer is not self.rollout_buffer or n_rollout_steps != self.n_steps or env is not self.env:
            raise UnsupportedArgument("env, rollout_buffer, n_rollout_steps: only the model's own can be collected")
        self.policy.set_training_mode(False)
        self._look_at_policy()
        if self.use_sde:
            self.policy.reset_noise(self.n_envs)
        callback.on_rollout_start()
        terminal_values: list[tuple[int, Tensor, Tensor]] = []
        for t in range(n_rollout_steps):
            if self.use_sde and self.sde_sample_freq > 0 and t % self.sde_sample_freq == 0:
                self.policy.reset_noise(self.n_envs)
            actions = self._act(buffer, t)
            step = self._lane.step(self._bounded(actions))
            self.num_timesteps += int(step.valid.sum())
            infos, episodes, dones, rewards = (
                step.infos,
                step.episodes,
                step.terminated | step.truncated,
                step.reward,
            )
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._note_episodes(episodes)
            for column, array in (
                (buffer.rewards, step.reward),
                (buffer.terminated, step.terminated),
                (buffer.truncated, step.truncated),
                (buffer.valid, step.valid),
            ):
                column[t] = torch.from_numpy(array)
            if len(step.replaced):
                envs = torch.as_tensor(step.replaced, device=self.device)
                terminal_values.append((t, envs, self._values(step.last_observation)))
            self._last_obs, self._instruction_id = step.observation, step.instruction_id
            self._last_episode_starts = dones
        buffer.bootstrap(self._values(self._last_obs), terminal_values)
        seen = buffer.observations
        for column in seen.values() if isinstance(seen, dict) else (seen,):
            self._check_finite(column, "observation")
        self._check_finite(buffer.rewards, "reward")
        if self.prior is not None:
            self._query_prior(self.prior)
        buffer.compute_returns_and_advantage(self.gamma, self.gae_lambda, self.impls["gae"])
        self._let_guard_weigh(buffer)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _note_episodes(self, episodes: list[Episode]) -> None:
        """Keep what is known of episodes that just ended."""
        if self._guard is not None:
            self._guard.note(self._guard.policy, episodes, self._instruction_id)
        for episode in episodes:
            self.ep_info_buffer.append(episode_info(episode, self.start_time / 1e9))  # type: ignore[union-attr]
            if episode.success is not None:
                self.ep_success_buffer.append(episode.success)  # type: ignore[union-attr]

    @torch.no_grad()
    def _act(self, buffer: RolloutBuffer, t: int) -> np.ndarray:
        """Store what the policy sees, says and chooses at step t; return the actions, not clipped."""
        buffer.instruction_id[t] = torch.from_numpy(self._instruction_id)
        acted = self._head.act(buffer.store_observation(t, self._last_obs))
        buffer.actions[t], buffer.values[t], buffer.log_probs[t] = acted.actions, acted.values, acted.log_prob
        for column, output in zip(buffer.policy_outputs, acted.outputs, strict=True):
            column[t] = output
        return acted.actions.cpu().numpy().reshape(self.n_envs, *self.action_space.shape)  # type: ignore[misc]

    def _bounded(self, actions: np.ndarray) -> np.ndarray:
        """Return the actions as the env takes them."""
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        # the policy is an unbounded Gaussian; the env gets its samples inside the box
        return np.clip(actions, self.action_space.low, self.action_space.high)

    @torch.no_grad()
    def _values(self, observations: Any) -> Tensor:
        return self.policy.predict_values(self._buffer.as_tensors(observations)).flatten()

    def _query_prior(self, prior: ActionPrior) -> None:
        """Ask the prior once about every collected step; with kl_placement="reward", charge its KL."""
        buffer = self._buffer
        assert isinstance(buffer.observations, Tensor)
        states = buffer.observations.flatten(0, 1).flatten(1)[:, : prior.state_dim]
        answer = prior.query(states, self._prior_ids[buffer.instruction_id.flatten()])
        assert not isinstance(self._head, PolicysOwnHead)
        for column, output in zip(buffer.prior_outputs, self._head.prior_outputs(answer), strict=True):
            column.copy_(output.reshape(column.shape))
        buffer.trust = None if answer.trust is None else answer.trust.reshape(buffer.values.shape)
        if torch.isnan(torch.stack([column.sum() for column in buffer.prior_outputs])).any():
            raise NonFiniteError("prior: it answered NaN; check its files with `lago info`, or fit it again")
        for key, value in prior.telemetry().items():
            self.logger.record(key, value)
        if self.kl_placement == "reward":
            kl = self._prior_kl(
                tuple(o.flatten(0, 1) for o in buffer.policy_outputs),
                tuple(o.flatten(0, 1) for o in buffer.prior_outputs),
            )
            buffer.rewards -= self._kl_coefficient.value(self._current_progress_remaining) * kl.reshape_as(
                buffer.rewards
            )

    def _let_guard_weigh(self, buffer: RolloutBuffer) -> None:
        """Have the guard decide how much each row's KL counts in the update to come."""
        if self._guard is not None:
            self.guard_state = self._guard.weigh(buffer, self.logger)

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
        return self._bounded(actions.reshape(self.n_envs, *self.action_space.shape))  # type: ignore[misc]

    def _prior_kl(self, outputs: tuple[Tensor, ...], prior: tuple[Tensor, ...]) -> Tensor:
        assert not isinstance(self._head, PolicysOwnHead)
        return self._head.prior_kl(
            outputs, prior, kl_direction=self.kl_direction, prior_temperature=self.prior_temperature
        )

    def _check_finite(self, column: Tensor, name: str) -> None:
        if column.is_floating_point() and not torch.isfinite(column).all():
            t, env = (~torch.isfinite(column)).nonzero()[0, :2].tolist()
            raise NonFiniteError(
                f"env: {name} of env {env} at step {t} of this rollout is NaN or infinite; mend the env"
            )

    # ---- update -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Update the policy from the buffer, `n_epochs` times over.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
        """
        buffer = self._buffer
        self.policy.set_training_mode(True)
        self._look_at_policy()
        self._update_learning_rate(self.policy.optimizer)
        parameters = list(self.policy.parameters())  # walking the modules costs as much as a backward pass
        if self.warm_start and self._n_updates == 0:
            self._fit_to_prior(parameters)
            return
        coefficients = self._coefficients()
        device_coefficients = ops.coefficients_on(self.device, **coefficients)
        options: dict[str, Any] = {
            "kl_direction": self.kl_direction,
            "normalize_advantage": self.normalize_advantage,
            "impl": self.impls[self._head.op],
        }
        statistics: list[Tensor] = []  # [7] each, read once at the end
        epoch_start, stopped = 0, False
        for epoch in range(self.n_epochs):
            epoch_start = len(statistics)
            for batch in buffer.get(self.batch_size, reuse=True, impl=self.impls["take_rows"]):
                outputs, values = self._head.evaluate(batch)
                row, grads = self._head.loss_and_grads(outputs, values, batch, device_coefficients, **options)
                statistics.append(torch.stack(row))
                if self.target_kl is not None and row.approx_kl > 1.5 * self.target_kl:
                    stopped = True
                    if self.verbose >= 1:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {row.approx_kl:.2f}")
                    break
                self.policy.optimizer.zero_grad()
                self._head.backward(outputs, values, grads)
                self._optimize(parameters)
            self._n_updates += 1
            if stopped:
                break
        rows = torch.stack(statistics).cpu().numpy()
        prior_kl = record_update(self.logger, rows, epoch_start, coefficients, buffer)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", torch.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.prior is not None:
            self.logger.record("train/prior_kl", prior_kl)
            self.logger.record("train/kl_coef", self._kl_coefficient.value(self._current_progress_remaining))
            self.auto_kl_coef = self._kl_coefficient.observe(prior_kl)

    def _optimize(self, parameters: list[torch.nn.Parameter]) -> None:
        """Clip the gradients and take a step."""
        optimizer = self.policy.optimizer
        if isinstance(optimizer, FlatAdam):
            optimizer.clipped_step(self.max_grad_norm)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()

    def _coefficients(self) -> dict[str, float | None]:
        progress = self._current_progress_remaining
        in_loss = self.prior is not None and self.kl_placement == "loss"
        return {
            "clip_range": self.clip_range(progress),  # type: ignore[operator]
            "clip_range_vf": None if self.clip_range_vf is None else self.clip_range_vf(progress),  # type: ignore[operator]
            "ent_coef": self.ent_coef,
            "vf_coef": self.vf_coef,
            "kl_coef": self._kl_coefficient.value(progress) if in_loss else 0.0,
            "prior_temperature": self.prior_temperature,
        }

    def _fit_to_prior(self, parameters: list[torch.nn.Parameter]) -> None:
        """Fit the policy to the prior on the first rollout's states; the stored ratios are stale after it."""
        for _ in range(self.n_epochs):
            for batch in self._buffer.get(self.batch_size, reuse=True, impl=self.impls["take_rows"]):
                outputs, values = self._head.evaluate(batch)
                leaves = tuple(output.detach().requires_grad_() for output in outputs)
                kl = (self._prior_kl(leaves, batch.prior) * batch.weight).sum() / batch.weight.sum().clamp(min=1)
                grads = (*torch.autograd.grad(kl, leaves), torch.zeros_like(values))
                self.policy.optimizer.zero_grad()
                self._head.backward(outputs, values, grads)
                self._optimize(parameters)
            self._n_updates += 1
        self.logger.record("train/prior_kl", kl.item())

    # ---- saving and loading -----------------------------------------------------------------------------------

    def _excluded_save_params(self) -> list[str]:
        # the prior is saved by itself; its digest stays in the model
        return [
            *super()._excluded_save_params(),
            "prior",
            "_lane",
            "_head",
            "_buffer",
            "_prior_ids",
            "_instruction_id",
            "_guard",
            "_kl_coefficient",
            "impls",
        ]

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Write the model as Stable-Baselines3 does, the file whole or not at all.

        Args:
            path: where to, ".zip" is added where there is no suffix; or an open file.
            exclude, include: names of attributes, as there.

        Raises:
            NotSaved: the system could not write it; a file of before stands.
        """
        if not isinstance(path, str | Path):
            super().save(path, exclude, include)
            return
        path = Path(path)
        with replacing(path if path.suffix else path.with_suffix(".zip")) as file:
            super().save(file, exclude, include)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls,
        path: Any,
        env: Any = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        prior: ActionPrior | None = None,
        trust_pickle: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a model of this class or of Stable-Baselines3's PPO; no code from the file is run.

        Args:
            path, env, device, custom_objects, print_system_info, force_reset, and the rest: as there.
            prior: the prior that the model was trained with; needed to go on learning, not to predict.
            trust_pickle: let the file's pickles run whatever they say, as Stable-Baselines3 does.

        Raises:
            PriorMismatch: it is another prior.
            UntrustedPickle: an entry refers to something that could run code, such as a lambda as schedule.
            CorruptFile: the file is damaged, or unpacks to what no model needs.
        """
        objects = custom_objects if trust_pickle else safe_objects(path, custom_objects)
        model = super().load(path, env, device, objects, print_system_info, force_reset, **kwargs)
        if prior is not None:
            model.set_prior(prior)
        return model
