"""How a model is kept: Stable-Baselines3's zip for its weights, checkpoints for a whole training run.

Test: pytest tests/algorithms/test_safe_load.py tests/algorithms/test_atomic.py tests/algorithms/test_resume.py
"""

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from stable_baselines3 import PPO
from torch import Tensor

from lago_fast.algorithms import training_state
from lago_fast.algorithms.atomic import replacing
from lago_fast.algorithms.checkpoint import newest
from lago_fast.algorithms.lanes import GroupedLane, Lane, lane_of
from lago_fast.algorithms.safe_load import MISFITS, safe_objects
from lago_fast.errors import CorruptFile, LagoError, UnsupportedArgument
from lago_fast.priors.base import ActionPrior

# attributes that a saved model is without; of the prior, which is saved by itself, the digest stays
NOT_SAVED = (
    *("prior", "_lane", "_stepped_env", "_ahead", "_spare", "_head", "_buffer", "_prior_ids", "_instruction_id"),
    *("_guard", "_played"),
    *("_given", "_fitted_groups", "envs_anew_at"),
    *("_kl_coefficient", "stage_clock", "impls", "_numbers", "_dropped", "_gradient_steps", "_micro_batches"),
    "_captured",
    *("_prior_rows", "iterations", "run_id", "resumed"),
)


class KeptPPO(PPO):
    """Stable-Baselines3's PPO with files that are whole or not there, and runs that can be resumed."""

    iterations: int  # whole ones since training began
    run_id: str  # of the training run that checkpoints belong to
    resumed: dict[str, Any]  # what the log needs of the run before; empty in one that began here
    _lane: Lane
    _stepped_env: Any = None  # whose lane it is
    _instruction_id: np.ndarray

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

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NOT_SAVED]

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
            CorruptFile: the file is damaged, unpacks to what no model needs, or holds what makes no model.
            UnsupportedArgument: a value in `kwargs` cannot be honoured.
        """
        objects = custom_objects if trust_pickle else safe_objects(path, custom_objects)
        try:
            model = super().load(path, env, device, objects, print_system_info, force_reset, **kwargs)
        except MISFITS as error:
            if not (custom_objects or trust_pickle or isinstance(error, LagoError)):
                cls._check_file_alone(path, device, objects, error)
            raise
        if kwargs:
            model._check_loaded(kwargs)
        if prior is not None:
            model.set_prior(prior)  # type: ignore[attr-defined]
        return model

    def _check_loaded(self, given: Mapping[str, Any]) -> None:
        """Check what `load` was given in place of the file's values; without a prior there is nothing to."""

    @classmethod
    def _check_file_alone(cls, path: Any, device: Any, objects: dict[str, Any] | None, error: Exception) -> None:
        """Raise CorruptFile where a file makes no model whatever else the caller gives."""
        try:
            super().load(path, None, device, objects)
        except MISFITS as cause:
            raise CorruptFile(f"path: {path} makes no model ({cause}); save the model again") from error

    # ---- checkpoints ------------------------------------------------------------------------------------------

    @classmethod
    def resume(cls, path: str | Path, env: Any, *, prior: ActionPrior | None = None, **arguments: Any) -> Self:
        """Return a model that goes on where a checkpoint was written; `learn(..., reset_num_timesteps=False)` next.

        Args:
            path: of a checkpoint, or of the folder of `CheckpointEvery`, whose newest is taken.
            env: as the run's; its episodes start anew, with seeds that follow from (seed, iteration).
            prior: the run's.
            arguments: of the constructor, where they are to differ; needed for what no JSON holds (`policy`,
                schedules and policy_kwargs that refer to classes or functions), and for `tensorboard_log`.

        Raises:
            NoCheckpoint, CorruptFile, HashMismatch: there is none, or none that is whole.
            PriorMismatch: it is another prior.
            UnsupportedArgument: an argument is needed, or does not fit the checkpoint.
        """
        kept = training_state.arguments_in(newest(Path(path))[1], arguments)
        model = cls(**kept, env=env, prior=prior)  # type: ignore[call-arg]
        model.restore(path)
        return model

    def restore(self, path: str | Path) -> dict[str, Any]:
        """Make this model, built with the run's arguments, what it was at a checkpoint; see `resume`.

        Returns:
            What `CheckpointEvery(also=...)` kept, by name.
        """
        state = newest(Path(path))[1]
        training_state.put_back(self, state)  # type: ignore[arg-type]  # of the whole class, which this is a part of
        also: dict[str, Any] = state.figures.get("also", {})
        return also

    def restart_envs(
        self, build: Callable[[], Any] | None = None, *, normalisation: dict[str, Tensor] | None = None
    ) -> None:
        """Start new episodes everywhere, with seeds that follow from (seed, iteration).

        The global random generators stay where they are, whatever the envs draw from them.

        Args:
            build: makes the envs to take in place of the present ones, which are not closed; None: these.
            normalisation: statistics of rewards and observations to go on with; None: the present envs'.

        Raises:
            UnsupportedArgument: the new envs do not normalise what the others do.
        """
        kept = training_state.normalisation_of(self.env) if normalisation is None else normalisation
        with training_state.same_random_numbers(self.device):
            if build is not None:
                self.set_env(build())
            assert self.env is not None
            training_state.normalise_by(self.env, kept)
            seed = training_state.seed_of(self.seed, self.iterations)
            if seed is not None:
                self.env.seed(seed)
            self.start_episodes()

    def start_episodes(self) -> None:
        """Reset every env."""
        assert self.env is not None
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(self.n_envs, dtype=bool)
        self._take_lane()

    def fresh_averages(self) -> tuple[deque[Any], deque[Any]]:
        """Return empty buffers for the episodes and successes that the log averages over."""
        return deque(maxlen=self._stats_window_size), deque(maxlen=self._stats_window_size)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write a row of the log; its count of iterations goes on from the run that was resumed."""
        super().dump_logs(iteration + self.resumed.get("iterations", 0) if iteration else 0)

    def _begin_run(self) -> None:
        self.iterations, self.run_id, self.resumed = 0, uuid.uuid4().hex, {}

    def _take_lane(self) -> None:
        assert self.env is not None
        self._lane, self._stepped_env = lane_of(self.env), self.env
        if self.use_sde and isinstance(self._lane, GroupedLane):
            raise UnsupportedArgument("use_sde: its noise belongs to all envs at once; make the env with groups=1")
        self._instruction_id = self._lane.begin()

    def _continue_log(self) -> None:
        """Let clock and averages go on from where the run was left; called once learning has set up its logger."""
        if not self.resumed.get("elapsed_ns"):
            return
        self.start_time = time.time_ns() - self.resumed.pop("elapsed_ns")
        self._num_timesteps_at_start = self.resumed["_num_timesteps_at_start"]
        for name, plain, kind, count, excluded in self.resumed.pop("log"):
            value = plain if kind is None else np.dtype(kind).type(plain)
            self.logger.name_to_value[name], self.logger.name_to_count[name] = value, count
            self.logger.name_to_excluded[name] = excluded
