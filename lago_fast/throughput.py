"""Env steps per second of training: ours, bare stepping, and stable-baselines3's PPO, interleaved in one process.

All arms: same tasks, number of envs, horizon, network and hyper-parameters; ours with the process's torch threads,
which leave the cores to the simulators while these step, Stable-Baselines3's with one, its faster setting. Only valid
env steps count.
A window is as long as an episode or longer: starting one costs up to a quarter of playing it, in every arm.
Test: pytest tests/test_throughput.py
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from lago_fast import stage_one
from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.algorithms.guard import settled
from lago_fast.cores import torch_threads
from lago_fast.envs.metaworld import ACTION_DIM
from lago_fast.envs.metaworld_tasks import task_phrasings
from lago_fast.envs.official import official_makers
from lago_fast.envs.suites import suite_named
from lago_fast.evaluate import View, random_actor
from lago_fast.presets import Experiment
from lago_fast.priors.base import ActionPrior
from lago_fast.report import stages
from lago_fast.training import guard_settings, kl_schedule, make_env, ppo_settings

ROUNDS = 3
SB3_THREADS = 1  # of torch; more than one compete with the simulators while its policy acts
Arm = Callable[[], tuple[int, float]]  # one more rollout -> valid env steps, seconds


class Rates(NamedTuple):
    """Env steps per second of every arm, window by window, and where the time of ours went."""

    windows: dict[str, list[float]]
    stages: dict[str, dict[str, dict[str, Any]]]  # of each of our arms, as `report.stages` returns them

    def median(self, arm: str) -> float:
        """Return the median over the windows of an arm."""
        return float(np.median(self.windows[arm]))


def measure(
    experiment: Experiment, stage: stage_one.StageOne, student: ActionPrior, report: Callable[[str], None]
) -> dict[str, Any]:
    """Return median env steps/s per arm over ROUNDS interleaved windows.

    Python Meta-World is an order slower: each of its two vector envs is timed in one window, after a warm-up of
    a few steps, and the faster one is reported. Other environments have no such counterpart.

    Args:
        experiment: settings.
        stage: its exact prior and instruction table.
        student: its amortised prior.
        report: called with a line per stage.
    """
    suite = suite_named(experiment.env.env)
    report("measuring env steps/s")
    priors = {"ppo": None, "lago_amortised": student, "lago_exact": stage.prior}
    rates = interleaved(experiment, stage.table, priors, ROUNDS)
    found: dict[str, Any] = {
        **{f"{arm}_env_steps_per_s": rates.median(arm) for arm in rates.windows},
        "throughput_stages": rates.stages,
    }
    if not suite.has_python_version:
        return {**found, "throughput_windows": rates.windows}
    report(f"measuring stable-baselines3 on Python {suite.title}")
    python = on_python(experiment, plainest_rows(experiment.env.tasks, stage.table))
    return {
        **found,
        "sb3_env_steps_per_s": max(python.values()),
        "sb3_vec_env": max(python, key=lambda name: python[name]),
        "throughput_windows": {**rates.windows, **{name: [rate] for name, rate in python.items()}},
    }


def interleaved(
    experiment: Experiment, table: np.ndarray | None, priors: Mapping[str, ActionPrior | None], rounds: int
) -> Rates:
    """Time bare stepping ("raw"), FastKLPPO with each prior, and SB3's PPO on our SB3 lane ("sb3_envpool" of EnvPool).

    Args:
        experiment: settings.
        table: [M, Z], what policies see of the instructions; None with one task.
        priors: name of an arm -> its prior, None for plain PPO.
        rounds: windows of whole rollouts (and their updates) per arm, taken in turns after a rollout of warm-up.
    """
    rollouts = rollouts_of(experiment)
    models: dict[str, FastKLPPO] = {}
    with ExitStack() as opened:
        arms: dict[str, Arm] = {"raw": opened.enter_context(_raw(experiment))}
        for name, prior in priors.items():
            arms[name], models[name] = opened.enter_context(_ours(experiment, table, prior))
        arms[f"sb3_{suite_named(experiment.env.env).simulator}"] = opened.enter_context(
            _sb3_on_our_lane(experiment, table)
        )
        windows: dict[str, list[float]] = {name: [] for name in arms}
        for arm in arms.values():
            arm()
        warm = {name: dict(model.stage_clock.total) for name, model in models.items()}
        for _ in range(rounds):
            for name, arm in arms.items():
                windows[name].append(_rate(arm, rollouts))
    spent = {
        name: {stage: seconds - warm[name][stage] for stage, seconds in model.stage_clock.total.items()}
        for name, model in models.items()
    }
    return Rates(windows, {name: stages([seconds]) for name, seconds in spent.items()})


def rollouts_of(experiment: Experiment) -> int:
    """Return how many rollouts a window has, so that episodes start in it as often as they do in training."""
    return math.ceil(experiment.env.max_episode_steps / experiment.train.n_steps)


def _rate(arm: Arm, rollouts: int) -> float:
    """Return the env steps/s of a window."""
    steps, seconds = zip(*(arm() for _ in range(rollouts)), strict=True)
    return sum(steps) / sum(seconds)


def on_python(experiment: Experiment, rows: dict[str, np.ndarray] | None) -> dict[str, float]:
    """Return env steps/s of SB3's PPO on Python Meta-World by each of SB3's two vector envs.

    They are an order slower: one window each, after a warm-up of a few steps.

    Args:
        experiment: settings.
        rows: task -> what policies see of its instruction, [Z]; None with one task.
    """
    return {kind.__name__: _sb3_on_python(experiment, rows, kind) for kind in (DummyVecEnv, SubprocVecEnv)}


def plainest_rows(tasks: Sequence[str], table: np.ndarray | None) -> dict[str, np.ndarray] | None:
    """Return each task's row of the table [M, Z] for its plainest wording; None without a table."""
    if table is None:
        return None
    phrasings = task_phrasings()
    ends = np.cumsum([len(phrasings[task]) for task in tasks])
    return {task: table[end - len(phrasings[task])] for task, end in zip(tasks, ends, strict=True)}


@contextmanager
def _raw(experiment: Experiment) -> Iterator[Arm]:
    """Step the same env with random actions and no learner."""
    env = make_env(replace(experiment.env, groups=1), 0, None).array_lane
    suite = suite_named(experiment.env.env)
    act = random_actor(suite.action_dim, 0, discrete=suite.discrete)
    observation, instruction_id = env.reset()
    view = View(observation, observation, instruction_id, env)

    def rollout() -> tuple[int, float]:
        started, steps = time.perf_counter(), 0
        for _ in range(experiment.train.n_steps):
            steps += int(env.step(act(view)).valid.sum())
        return steps, time.perf_counter() - started

    yield rollout
    env.close()


@contextmanager
def _ours(
    experiment: Experiment, table: np.ndarray | None, prior: ActionPrior | None
) -> Iterator[tuple[Arm, FastKLPPO]]:
    """Train with the settings of the experiment's arms, `overlap` aside; a guard has seen the prior play."""
    env = make_env(experiment.env, 0, table)
    train = experiment.train
    guard = None if prior is None else guard_settings(train)
    model = FastKLPPO(
        "MlpPolicy",
        env,
        seed=0,
        **ppo_settings(train, experiment.env),
        prior=prior,
        kl_coef=kl_schedule(train),
        kl_direction=train.kl_direction,
        guard=guard,
        impl=train.impl,
    )
    if guard is not None:
        model.guard_state = settled(guard, len(env.array_lane.tasks))
    yield lambda: _learn(model), model
    env.close()


@contextmanager
def _sb3_on_our_lane(experiment: Experiment, table: np.ndarray | None) -> Iterator[Arm]:
    """Train stable-baselines3's PPO on our SB3 lane."""
    env = make_env(replace(experiment.env, groups=1), 0, table)
    model = PPO("MlpPolicy", env, seed=0, **ppo_settings(experiment.train, experiment.env))

    def iteration() -> tuple[int, float]:
        with torch_threads(SB3_THREADS):
            return _learn(model)

    yield iteration
    env.close()


def _learn(model: PPO) -> tuple[int, float]:
    """Run one iteration, a rollout and its update, and return its valid env steps and seconds."""
    before, started = model.num_timesteps, time.perf_counter()
    # a budget of one step more is one rollout more
    model.learn(1, log_interval=1000, reset_num_timesteps=model.num_timesteps == 0)
    return model.num_timesteps - before, time.perf_counter() - started


def _sb3_on_python(experiment: Experiment, rows: dict[str, np.ndarray] | None, kind: type[VecEnv]) -> float:
    """Return env steps/s of a window of stable-baselines3's PPO on Python Meta-World."""
    makers = official_makers(experiment.env.tasks, experiment.env.num_envs, experiment.env.max_episode_steps, rows)
    # fork: the workers share what is imported already, and start in seconds
    env = SubprocVecEnv(makers, start_method="fork") if kind is SubprocVecEnv else DummyVecEnv(makers)
    try:
        model = PPO("MlpPolicy", env, seed=0, **ppo_settings(experiment.train, experiment.env))
        env.reset()
        for _ in range(3):
            env.step(np.zeros((env.num_envs, ACTION_DIM), np.float32))
        with torch_threads(SB3_THREADS):
            return _rate(lambda: _learn(model), rollouts_of(experiment))
    finally:
        env.close()
