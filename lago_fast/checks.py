"""What an experiment is refused for by its settings, found before anything is replaced, recorded or fitted.

Each check is the one of whoever would stumble later: it is asked here with as little as makes it answer.
Test: pytest tests/test_checks.py
"""

import math
import warnings
from typing import Any

import numpy as np

from lago_fast import stage_one
from lago_fast.demos import Demonstrations, check_recording
from lago_fast.envs.suites import suite_named
from lago_fast.errors import UnsupportedArgument, check_seed
from lago_fast.presets import DemoSettings, EnvSettings, Experiment, PriorSettings, TrainSettings
from lago_fast.priors.student import StudentConfig, check_fit
from lago_fast.training import ARMS, check_student, guard_settings, kl_schedule, make_env, make_model


def check_experiment(experiment: Experiment) -> None:
    """Raise what a comparison with these settings would raise, as far as it is known before its first stage.

    Raises:
        UnsupportedArgument, UnknownTask: a setting, or two that do not fit together.
        BackboneUnavailable: the prior's language model cannot be had.
        InsufficientMemory: there is no room to fit it.
    """
    if not experiment.arms or len(set(experiment.arms)) < len(experiment.arms) or set(experiment.arms) - set(ARMS):
        raise UnsupportedArgument(f"arms={list(experiment.arms)}: give one or more of {', '.join(ARMS)}, each once")
    if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise UnsupportedArgument(f"seeds={list(experiment.seeds)}: give one or more, each once")
    if experiment.eval_episodes < 1:
        raise UnsupportedArgument(f"eval_episodes={experiment.eval_episodes}: give at least 1")
    check_student(experiment.env, experiment.train)
    check_trainer(experiment.env, experiment.train, experiment.seeds)
    _check_demos(experiment.env, experiment.demos)
    _check_fit(experiment)
    _check_student_fit(experiment.prior)


def check_trainer(
    env: EnvSettings,
    train: TrainSettings,
    seeds: tuple[int, ...],
    table: np.ndarray | None = None,
    num_threads: int | None = None,
) -> None:
    """Make the envs and an untrained model as the settings say, and drop them.

    Args:
        env: settings of the envs.
        train: settings of the trainer.
        seeds: of the runs; the first is tried.
        table: [M, Z], as `make_env` has it.
        num_threads: likewise.

    Raises:
        UnsupportedArgument, UnknownTask: as whoever is made raises them.
    """
    for seed in seeds:
        check_seed("seed", seed, bits=32)  # numpy's global generator, which Stable-Baselines3 seeds, takes no more
    for name, value, fits, wanted in (
        ("gamma", env.gamma, 0 <= env.gamma <= 1, "a number from 0 to 1"),
        ("steps_per_task", train.steps_per_task, train.steps_per_task > 0, "1 or more"),
        ("learning_rate", train.learning_rate, 0 <= train.learning_rate < math.inf, "a finite number, 0 or more"),
        ("log_std_init", train.log_std_init, math.isfinite(train.log_std_init), "a finite number"),
        ("ent_coef", train.ent_coef, math.isfinite(train.ent_coef), "a finite number"),
        ("kl_coef", train.kl_coef, 0 <= train.kl_coef < math.inf, "a finite number, 0 or more"),
        ("kl_coef_end", train.kl_coef_end, 0 <= train.kl_coef_end < math.inf, "a finite number, 0 or more"),
        (
            "n_steps",
            train.n_steps,
            train.n_steps > 0 and train.n_steps * env.num_envs > 1,
            "1 or more, and two rows or more in all",
        ),
        ("batch_size", train.batch_size, train.batch_size > 1, "2 or more"),
        ("net_arch", list(train.net_arch), min(train.net_arch, default=1) > 0, "widths of 1 or more"),
    ):
        if not fits:
            raise UnsupportedArgument(f"{name}={value}: give {wanted}")
    stage_one.compact_table(np.eye(2, dtype=np.float32), explained=env.explained_variance)
    kl_schedule(train)
    guard_settings(train)
    envs = make_env(env, seeds[0], table, num_threads)
    try:
        with warnings.catch_warnings(action="ignore"):  # the run itself warns
            make_model(envs, seeds[0], train, env, None)
    finally:
        envs.close()


def _check_demos(env: EnvSettings, demos: DemoSettings) -> None:
    check_recording(
        env.tasks,
        demos.episodes_per_task,
        action_noise=demos.action_noise,
        noisy_tasks=demos.noisy_tasks,
        seed=demos.seed,
        max_episode_steps=env.max_episode_steps,
        num_envs_per_task=demos.num_envs_per_task,
        env=env.env,
    )


class _Checked(Exception):
    """Ends a fit where its weights would be read."""


def _check_fit(experiment: Experiment) -> None:
    """Begin to fit the prior, on rows of zeros, and end before it has weights."""

    def stop() -> None:
        raise _Checked

    try:
        stage_one.fit_to(_rows_of_zeros(experiment), experiment, before_weights=stop)
    except _Checked:
        return


def _rows_of_zeros(experiment: Experiment) -> Demonstrations:
    """Return two episodes of one step of each task: one of them is held out."""
    suite, tasks = suite_named(experiment.env.env), list(experiment.env.tasks)
    first: list[str] = [suite.goals(task)[0][0] for task in tasks]
    task_id = np.repeat(np.arange(len(tasks)), 2)
    rows, box = len(task_id), 0 if suite.discrete else suite.action_dim
    actions: Any = np.zeros(rows, np.int64) if suite.discrete else np.zeros((rows, box), np.float32)
    return Demonstrations(
        states=np.zeros((rows, suite.state_dim), np.float32),
        actions=actions,
        instruction_id=task_id,
        instructions=first,
        episode_id=np.arange(rows),
        task_id=task_id,
        tasks=tasks,
        success=np.ones(rows, bool),
        action_low=-np.ones(box, np.float32),
        action_high=np.ones(box, np.float32),
        num_actions=suite.action_dim if suite.discrete else None,
    )


def _check_student_fit(prior: PriorSettings) -> None:
    StudentConfig(**prior.student)
    check_fit(epochs=prior.student_epochs, noisy_copies=prior.noisy_copies)
    if not all(0 <= noise < math.inf for noise in prior.rollout_noise):
        raise UnsupportedArgument(f"rollout_noise={list(prior.rollout_noise)}: give finite numbers, 0 or more")
