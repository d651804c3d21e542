"""FastKLPPO: Stable-Baselines3's PPO with an exact KL towards a frozen prior, and a faster loop.

It inherits learn, callbacks, logging, predict, save and load; collection and update are its own.
Sources: PPO, arXiv 1707.06347; the prior's term, LaGO (arXiv 2606.24669) and arXiv 2410.07927.
Test: pytest tests/algorithms
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

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
from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.algorithms.guard import GuardSettings, settings_of
from lago_fast.algorithms.gymnasium_vector import GymnasiumVecEnv
from lago_fast.algorithms.heads import PolicysOwnHead
from lago_fast.algorithms.imitating import ImitatingPPO
from lago_fast.algorithms.kl_coefficient import AUTO_START, KLCoefficient
from lago_fast.algorithms.micro_batches import Halving, MicroBatches
from lago_fast.algorithms.numbers import Numbers, check_parameters
from lago_fast.algorithms.prior_match import check_prior, match_env
from lago_fast.algorithms.refusals import check_guidance, check_loaded, check_values
from lago_fast.algorithms.stage_clock import StageClock
from lago_fast.algorithms.text_policy import attach_encoder
from lago_fast.algorithms.update_log import record_update
from lago_fast.algorithms.workers import STEP_TIMEOUT_S, watch, watch_evaluations
from lago_fast.errors import NonFiniteLoss, PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import ActionPrior

Schedule = Callable[[float], float]
ADAM_EPS = 1e-5  # Stable-Baselines3's


class FastKLPPO(ImitatingPPO):
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
        kl_placement: "loss" adds the KL to the loss; "reward" subtracts it from each step's reward; "both" does both,
            and is the gradient of E[sum_t gamma^t (r_t - kl_coef KL_t)]: a KL in the reward is the same for every
            action of its own state, so that it moves the policy there by the states that follow alone.
        prior_temperature: the prior is raised to 1 / temperature and renormalised.
        warm_start: spend the first rollout on fitting the policy to the prior, with no PPO update.
        guard: let the KL of a task (or instruction) count by whether the prior, which plays some episodes itself, does
            better than the policy, which imitates them then: True, or `GuardSettings`; with kl_placement="loss" and no
            kl_coef="auto".
        impl: implementation of the loss op (`lago_fast.ops`); the other ops take the same name where it is
            written for them, else "auto". `impls` says what came of it.
        on_nan: NaN or infinity in observations, rewards, the prior, losses or gradients: "raise" an error that names
            env and step, or "skip" the iteration with a warning. Either way the rows are saved beside the log, and
            policy and optimiser are what they were before the iteration.
        step_timeout_s: longest wait for a step or a reset of each env in a process of its own, and in this one of
            Stable-Baselines3's and gymnasium's loops, in the main thread and without other alarms; None: forever.
        overlap: "update" collects the next rollout while the policy is updated, so that it is learnt from one update
            late (`algorithms.overlapping` says what callbacks see); needs an env with an array lane and no gSDE.
        cuda_graph: replay the gradient step of a full minibatch as one CUDA graph; on a GPU, with Box or Discrete
            actions, this trainer's own optimiser, and neither `target_kl` nor `overlap`.

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
        on_nan: str = "raise",
        step_timeout_s: float | None = STEP_TIMEOUT_S,
        overlap: str = "none",
        cuda_graph: bool = False,
    ) -> None:
        if rollout_buffer_class is not None or rollout_buffer_kwargs:
            raise UnsupportedArgument("rollout_buffer_class, rollout_buffer_kwargs: the buffer is part of this trainer")
        check_values(
            kl_direction=kl_direction,
            kl_placement=kl_placement,
            prior_temperature=prior_temperature,
            overlap=overlap,
            cuda_graph=cuda_graph,
            target_kl=target_kl,
            device=device,
            n_epochs=n_epochs,
            batch_size=batch_size,
            ent_coef=ent_coef,
        )
        guard_settings = settings_of(guard)
        check_guidance(
            has_prior=prior is not None or not _init_setup_model,  # a model that is loaded gets its prior later
            warm_start=warm_start,
            guarded=guard_settings is not None,
            kl_placement=kl_placement,
            kl_coef=kl_coef,
        )
        self.kl_coef, self.target_prior_kl = kl_coef, target_prior_kl
        self.kl_direction, self.kl_placement = kl_direction, kl_placement
        self.prior_temperature, self.warm_start, self.impl = prior_temperature, warm_start, impl
        self.on_nan, self.step_timeout_s, self.overlap = on_nan, step_timeout_s, overlap
        self.cuda_graph = cuda_graph
        self.prior = prior
        self.prior_digest: str | None = None
        # plain numbers, which a saved model holds as text
        self.guard = None if guard_settings is None else asdict(guard_settings)
        self.guard_state = None
        self._guard, self._played, self._given, self._fitted_groups, self.envs_anew_at = None, None, None, [], 0
        self.auto_kl_coef = AUTO_START  # what kl_coef="auto" has come to
        self._kl_coefficient = KLCoefficient(kl_coef, target_prior_kl)
        self._begin_run()
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
                "optimizer_kwargs": {"eps": ADAM_EPS, "impl": self._impl_of("adam")},
            }
        # `policy_kwargs` stay the user's, and the policy's its own: what is saved of either names nothing that
        # Stable-Baselines3 does not know
        users, self.policy_kwargs = self.policy_kwargs, {**self.policy_kwargs, **own}
        super()._setup_model()
        self.policy_kwargs = users
        if own:
            self.policy.optimizer_class, self.policy.optimizer_kwargs = torch.optim.Adam, {"eps": ADAM_EPS}
        attach_encoder(self.policy, self.env)
        self._kl_coefficient = KLCoefficient(self.kl_coef, self.target_prior_kl, self.auto_kl_coef)
        self._numbers, self._dropped, self._gradient_steps = Numbers(self.on_nan), False, 0
        self._micro_batches, self._prior_rows = MicroBatches(), Halving("a prior query")
        self._take_head()
        self._buffer = self._new_buffer(self.n_steps)
        self.rollout_buffer = self._buffer  # type: ignore[assignment]  # under the name that callbacks read
        self.stage_clock = StageClock(self.device)
        self._set_up_overlap()
        if self.prior is not None:
            self.set_prior(self.prior)

    def _check_loaded(self, given: Mapping[str, Any]) -> None:
        check_loaded(self, given)
        settings = settings_of(self.guard)
        self.guard = None if settings is None else asdict(settings)

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
        if not isinstance(self.observation_space, spaces.Box):
            raise UnsupportedArgument(
                f"prior: it reads one vector of states, the env has {self.observation_space}; wrap it so that its "
                "observations are a Box"
            )
        check_prior(prior, self._head, self.prior_digest)
        if self.env is not None:
            self._prior_ids = match_env(prior, self.env).to(self.device)
        self.prior, self.prior_digest = prior, prior.digest

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Take another env of the same spaces, as in Stable-Baselines3; the prior's instructions are matched anew."""
        super().set_env(env, force_reset)
        attach_encoder(self.policy, self.env)
        if self.env is not None:
            watch(self.env, self.step_timeout_s)
        if self.prior is not None and self.env is not None:
            self._prior_ids = match_env(self.prior, self.env).to(self.device)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.prior is None and self.prior_digest is not None:
            raise PriorMismatch(
                f"prior: this model was trained with prior {self.prior_digest}; pass it to load(prior=...)"
            )
        reset_num_timesteps = kwargs.get("reset_num_timesteps", args[2] if len(args) > 2 else True)
        fresh_env = self._last_obs is None or reset_num_timesteps
        assert self.env is not None
        watch(self.env, self.step_timeout_s)
        result = super()._setup_learn(*args, **kwargs)
        watch_evaluations(result[1], self.step_timeout_s)
        if fresh_env or self._stepped_env is not self.env:
            self._take_lane()
        if reset_num_timesteps:
            self._begin_run()
        self._continue_log()
        self.stage_clock.start()
        return result

    # ---- update -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Update the policy from the buffer, `n_epochs` times over; an update that ends in NaN is undone.

        Raises:
            NonFiniteError: a loss or gradient became NaN or infinite, with on_nan="raise".
        """
        if self._dropped:
            self._dropped, self._played = False, None  # a checkpoint holds no rows that wait for an update
            return
        self._numbers.remember(self)
        try:
            with self._collecting_ahead():
                self._update()
            check_parameters(list(self.policy.parameters()), self._gradient_steps)
            self._note_imitated()
        except NonFiniteLoss as error:
            self._played = None
            self._numbers.undo_update(self, error)
            return
        self._numbers.passed(self.logger.name_to_value)

    def _update(self) -> None:
        buffer = self._buffer
        self.policy.set_training_mode(True)
        self._look_at_policy()
        self._update_learning_rate(self.policy.optimizer)
        parameters = list(self.policy.parameters())  # walking the modules costs as much as a backward pass
        if self._starts_from_prior():
            self.stage_clock.lap("logging")
            self.logger.record("train/prior_kl", self._start_from_prior(parameters))
            self.stage_clock.lap("update")
            self._close_iteration()
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
        clock = self.stage_clock
        columns = ops.columns(buffer.columns(), reuse=True, impl=self.impls["take_rows"])
        captured = self._captured if self.target_kl is None else None  # one that was set later asks the host
        if captured is not None:
            captured.begin(buffer, coefficients, self.batch_size, self.max_grad_norm, options)
        clock.lap("logging")
        for epoch in range(self.n_epochs):
            epoch_start = len(statistics)
            for rows in buffer.shuffled(self.batch_size):
                taken = None if captured is None else captured.take(rows)
                if taken is not None:
                    statistics.append(taken)
                    clock.lap("update")
                    continue
                batch = buffer.as_batch(columns.take(rows))
                clock.lap("transfer")
                outputs, values = self._micro_batches.evaluate(self._head, batch)
                clock.lap("policy")
                row, grads = self._head.loss_and_grads(outputs, values, batch, device_coefficients, **options)
                statistics.append(torch.stack(row))
                clock.lap("loss")
                if self.target_kl is not None and row.approx_kl > 1.5 * self.target_kl:
                    stopped = True
                    if self.verbose >= 1:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {row.approx_kl:.2f}")
                    break
                self._micro_batches.backward(self._head, batch, tuple(grads))
                clock.lap("backward")
                self._optimize(parameters)
                clock.lap("optimiser")
            self._n_updates += 1
            if stopped:
                break
        self._gradient_steps = len(statistics)
        found = torch.stack(statistics).cpu().numpy()
        prior_kl = record_update(self.logger, found, epoch_start, coefficients, buffer)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", torch.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.prior is not None:
            self.logger.record("train/prior_kl", prior_kl)
            self.logger.record("train/kl_coef", self._kl_coefficient.value(self._current_progress_remaining))
            self.auto_kl_coef = self._kl_coefficient.observe(prior_kl)
        clock.lap("logging")
        if self._imitates():
            check_parameters(parameters, self._gradient_steps)
            self._imitate_prior(parameters)
            clock.lap("update")
        self._close_iteration()

    def _close_iteration(self) -> None:
        """Log the seconds of each stage of the iteration that ends here, its update included."""
        for stage, seconds in self.stage_clock.close().items():
            if seconds > 0:
                self.logger.record(f"time/{stage}_s", seconds)

    def _coefficients(self) -> dict[str, float | None]:
        progress = self._current_progress_remaining
        in_loss = self.prior is not None and self.kl_placement != "reward"
        return {
            "clip_range": self.clip_range(progress),  # type: ignore[operator]
            "clip_range_vf": None if self.clip_range_vf is None else self.clip_range_vf(progress),  # type: ignore[operator]
            "ent_coef": self.ent_coef,
            "vf_coef": self.vf_coef,
            "kl_coef": self._kl_coefficient.value(progress) if in_loss else 0.0,
            "prior_temperature": self.prior_temperature,
        }
