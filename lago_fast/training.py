"""One training run on Meta-World: an arm, a seed, a run folder.

Arms: "ppo" (no prior), "lago" (the prior's KL), "bc_ppo" (policy cloned from the demonstrations, no KL),
"lago_random_init" (as lago, the prior's backbone drawn at random: a control).
Test: pytest tests/test_experiment.py
"""

import json
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.logger import configure

from lago_fast.algorithms.cloning import clone_policy
from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from lago_fast.envs.metaworld import make_metaworld
from lago_fast.errors import UnsupportedArgument
from lago_fast.evaluate import Act, View
from lago_fast.presets import EnvSettings, Experiment, TrainSettings
from lago_fast.priors.base import ActionPrior

ARMS = ("ppo", "lago", "bc_ppo", "lago_random_init")
CHECKPOINT_ROLLOUTS = 25  # between two checkpoints
WINDOW = 50  # episodes per task over which training success is counted


class RunResult(NamedTuple):
    model: FastKLPPO
    curve: dict[str, Any]  # {"tasks": {task: {"env_steps": [...], "success": [...]}}, "steps_to_90": {task: n | None}}
    env_steps: int  # valid ones, over all tasks
    wall_s: float  # of learn(), prior queries included
    audit_kl_nats: float | None  # mean over training; None without a student


class SuccessCurve(BaseCallback):
    """Success of the last WINDOW training episodes of each task, after every rollout.

    Args:
        tasks: names.
        task_id: [N], of each env.
        progress: called with (steps done, steps in all) after each rollout.
    """

    def __init__(self, tasks: list[str], task_id: np.ndarray, progress: Any = None) -> None:
        super().__init__()
        self.task_id, self.progress = task_id, progress
        self.recent: list[deque[bool]] = [deque(maxlen=WINDOW) for _ in tasks]
        self.curve: dict[str, dict[str, list[float]]] = {t: {"env_steps": [], "success": []} for t in tasks}
        self.steps_to_90: dict[str, int | None] = dict.fromkeys(tasks)
        self.audits: list[float] = []

    def _on_step(self) -> bool:
        for episode in self.locals["episodes"]:
            self.recent[self.task_id[episode.env]].append(bool(episode.success))
        return True

    def _on_rollout_end(self) -> None:
        steps = self.num_timesteps // len(self.recent)
        for (task, points), recent in zip(self.curve.items(), self.recent, strict=True):
            if not recent:
                continue
            success = float(np.mean(recent))
            points["env_steps"].append(steps)
            points["success"].append(success)
            self.logger.record(f"rollout/success_{task}", success)
            if success >= 0.9 and len(recent) == WINDOW and self.steps_to_90[task] is None:
                self.steps_to_90[task] = steps
        if "prior/audit_kl_nats" in self.logger.name_to_value:
            self.audits.append(float(self.logger.name_to_value["prior/audit_kl_nats"]))
        if self.progress is not None:
            self.progress(self.num_timesteps, self.locals["total_timesteps"])


def make_env(settings: EnvSettings, seed: int, table: np.ndarray | None, num_threads: int | None = None) -> Any:
    """Return the training env of an experiment, rewards scaled by their running return."""
    return make_metaworld(
        settings.tasks,
        settings.num_envs,
        seed=seed,
        max_episode_steps=settings.max_episode_steps,
        instruction_table=table,
        normalize_reward=True,
        gamma=settings.gamma,
        num_threads=num_threads,
    )


def ppo_settings(train: TrainSettings, env: EnvSettings) -> dict[str, Any]:
    """Return the keywords that Stable-Baselines3's PPO and FastKLPPO share."""
    return {
        "n_steps": train.n_steps,
        "batch_size": train.batch_size,
        "n_epochs": train.n_epochs,
        "learning_rate": train.learning_rate,
        "ent_coef": train.ent_coef,
        "gamma": env.gamma,
        "device": train.device,
        "policy_kwargs": {"net_arch": list(train.net_arch), "log_std_init": train.log_std_init},
    }


def kl_schedule(train: TrainSettings) -> LinearSchedule:
    """Return the schedule of the KL coefficient."""
    return LinearSchedule(train.kl_coef, train.kl_coef_end, train.kl_coef_until)


def train_run(
    arm: str,
    seed: int,
    experiment: Experiment,
    *,
    folder: Path,
    table: np.ndarray | None = None,
    prior: ActionPrior | None = None,
    demonstrations: tuple[np.ndarray, np.ndarray] | None = None,
    num_threads: int | None = None,
    progress: Any = None,
) -> RunResult:
    """Train one arm with one seed; write progress.csv, TensorBoard, checkpoints, model.zip and curve.json.

    Args:
        arm: one of ARMS.
        seed: of policy, minibatches and env.
        experiment: settings.
        folder: the run's, already made.
        table: [M, Z], what policies see of the instructions; needed with several tasks.
        prior: of the guided arms.
        demonstrations: observations [n, O] and actions [n, D] of the arm bc_ppo.
        num_threads: per pool; default: the cores shared among the pools.
        progress: called with (steps done, steps in all).

    Raises:
        UnsupportedArgument: unknown arm, or what the arm needs is missing.
    """
    if arm not in ARMS:
        raise UnsupportedArgument(f"arm={arm!r}: choose one of {', '.join(ARMS)}")
    guided = arm.startswith("lago")
    if guided and prior is None:
        raise UnsupportedArgument(f"prior: the arm {arm} needs one; fit it with `lago fit-prior`")
    if arm == "bc_ppo" and demonstrations is None:
        raise UnsupportedArgument("demonstrations: the arm bc_ppo needs them; record them with `lago demos`")
    settings = experiment.train
    env = make_env(experiment.env, seed, table, num_threads)
    logger = configure(str(folder), ["csv", "tensorboard"])
    try:
        model = FastKLPPO(
            "MlpPolicy",
            env,
            seed=seed,
            **ppo_settings(settings, experiment.env),
            prior=prior if guided else None,
            kl_coef=kl_schedule(settings) if guided else 0.0,
            kl_direction=settings.kl_direction,
            guard=settings.guard and guided,
            impl=settings.impl,
        )
        model.set_logger(logger)
        if arm == "bc_ppo" and demonstrations is not None:
            clone_policy(model.policy, *demonstrations, seed=seed)
        lane = env.array_lane
        callback = SuccessCurve(lane.tasks, lane.task_id, progress)
        checkpoints = CheckpointCallback(
            save_freq=CHECKPOINT_ROLLOUTS * settings.n_steps, save_path=str(folder / "checkpoints"), name_prefix="model"
        )
        started = time.perf_counter()
        model.learn(settings.steps_per_task * len(lane.tasks), callback=[callback, checkpoints], log_interval=1)
        wall_s = time.perf_counter() - started
    finally:
        logger.close()
        env.close()
    model.save(folder / "model.zip")
    curve = {"tasks": callback.curve, "steps_to_90": callback.steps_to_90, "arm": arm, "seed": seed}
    (folder / "curve.json").write_text(json.dumps(curve) + "\n", encoding="utf-8")
    audit = float(np.mean(callback.audits)) if callback.audits else None
    return RunResult(model, curve, model.num_timesteps, wall_s, audit)


def observations(states: np.ndarray, instruction_id: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """Return states [n, S] as a policy sees them: with their instruction's row [n, S + Z] where there is a table."""
    return states if table is None else np.concatenate([states, table[instruction_id]], axis=1)


def policy_actor(model: FastKLPPO) -> Act:
    """Return the deterministic policy in the form that `evaluate` wants."""

    def act(view: View) -> np.ndarray:
        return model.predict(view.observation, deterministic=True)[0]

    return act


def prior_actor(prior: ActionPrior) -> Act:
    """Return the prior's mean action in the form that `evaluate` wants."""

    def act(view: View) -> np.ndarray:
        mean = prior.query(torch.from_numpy(view.state), torch.from_numpy(view.instruction_id)).mean
        assert mean is not None
        return mean.cpu().numpy()

    return act
