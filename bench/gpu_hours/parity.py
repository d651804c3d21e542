"""Learning parity: whole runs of the ladder's exact rungs, to the same success within noise and to a threshold.

    python -m bench.gpu_hours.parity OUT.json [--iterations 6] [--seeds 3] [--rungs 2 3 5 6 7]

Every rung trains the work of protocol.md on the prior that it stands on, rewards scaled by their running return, and is
evaluated after each iteration, outside of the clock: 64 episodes on EnvPool, the policy's mean, the same for all.
`threshold_steps` is the first evaluation at the threshold or above, in env steps. Rungs 4 and 8 are approximate and not
among them. Test: pytest tests/bench/test_gpu_hours.py
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from bench.gpu_hours.first_user import AutoModelPrior, PriorPPO
from bench.gpu_hours.rungs import asker, make_env
from bench.gpu_hours.work import EVAL_SEED, Stage, Work, add_work, fitted, plain, work_of
from bench.guard import interval
from lago_fast import FastKLPPO, runs
from lago_fast.cores import usable_cores
from lago_fast.envs.official import official_makers
from lago_fast.evaluate import evaluate
from lago_fast.presets import EnvSettings
from lago_fast.training import policy_actor

SAME_PRIOR = ((1, 2), (3, 5, 6, 7))  # rungs in a group differ in nothing that learning should see
DEFAULT = Work(task="handle-press", batch_size=256)  # which is learnt within the budget
Make = Callable[[Work], Any]  # context manager that yields a model


class AskOnce(BaseCallback):
    """Ask the prior about every rollout when it is there."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model = self.model
        if isinstance(model, PriorPPO) and not model.in_every_minibatch:
            model.ask_once()


@contextmanager
def by_user(work: Work, ask: Any, *, python_envs: bool, in_every_minibatch: bool = False) -> Iterator[PPO]:
    """Yield rungs 1 to 5: Stable-Baselines3's PPO and the prior that `ask` says."""
    if python_envs:
        makers = official_makers((work.task,), work.num_envs, work.max_episode_steps, None)
        workers = SubprocVecEnv(makers, start_method="fork")  # which share what is imported already
        env: Any = VecNormalize(workers, norm_obs=False, gamma=work.gamma)
    else:
        env = make_env(work)
    guided = {"ask": ask, "kl_coef": work.kl_coef, "in_every_minibatch": in_every_minibatch}
    yield PriorPPO("MlpPolicy", env, **work.ppo(), **guided)
    env.close()


@contextmanager
def ours(work: Work, prior: Any, groups: int) -> Iterator[FastKLPPO]:
    """Yield rungs 6 and 7."""
    env = make_env(work, groups)
    yield FastKLPPO("MlpPolicy", env, **work.ppo(), prior=prior, kl_coef=work.kl_coef)
    env.close()


def rungs(stage: Stage) -> dict[int, Make]:
    """Return how each exact rung is made."""
    prompt, shared = AutoModelPrior(stage.prompt.prior), asker(stage.shared.prior)
    return {
        1: partial(by_user, ask=prompt, python_envs=True, in_every_minibatch=True),
        2: partial(by_user, ask=prompt, python_envs=True),
        3: partial(by_user, ask=shared, python_envs=True),
        5: partial(by_user, ask=shared, python_envs=False),
        6: partial(ours, prior=stage.shared.prior, groups=1),
        7: partial(ours, prior=stage.shared.prior, groups=2),
    }


def train(make: Make, work: Work, iterations: int, threshold: float) -> dict[str, Any]:
    """Return one run: its success after every iteration, and the seconds that training took."""
    settings = EnvSettings(tasks=(work.task,), num_envs=work.num_envs, max_episode_steps=work.max_episode_steps)
    steps, successes, seconds = [], [], []
    spent = 0.0
    with make(work) as model:
        for k in range(iterations):
            started = time.perf_counter()
            # as one run would: a schedule's end is not reached, for there is none
            model.learn(1, AskOnce(), log_interval=1000, reset_num_timesteps=k == 0)
            spent += time.perf_counter() - started
            played = evaluate(policy_actor(model), settings, episodes_per_task=work.eval_episodes, seed=EVAL_SEED)
            steps.append(model.num_timesteps)
            successes.append(played[work.task].successes / played[work.task].episodes)
            seconds.append(spent)
    reached = [k for k, success in enumerate(successes) if success >= threshold]
    return {
        "env_steps": steps,
        "success": successes,
        "seconds": seconds,
        "threshold_steps": steps[reached[0]] if reached else None,
        "threshold_seconds": seconds[reached[0]] if reached else None,
    }


def compared(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return how much better each rung is than the first one on the same prior, by seed, and half of a 90 % interval.

    A run counts by the mean over its evaluations: how fast it learns as well as where it ends.
    """
    rows = []
    for group in SAME_PRIOR:
        first, *others = [rung for rung in group if found.get(rung)] or [None]
        for rung in others:
            pairs = zip(found[rung], found[first], strict=False)
            mean, half = interval([float(np.mean(a["success"]) - np.mean(b["success"])) for a, b in pairs])
            rows.append(
                {"rung": rung, "against": first, "mean": mean, "half_width_90": None if half == math.inf else half}
            )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    add_work(parser, DEFAULT)
    parser.add_argument("--iterations", type=int, default=6, help="rollouts of 8,192 env steps, each with its update")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.5, help="success that counts as reached")
    parser.add_argument("--rungs", type=int, nargs="+", default=[2, 3, 5, 6, 7])
    parser.add_argument(
        "--stage", type=Path, default=Path("runs/gpu_hours_parity"), help="where stage 1 is, or is kept"
    )
    options = parser.parse_args(words)
    work = work_of(options)
    torch.set_num_threads(usable_cores())
    options.stage.mkdir(parents=True, exist_ok=True)
    stage = fitted(work, "bf16", options.stage)
    made = rungs(stage)
    record = {
        "work": plain(work),
        "threshold": options.threshold,
        "priors": {"prompt": stage.prompt.facts, "shared": stage.shared.facts},
        **runs.provenance(),
    }
    found: dict[int, list[dict[str, Any]]] = {rung: [] for rung in options.rungs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for rung in options.rungs:
            run = train(made[rung], replace(work, seed=seed), options.iterations, options.threshold)
            found[rung].append({"seed": seed, **run})
            print(f"rung {rung} seed {seed}: {run['success']} in {run['seconds'][-1]:.0f} s", flush=True)
            now = {"runs": found, "compared": compared(found), "load_average": os.getloadavg()}
            options.out.write_text(json.dumps({**record, **now}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
