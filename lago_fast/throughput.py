"""Env steps per second of training: ours, bare stepping, and stable-baselines3's PPO, interleaved in one process.

All arms: same tasks, number of envs, horizon, network, hyper-parameters and torch threads. Only valid env steps count.
Test: pytest tests/test_throughput.py
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from lago_fast import stage_one
from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.envs.metaworld import ACTION_DIM, task_phrasings
from lago_fast.envs.official import official_makers
from lago_fast.envs.suites import suite_named
from lago_fast.evaluate import View, random_actor
from lago_fast.presets import Experiment
from lago_fast.priors.base import ActionPrior
from lago_fast.training import kl_schedule, make_env, ppo_settings

ROUNDS = 3
Arm = Callable[[], tuple[int, float]]  # one more window -> valid env steps, seconds


def measure(
    experiment: Experiment, stage: stage_one.StageOne, student: ActionPrior, report: Callable[[str], None]
) -> dict[str, Any]:
    """Return median env steps/s per arm over ROUNDS interleaved windows of one rollout each.

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
    with (
        _raw(experiment) as raw,
        _ours(experiment, stage, None) as ppo,
        _ours(experiment, stage, student) as amortised,
        _ours(experiment, stage, stage.prior) as exact,
        _sb3_on_our_lane(experiment, stage) as sb3,
    ):
        arms: dict[str, Arm] = {
            "raw": raw,
            "ppo": ppo,
            "lago_amortised": amortised,
            "lago_exact": exact,
            f"sb3_{suite.simulator}": sb3,
        }
        windows: dict[str, list[float]] = {name: [] for name in arms}
        for arm in arms.values():
            arm()  # warm-up
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                steps, seconds = arm()
                windows[name].append(steps / seconds)
    found: dict[str, Any] = {f"{name}_env_steps_per_s": float(np.median(values)) for name, values in windows.items()}
    if not suite.has_python_version:
        return {**found, "throughput_windows": windows}
    report(f"measuring stable-baselines3 on Python {suite.title}")
    python = {kind.__name__: _sb3_on_python(experiment, stage, kind) for kind in (DummyVecEnv, SubprocVecEnv)}
    return {
        **found,
        "sb3_env_steps_per_s": max(python.values()),
        "sb3_vec_env": max(python, key=lambda name: python[name]),
        "throughput_windows": {**windows, **{name: [rate] for name, rate in python.items()}},
    }


@contextmanager
def _raw(experiment: Experiment) -> Iterator[Arm]:
    """Step the same env with random actions and no learner."""
    env = make_env(experiment.env, 0, None).array_lane
    suite = suite_named(experiment.env.env)
    act = random_actor(suite.action_dim, 0, discrete=suite.discrete)
    observation, instruction_id = env.reset()
    view = View(observation, observation, instruction_id, env)

    def window() -> tuple[int, float]:
        started, steps = time.perf_counter(), 0
        for _ in range(experiment.train.n_steps):
            steps += int(env.step(act(view)).valid.sum())
        return steps, time.perf_counter() - started

    yield window
    env.close()


@contextmanager
def _ours(experiment: Experiment, stage: stage_one.StageOne, prior: ActionPrior | None) -> Iterator[Arm]:
    """Train with the settings of the experiment's arms."""
    env = make_env(experiment.env, 0, stage.table)
    train = experiment.train
    model = FastKLPPO(
        "MlpPolicy",
        env,
        seed=0,
        **ppo_settings(train, experiment.env),
        prior=prior,
        kl_coef=kl_schedule(train),
        kl_direction=train.kl_direction,
        impl=train.impl,
    )
    yield lambda: _learn(model)
    env.close()


@contextmanager
def _sb3_on_our_lane(experiment: Experiment, stage: stage_one.StageOne) -> Iterator[Arm]:
    """Train stable-baselines3's PPO on our SB3 lane."""
    env = make_env(experiment.env, 0, stage.table)
    model = PPO("MlpPolicy", env, seed=0, **ppo_settings(experiment.train, experiment.env))
    yield lambda: _learn(model)
    env.close()


def _learn(model: PPO) -> tuple[int, float]:
    """Run one iteration, a rollout and its update, and return its valid env steps and seconds."""
    before, started = model.num_timesteps, time.perf_counter()
    # a budget of one step more is one rollout more
    model.learn(1, log_interval=1000, reset_num_timesteps=model.num_timesteps == 0)
    return model.num_timesteps - before, time.perf_counter() - started


def _sb3_on_python(experiment: Experiment, stage: stage_one.StageOne, kind: type[VecEnv]) -> float:
    """Return env steps/s of one iteration of stable-baselines3's PPO on Python Meta-World."""
    rows = None
    if stage.table is not None:
        first = {
            task: stage.instructions.index(texts[0])
            for task, texts in task_phrasings().items()
            if task in experiment.env.tasks
        }
        rows = {task: stage.table[i] for task, i in first.items()}
    makers = official_makers(experiment.env.tasks, experiment.env.num_envs, experiment.env.max_episode_steps, rows)
    # fork: the workers share what is imported already, and start in seconds
    env = SubprocVecEnv(makers, start_method="fork") if kind is SubprocVecEnv else DummyVecEnv(makers)
    try:
        model = PPO("MlpPolicy", env, seed=0, **ppo_settings(experiment.train, experiment.env))
        env.reset()
        for _ in range(3):
            env.step(np.zeros((env.num_envs, ACTION_DIM), np.float32))
        steps, seconds = _learn(model)
    finally:
        env.close()
    return steps / seconds
