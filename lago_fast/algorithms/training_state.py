"""All that a training run is at the end of an iteration, as tensors and plain figures, and back.

What is in it: policy, optimiser, counters and the schedules' position, the state of every random generator, what
normalises rewards and observations, the KL controller, the prior's digest and what a prior has learnt while
answering, the episodes of the log's averages, and what was logged and not yet written. Simulators are not: envs are
built anew.
Test: pytest tests/algorithms/test_resume.py
"""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from torch import Tensor

from lago_fast.algorithms.checkpoint import Checkpoint
from lago_fast.algorithms.kl_coefficient import KLCoefficient, LinearSchedule
from lago_fast.errors import CorruptFile, LagoError, PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import LearningPrior

if TYPE_CHECKING:
    from lago_fast.algorithms.collecting import CollectingPPO

COUNTERS = ("num_timesteps", "iterations", "_n_updates", "_episode_num", "_total_timesteps", "_num_timesteps_at_start")
POSITION = ("_current_progress_remaining", "auto_kl_coef", "guard_state", "prior_digest", "seed", "run_id")
# the constructor's arguments, as attributes of the model
ARGUMENTS = (
    *("learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf"),
    *("normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "use_sde", "sde_sample_freq", "target_kl"),
    *("policy_kwargs", "verbose", "seed", "kl_coef", "target_prior_kl", "kl_direction"),
    *("kl_placement", "prior_temperature", "warm_start", "guard", "impl", "on_nan", "step_timeout_s", "overlap"),
    "cuda_graph",
)
LINEAR = "LinearSchedule"
MAX_INT = 2**32  # of an argument; seeds are that large


def state_of(model: "CollectingPPO") -> Checkpoint:
    """Return a model's state between two iterations; tensors may be the model's own, not copies."""
    tensors = {f"policy.{name}": tensor for name, tensor in model.policy.state_dict().items()}
    optimizer = model.policy.optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for i, state in optimizer["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{i}.{name}"] = value
            else:
                scalars.setdefault(str(i), {})[name] = value
    figures: dict[str, Any] = {
        **{name: getattr(model, name) for name in (*COUNTERS, *POSITION)},
        "optimizer": {"groups": optimizer["param_groups"], "scalars": scalars},
        "elapsed_ns": time.time_ns() - model.start_time,
        "episodes": [_plain(episode) for episode in model.ep_info_buffer or ()],
        "successes": [float(success) for success in model.ep_success_buffer or ()],
        "log": _unwritten(model),
        "arguments": arguments_of(model),
    }
    tensors |= {f"normaliser.{name}": value for name, value in _normalisation(model.env)}
    drawn, figures["random"] = generators(model.device)
    tensors |= {f"random.{name}": value for name, value in drawn.items()}
    prior: Any = model.prior
    if isinstance(prior, LearningPrior):
        learnt, figures["prior"] = prior.learnt()
        tensors |= {f"prior.{name}": value for name, value in learnt.items()}
    return Checkpoint(tensors, figures)


def put_back(model: "CollectingPPO", state: Checkpoint) -> None:
    """Make a model, built with the same arguments, what it was; its envs start anew, seeded from (seed, iteration).

    Raises:
        PriorMismatch: the state is of a run with another prior, or with none, or the other way round.
        UnsupportedArgument: of another policy or optimiser.
        CorruptFile: something is missing in it.
    """
    figures = state.figures
    try:
        _check_prior(model, figures["prior_digest"])
        _put_back_learner(model, state)
        for name in (*COUNTERS, *POSITION):
            setattr(model, name, figures[name])
        model._kl_coefficient = KLCoefficient(model.kl_coef, model.target_prior_kl, model.auto_kl_coef)
        model.resumed = {name: figures[name] for name in ("iterations", "elapsed_ns", "_num_timesteps_at_start", "log")}
        model.ep_info_buffer, model.ep_success_buffer = model.fresh_averages()
        model.ep_info_buffer.extend(figures["episodes"])
        model.ep_success_buffer.extend(figures["successes"])
        prior: Any = model.prior
        if isinstance(prior, LearningPrior):
            prior.take_back(_below("prior.", state.tensors), figures["prior"])
        drawn = Generators(_below("random.", state.tensors), figures["random"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, LagoError):
            raise
        raise CorruptFile(f"path: the checkpoint lacks something, or holds another thing ({error!r})") from error
    set_generators(drawn, model.device)  # first, for an env may draw from them when it starts
    if model.env is not None:
        model.restart_envs(normalisation=_below("normaliser.", state.tensors))


def _check_prior(model: "CollectingPPO", digest: str | None) -> None:
    own = None if model.prior is None else model.prior.digest
    if own != digest:
        raise PriorMismatch(f"prior: the run was made with prior {digest}, this model has {own}; pass the same one")


def _put_back_learner(model: "CollectingPPO", state: Checkpoint) -> None:
    groups = [
        {name: tuple(v) if isinstance(v, list) and name != "params" else v for name, v in group.items()}
        for group in state.figures["optimizer"]["groups"]
    ]
    kept: dict[int, dict[str, Any]] = {int(i): dict(s) for i, s in state.figures["optimizer"]["scalars"].items()}
    for name, tensor in _below("optimizer.", state.tensors).items():
        i, what = name.split(".", 1)
        kept.setdefault(int(i), {})[what] = tensor.clone()
    shapes = [p.shape for group in model.policy.optimizer.param_groups for p in group["params"]]
    fits = all(
        i < len(shapes) and (value.ndim == 0 or value.shape == shapes[i])
        for i, moments in kept.items()
        for value in moments.values()
        if isinstance(value, Tensor)
    )
    try:
        if not fits:
            raise ValueError("moments of other shapes")
        model.policy.load_state_dict(_below("policy.", state.tensors))
        model.policy.optimizer.load_state_dict({"state": kept, "param_groups": groups})
    except (RuntimeError, ValueError) as error:
        raise UnsupportedArgument(
            f"policy: the checkpoint is of another policy or optimiser ({error}); build the model with the arguments "
            "of the run"
        ) from error


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# random generators


class Generators(NamedTuple):
    """Where every global random generator stands."""

    tensors: dict[str, Tensor]
    figures: list[Any]  # JSON-able: Python's generator, and numpy's beside its tensor


def generators(device: torch.device) -> Generators:
    """Return where Python's, numpy's and torch's generators stand; numpy's draws the minibatches."""
    version, words, gauss = random.getstate()
    _, key, *numpy = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(key).astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return Generators(tensors, [[version, list(words), gauss], numpy])


def set_generators(state: Generators, device: torch.device) -> None:
    """Let the generators go on from where `generators` found them.

    Raises:
        CorruptFile: the state is none.
    """
    (version, words, gauss), numpy = state.figures
    try:
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(("MT19937", state.tensors["numpy"].numpy().astype(np.uint32), *numpy))  # noqa: NPY002
        torch.set_rng_state(state.tensors["torch"])
        if device.type == "cuda" and "cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["cuda"], device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CorruptFile(f"path: the checkpoint holds no state of a random generator ({error})") from error


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Put the generators back after the block to where they stood before it."""
    before = generators(device)
    yield
    set_generators(before, device)


# normalisation of rewards and observations


def _statistics(env: VecEnv | None) -> Iterator[tuple[str, Any]]:
    """Yield what normalises, with its name: running means of VecNormalize wrappers, outermost first, and a lane's."""
    depth = 0
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            yield f"{depth}.returns", env.ret_rms
            if env.norm_obs:
                parts = env.obs_rms if isinstance(env.obs_rms, dict) else {"": env.obs_rms}
                yield from ((f"{depth}.observations.{key}", part) for key, part in parts.items())
            depth += 1
        env = env.venv
    lane = getattr(env, "array_lane", None)
    if getattr(lane, "normalizer", None) is not None:
        yield "lane", lane.normalizer  # type: ignore[union-attr]


def _normalisation(env: VecEnv | None) -> Iterator[tuple[str, Tensor]]:
    for name, part in _statistics(env):
        columns = vars(part) if isinstance(part, RunningMeanStd) else part.state_dict()
        for column in ("mean", "var", "count"):
            yield f"{name}/{column}", torch.as_tensor(np.array(columns[column], np.float64))


def normalisation_of(env: VecEnv | None) -> dict[str, Tensor]:
    """Return the statistics by which an env's wrappers and its lane normalise, as copies."""
    return {name: value.clone() for name, value in _normalisation(env)}


def normalise_by(env: VecEnv, statistics: dict[str, Tensor]) -> None:
    """Give an env the statistics of another one.

    Raises:
        UnsupportedArgument: the two do not normalise the same things.
    """
    wanted = {f"{name}/{column}" for name, _ in _statistics(env) for column in ("mean", "var", "count")}
    if wanted != set(statistics):
        differing = ", ".join(sorted(wanted ^ set(statistics)))
        raise UnsupportedArgument(f"env: it does not normalise what the run's did ({differing}); wrap it as there")
    for name, part in _statistics(env):
        mean, var, count = (statistics[f"{name}/{column}"].numpy() for column in ("mean", "var", "count"))
        if isinstance(part, RunningMeanStd):
            if mean.shape != part.mean.shape:
                raise UnsupportedArgument(f"env: its {name} has shape {part.mean.shape}, the run's {mean.shape}")
            part.mean, part.var, part.count = mean.copy(), var.copy(), float(count)
        else:
            part.load_state_dict({"mean": mean, "var": var, "count": count})


def seed_of(seed: int | None, iteration: int) -> int | None:
    """Return the seed of envs that start at an iteration; None where the run has none."""
    if seed is None:
        return None
    return int(np.random.SeedSequence([abs(seed), iteration]).generate_state(1)[0] >> 1)


# arguments and log


def arguments_of(model: "CollectingPPO") -> dict[str, Any]:
    """Return the constructor's arguments as JSON holds them; "lacking" names those that it cannot hold."""
    aliases = [name for name, policy in model.policy_aliases.items() if policy is model.policy_class]
    found: dict[str, Any] = {"policy": aliases[0]} if aliases else {}
    lacking = [] if aliases else ["policy"]
    for name in ARGUMENTS:
        value = getattr(model, name)
        if isinstance(value, FloatSchedule):
            value = value.value_schedule
        if isinstance(value, ConstantSchedule):
            value = value.val
        if isinstance(value, LinearSchedule):
            value = {LINEAR: [value.start, value.end, value.until]}
        if _is_plain(value):
            found[name] = value
        else:
            lacking.append(name)
    return {"given": {**found, "stats_window_size": model._stats_window_size}, "lacking": lacking}


def arguments_in(state: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments from what `arguments_of` made of them, and `given` over them.

    Raises:
        UnsupportedArgument: one that no JSON holds is not given.
        CorruptFile: the checkpoint does not hold the arguments of a constructor.
    """
    try:
        kept, lacking = dict(state.figures["arguments"]["given"]), list(state.figures["arguments"]["lacking"])
        strange = set(kept) - {*ARGUMENTS, "policy", "stats_window_size"}
        if strange or any(isinstance(value, int) and abs(value) > MAX_INT for value in kept.values()):
            raise ValueError(f"{sorted(strange) or 'a number'} that no run has")
        found = {
            name: LinearSchedule(*value[LINEAR]) if isinstance(value, dict) and set(value) == {LINEAR} else value
            for name, value in kept.items()
        }
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, UnsupportedArgument):
            raise
        raise CorruptFile(f"path: the checkpoint holds no arguments of a model ({error}); take another") from error
    missing = [name for name in lacking if name not in given]
    if missing:
        raise UnsupportedArgument(f"{', '.join(missing)}: a checkpoint cannot hold it; pass the run's to resume()")
    return {**found, **given}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in record.items()}


def _unwritten(model: "CollectingPPO") -> list[list[Any]]:
    """Return the figures that were logged since the last row: [name, value, numpy's type, count, formats left out]."""
    log, found = model.logger, []
    for name, value in log.name_to_value.items():
        kind = value.dtype.name if isinstance(value, np.generic) else None
        plain = value.item() if isinstance(value, np.generic) else value
        if isinstance(plain, int | float | str):
            found.append([name, plain, kind, log.name_to_count[name], log.name_to_excluded.get(name)])
    return found
