"""NaN and infinity: found within the iteration, named, kept for inspection, and undone.

The checks read the host once per rollout and once per update, from what is stored anyway.
Test: pytest tests/algorithms/test_numbers.py
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from lago_fast.algorithms.checkpoint import write_tensors
from lago_fast.algorithms.training_state import normalisation_of, normalise_by
from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import NonFiniteError, NonFiniteLoss, NotSaved, UnsupportedArgument

if TYPE_CHECKING:
    from lago_fast.algorithms.collecting import CollectingPPO

ON_NAN = ("raise", "skip")
MAX_SKIPS = 10  # iterations dropped in a row; more cannot be bad luck
# nats: a sound update moves the policy by a hundredth of the first; a sound guided run stays a tenth off the prior
ALARMS = (
    ("train/approx_kl", 1.0, "lower learning_rate or n_epochs, or set target_kl"),
    ("train/prior_kl", 100.0, "raise kl_coef, or look at the prior"),
)

logger = logging.getLogger(__name__)


def observation_columns(buffer: RolloutBuffer) -> dict[str, Tensor]:
    """Return the observations [T, N, ...] by the names of an error message."""
    seen = buffer.observations
    if not isinstance(seen, dict):
        return {"observation": seen}
    return {f"observation {key!r}": column for key, column in seen.items()}


def check_rollout(columns: Mapping[str, Tensor], remedy: str, steps: int | None = None) -> None:
    """Raise NonFiniteError when one of the columns [T, N, ...] holds NaN or infinity, naming env and step.

    Args:
        columns: by the names of the error message; integers are passed.
        remedy: the message's last words.
        steps: only so many are filled; None: all.
    """
    floats = {name: column[:steps] for name, column in columns.items() if column.is_floating_point()}
    if not floats or bool(torch.stack([torch.isfinite(column).all() for column in floats.values()]).all()):
        return
    name, column = next((n, c) for n, c in floats.items() if not bool(torch.isfinite(c).all()))
    t, env = (~torch.isfinite(column)).nonzero()[0, :2].tolist()
    raise NonFiniteError(f"env: {name} of env {env} at step {t} of this rollout is NaN or infinite; {remedy}")


def check_last(observation: Any, envs: np.ndarray, step: int) -> None:
    """Raise NonFiniteError when an observation that no column holds, an episode's or the rollout's last, is not finite.

    Args:
        observation: [k, ...], or a dictionary of such.
        envs: [k] whose they are.
        step: of this rollout, after which they were seen.
    """
    for array in observation.values() if isinstance(observation, dict) else [observation]:
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            env = envs[np.isfinite(array).reshape(len(array), -1).all(axis=1).argmin()]
            raise NonFiniteError(
                f"env: the last observation of env {env}, after step {step} of this rollout, is NaN or infinite; mend "
                "the env"
            )


def check_answers(observations: Tensor, outputs: tuple[Tensor, ...], step: int) -> None:
    """Raise NonFiniteError, with these rows, where the prior that plays sees or says NaN or infinity.

    Args:
        observations, outputs: [N, ...] of the envs; an output of -infinity is a probability of 0.
        step: of the prior's own episodes.
    """
    lowest = torch.finfo(torch.float32).min
    columns = {"observation": observations, **{f"prior.{i}": output for i, output in enumerate(outputs)}}
    for name, column in columns.items():
        bounded = column if name == "observation" else column.clamp(min=lowest)
        bad = ~torch.isfinite(bounded.float().flatten(1)).all(dim=1)
        if not bool(bad.any()):
            continue
        where = f"env {int(bad.nonzero()[0])} at step {step} of the prior's own episodes"
        if name == "observation":
            raise NonFiniteError(f"env: observation of {where} is NaN or infinite; mend the env", columns)
        raise NonFiniteError(
            f"env: {name} of the prior in the state of {where} is NaN or infinite; check the prior's files with "
            "`lago info`, or fit it again",
            columns,
        )


def check_unnormalised(env: VecNormalize, step: int) -> None:
    """Raise NonFiniteError when what a VecNormalize has just been given is NaN or infinite: it would spread."""
    observations = env.old_obs if isinstance(env.old_obs, dict) else {"": env.old_obs}
    for name, column in (*observations.items(), ("", env.old_reward)):
        if not np.isfinite(column).all():
            who = int(np.argwhere(~np.isfinite(column))[0, 0])
            what = "reward" if column is env.old_reward else f"observation {name}".strip()
            raise NonFiniteError(
                f"env: {what} of env {who} after step {step} of this rollout is NaN or infinite; mend the env"
            )


def check_parameters(parameters: list[torch.nn.Parameter], gradient_steps: int) -> None:
    """Raise NonFiniteLoss when a parameter is NaN after an update of so many steps."""
    # clipping makes NaN of an infinite gradient too; a parameter may be infinite on purpose, as a bias that forbids
    if bool(torch.stack([torch.isnan(p).any() for p in parameters]).any()):
        raise NonFiniteLoss(
            "gradients: of the update's last minibatch they were NaN or infinite; lower learning_rate, or scale the "
            "rewards",
            gradient_steps - 1,
        )


class Numbers:
    """What a trainer does about NaN and infinity.

    Args:
        on_nan: "raise" an error, or "skip" the iteration with a warning.

    Raises:
        UnsupportedArgument: another `on_nan`.
    """

    def __init__(self, on_nan: str) -> None:
        if on_nan not in ON_NAN:
            raise UnsupportedArgument(f"on_nan={on_nan!r}: choose 'raise' or 'skip'")
        self.on_nan = on_nan
        self.skipped = 0  # iterations, in a row
        self._alarmed: set[str] = set()
        self._prior_kl = math.inf  # of the last update

    def remember_normalisation(self, model: "CollectingPPO") -> None:
        """Keep copies of what normalises, as it is before a rollout: a NaN would stay in it for good."""
        self._normalisation = normalisation_of(model.env)

    def remember(self, model: "CollectingPPO") -> None:
        """Keep copies of policy, optimiser and the generator of minibatches, as they are before an update."""
        self._policy = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
        optimizer = model.policy.optimizer.state_dict()
        state = {i: {k: _copy(v) for k, v in moments.items()} for i, moments in optimizer["state"].items()}
        self._optimizer = {"state": state, "param_groups": [dict(group) for group in optimizer["param_groups"]]}
        self._random, self._n_updates = np.random.get_state(), model._n_updates  # noqa: NPY002  it draws minibatches

    def drop_rollout(self, model: "CollectingPPO", error: NonFiniteError, steps: int) -> None:
        """Save the rollout's first steps, put back what normalises; raise the error again, or start new episodes."""
        assert model.env is not None
        normalise_by(model.env, self._normalisation)
        model._last_obs = None  # whoever learns on after the error starts new episodes
        rows = dict(_columns(model._buffer, steps)) if error.rows is None else error.rows
        saved = self._saved(model, model.iterations, rows)
        self._settle(error, model.iterations, f"{error}{saved}")
        model.start_episodes()

    def undo_update(self, model: "CollectingPPO", error: NonFiniteLoss) -> None:
        """Put policy and optimiser back to before the update and save the minibatch; raise again, or skip.

        Raises:
            NonFiniteError: naming the minibatch's most extreme row and where it was saved.
        """
        model.policy.load_state_dict(self._policy)
        model.policy.optimizer.load_state_dict(self._optimizer)
        model._n_updates = self._n_updates
        where, batch = "", error.rows or {}
        if error.gradient_step is not None:
            batch = self._minibatch(model, error.gradient_step)
            row = _most_extreme(batch)
            extreme = f"its most extreme row is env {int(batch['env'][row])} at step {int(batch['step'][row])}"
            where = f" (gradient step {error.gradient_step}; {extreme})"
        before = {f"policy.{name}": tensor for name, tensor in self._policy.items()}
        iteration = max(model.iterations - 1, 0)  # the rollout is counted already
        saved = self._saved(model, iteration, {**batch, **before})
        self._settle(error, iteration, f"{error}{where}; the update is undone{saved}")

    def passed(self, logged: Mapping[str, Any]) -> None:
        """Take note of an update without NaN; warn when the ratio or the KL to the prior explodes.

        The warning comes once, until the figure has fallen again. The approximate KL from the old policy grows with
        the ratio itself; a policy that comes nearer to its prior by as much goes where it is sent: no warning.

        Args:
            logged: the update's figures by name, nats.
        """
        self.skipped = 0
        prior_kl = logged.get("train/prior_kl", math.inf)
        nearer, self._prior_kl = self._prior_kl - prior_kl, prior_kl
        for name, alarm, remedy in ALARMS:
            follows_prior = name == "train/approx_kl" and logged.get(name, 0.0) <= nearer < math.inf
            if follows_prior or not logged.get(name, 0.0) > alarm:
                self._alarmed.discard(name)
            elif name not in self._alarmed:
                self._alarmed.add(name)
                logger.warning("%s diverges: %.3g nats, where %g are much; %s", name, logged[name], alarm, remedy)

    def _settle(self, error: NonFiniteError, iteration: int, message: str) -> None:
        self.skipped += 1
        if self.on_nan == "raise":
            raise NonFiniteError(message) from error
        if self.skipped > MAX_SKIPS:
            raise NonFiniteError(f"{message}; {MAX_SKIPS} iterations before were skipped for the like") from error
        logger.warning("iteration %d is skipped: %s", iteration, message)

    def _saved(self, model: "CollectingPPO", iteration: int, tensors: dict[str, Tensor]) -> str:
        """Save the offending rows beside the run's log; return the end of a message that says where."""
        folder = model.logger.dir
        if folder is None:
            return "; nothing was saved, for the logger has no folder"
        path = Path(folder) / f"non_finite_{iteration:08d}.safetensors"
        try:
            write_tensors(path, tensors, {"iteration": iteration, "num_timesteps": model.num_timesteps})
        except NotSaved as error:
            return f"; it could not be saved: {error}"
        return f"; saved to {path}"

    def _minibatch(self, model: "CollectingPPO", gradient_step: int) -> dict[str, Tensor]:
        """Return the rows of an update's minibatch, by the order that was drawn for it."""
        generator = np.random.RandomState()
        generator.set_state(self._random)
        buffer, size = model._buffer, model.batch_size
        rows = buffer.n_steps * buffer.n_envs
        per_epoch = -(-rows // size)
        for _ in range(gradient_step // per_epoch + 1):
            order = generator.permutation(rows)
        picked = order[gradient_step % per_epoch * size :][:size]
        env, step = (torch.from_numpy(index) for index in divmod(picked, buffer.n_steps))
        where = (step.to(buffer.device), env.to(buffer.device))
        return {**{name: column[where] for name, column in _columns(buffer)}, "env": env, "step": step}


def _columns(buffer: RolloutBuffer, steps: int | None = None) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, column[:steps]) for name, column in observation_columns(buffer).items())
    for name in ("actions", "rewards", "values", "log_probs", "valid", "instruction_id", "advantages", "returns"):
        yield name, getattr(buffer, name)[:steps]
    yield from ((f"prior.{i}", column[:steps]) for i, column in enumerate(buffer.prior_outputs))


def _most_extreme(batch: dict[str, Tensor]) -> int:
    """Return the first row that is not finite, else the one with the largest number in it."""
    floats = [column.detach().flatten(1) if column.ndim > 1 else column[:, None] for column in batch.values()]
    largest = torch.stack([column.float().abs().amax(dim=1).cpu() for column in floats if column.is_floating_point()])
    return int(largest.nan_to_num(nan=torch.inf).amax(dim=0).argmax())


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
