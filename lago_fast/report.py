"""From outcomes to a report: rates, intervals, sample efficiency, and the curves to draw.

Test: pytest tests/test_report.py
"""

import math
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from lago_fast import evaluate as evaluation
from lago_fast.algorithms.stage_clock import shares
from lago_fast.envs.suites import Suite, suite_named
from lago_fast.evaluate import TaskResult, evaluated_tasks
from lago_fast.presets import Experiment


class Outcome(NamedTuple):
    """What one training run came to."""

    arm: str
    seed: int
    curve: dict[str, Any]  # as `training.RunResult` has it
    env_steps: int
    wall_s: float
    audit_kl_nats: float | None
    implementations: dict[str, str]
    tasks: dict[str, TaskResult]  # evaluated after training
    stage_s: dict[str, float]  # seconds of each stage of training
    cpu_s: float = 0.0  # of training, of all cores


def make_report(
    experiment: Experiment,
    references: dict[str, dict[str, list[TaskResult]]],
    runs: dict[str, list[Outcome]],
    prior_metrics: dict[str, Any],
    rates: dict[str, Any],
    wall_s: float,
) -> dict[str, Any]:
    """Return the report of a comparison.

    Args:
        experiment: its settings.
        references: arm -> task -> one result per seed, of what is not trained here.
        runs: arm -> one outcome per seed.
        prior_metrics: of stage 1.
        rates: what `throughput.measure` returned, or nothing.
        wall_s: of everything.
    """
    suite = suite_named(experiment.env.env)
    results = {**references, **{arm: _by_task(trained) for arm, trained in runs.items()}}
    tasks: dict[str, dict[str, Any]] = {task: {} for task in evaluated_tasks(experiment.env)}
    arms: dict[str, dict[str, Any]] = {}
    for arm, per_task in results.items():
        trained = runs.get(arm, [])
        for task, seeds in per_task.items():
            steps = [run.curve["steps_to_90"].get(task) for run in trained]
            tasks[task][arm] = {**evaluation.pool(seeds).summary(), "steps_to_90": _mean_steps(steps)}
        everything = evaluation.pool([r for seeds in per_task.values() for r in seeds])
        wall, env_steps = sum(r.wall_s for r in trained), sum(r.env_steps for r in trained)
        arms[arm] = {
            **everything.summary(),
            "env_steps": env_steps,
            "env_steps_per_s": env_steps / wall if wall else None,
            "steps_to_90": _mean_steps([tasks[task][arm]["steps_to_90"] for task in experiment.env.tasks]),
            "wall_s": wall,
            "core_hours": sum(r.cpu_s for r in trained) / 3600 if trained else None,
            "stages": stages([run.stage_s for run in trained]),
        }
    audits = [run.audit_kl_nats for run in runs.get("lago", []) if run.audit_kl_nats is not None]
    return {
        "arms": arms,
        "tasks": tasks,
        **splits_of(suite, results, tuple(tasks)),
        "complete": all(len(runs.get(arm, [])) == len(experiment.seeds) for arm in experiment.arms),
        "per_seed": {
            arm: [
                {
                    "seed": run.seed,
                    **{task: result.to_json() for task, result in run.tasks.items()},
                    "steps_to_90": run.curve["steps_to_90"],
                    "audit_kl_nats": run.audit_kl_nats,
                    "env_steps": run.env_steps,
                    "wall_s": run.wall_s,
                    "cpu_s": run.cpu_s,
                    **_mean_of_one(suite, run, tuple(tasks)),
                }
                for run in trained
            ]
            for arm, trained in runs.items()
        },
        "curves": {arm: [run.curve["tasks"] for run in trained] for arm, trained in runs.items()},
        "sample_efficiency": sample_efficiency(runs) if {"ppo", "lago"} <= runs.keys() else None,
        "budget": {
            "env_steps_per_task_arm_seed": experiment.train.steps_per_task,
            "seeds": list(experiment.seeds),
        },
        "prior_mode": experiment.train.prior_mode,
        "overlap": experiment.train.overlap,
        "prior_metrics": prior_metrics,
        "audit_kl_nats": float(np.mean(audits)) if audits else None,
        "warm_start": False,
        "imitation": experiment.train.guard and experiment.train.guard_imitate,
        **suite.about(),
        **rates,
        "implementations": next((r.implementations for seeds in runs.values() for r in seeds), {}),
        "torch_threads": torch.get_num_threads(),
        "settings": asdict(experiment),
        "wall_s": wall_s,
    }


def splits_of(suite: Suite, results: dict[str, dict[str, list[TaskResult]]], tasks: tuple[str, ...]) -> dict[str, Any]:
    """Return every arm's mean success with its interval, per split and over all splits; nothing without splits.

    Of splits only those of which every task was evaluated, and the mean only when none is missing. A split's figure is
    the mean of its tasks' and the mean is that of the splits': each task weighs alike in its split, each split alike
    in the mean. The intervals are of the episodes; they say nothing of the seeds.

    Args:
        suite: with its splits.
        results: arm -> task -> one result per seed.
        tasks: that were evaluated.
    """
    parts = {name: members for name, members in suite.splits.items() if set(members) <= set(tasks)}
    if not parts:
        return {}
    pooled = {arm: {task: evaluation.pool(seeds) for task, seeds in per.items()} for arm, per in results.items()}
    shares = {name: dict.fromkeys(members, 1 / len(members)) for name, members in parts.items()}
    if parts.keys() == suite.splits.keys():
        shares["mean"] = {task: 1 / (len(parts) * len(members)) for members in parts.values() for task in members}
    found: dict[str, Any] = {
        name: {arm: _summed(per_task, weights) for arm, per_task in pooled.items()} for name, weights in shares.items()
    }
    gap = None
    if "mean" in shares and {"ppo", "lago"} <= pooled.keys():
        (lago, *of_lago), (ppo, *of_ppo) = (
            evaluation.weighted_mean([(pooled[arm][task], w) for task, w in shares["mean"].items()])
            for arm in ("lago", "ppo")
        )
        (low, high), (ppo_low, ppo_high) = of_lago[0], of_ppo[0]
        below, above = math.hypot(lago - low, ppo_high - ppo), math.hypot(high - lago, ppo - ppo_low)
        gap = {"mean": lago - ppo, "ci95": [lago - ppo - below, lago - ppo + above]}
    return {"splits": found, "lago_minus_ppo": gap, "published": dict(suite.published)}


def _summed(per_task: dict[str, TaskResult], weights: dict[str, float]) -> dict[str, Any]:
    success, interval = evaluation.weighted_mean([(per_task[task], weight) for task, weight in weights.items()])
    episodes = sum(per_task[task].episodes for task in weights)
    return {"success": success, "success_ci95": list(interval), "episodes": episodes}


def _mean_of_one(suite: Suite, run: Outcome, tasks: tuple[str, ...]) -> dict[str, Any]:
    splits = splits_of(suite, {run.arm: {task: [result] for task, result in run.tasks.items()}}, tasks)
    return {"mean": splits["splits"]["mean"][run.arm]["success"]} if "mean" in splits.get("splits", {}) else {}


def stages(per_run: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return per stage of training its seconds over all runs, its share, and the speed-up that it stands in the way of.

    The stages are of `lago_fast.algorithms.stage_clock`; without runs, or without a stage that took time, none.
    """
    seconds: dict[str, float] = {}
    for run in per_run:
        for name, spent in run.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    return {name: share._asdict() for name, share in shares(seconds).items()}


def _mean_steps(steps: list[Any]) -> float | None:
    """Return the mean, None when any of them never got there: a mean over the lucky ones would mislead."""
    return None if not steps or any(s is None for s in steps) else float(np.mean(steps))


def sample_efficiency(runs: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Return per task how many env steps PPO and LaGO took to 90 % of PPO's best training success, and to its last.

    Curves are means over seeds, from where they are settled. A task on which PPO's best is below 5 % has no meaningful
    threshold and is left out of the mean ratio.

    Args:
        runs: arm -> one outcome per seed.
    """
    mean = {arm: _mean_curves(runs[arm]) for arm in ("ppo", "lago")}
    tasks: dict[str, dict[str, Any]] = {}
    for task, (ppo_steps, ppo_success) in mean["ppo"].items():
        best = float(ppo_success.max())
        lago_steps, lago_success = mean["lago"][task]
        reached = {
            "ppo": _first(ppo_steps, ppo_success, 0.9 * best),
            "lago": _first(lago_steps, lago_success, 0.9 * best),
        }
        ratio = reached["lago"] / reached["ppo"] if best >= 0.05 and reached["lago"] and reached["ppo"] else None
        last = float(ppo_success[-1])
        tasks[task] = {
            "ppo_best_success": best,
            "steps": reached,
            "lago_over_ppo": ratio,
            "ppo_final_success": last,
            "steps_to_ppo_final": {
                "ppo": _first(ppo_steps, ppo_success, last),
                "lago": _first(lago_steps, lago_success, last),
            },
        }
    ratios = [t["lago_over_ppo"] for t in tasks.values() if t["ppo_best_success"] >= 0.05]
    complete = ratios and all(r is not None for r in ratios)
    return {"tasks": tasks, "mean_lago_over_ppo": float(np.mean(ratios)) if complete else None}


def _mean_curves(runs: list[Outcome]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    curves, after = {}, max(run.curve["settled_from"] for run in runs)
    for task in runs[0].curve["tasks"]:
        points = [run.curve["tasks"][task] for run in runs]
        n = min(len(p["env_steps"]) for p in points)
        steps = np.array(points[0]["env_steps"][:n])
        success = np.mean([p["success"][:n] for p in points], axis=0)
        curves[task] = _settled(steps, success, after)
    return curves


def _settled(steps: np.ndarray, success: np.ndarray, after: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve from so many steps on; of a training too short for that, all of it."""
    kept = steps >= after if (steps >= after).any() else np.ones(len(steps), bool)
    return steps[kept], success[kept]


def _first(steps: np.ndarray, success: np.ndarray, threshold: float) -> int | None:
    reached = np.flatnonzero(success >= threshold)
    return int(steps[reached[0]]) if len(reached) else None


def curves_of(experiment: Experiment, runs: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Return task -> arm -> one (env steps, success) per seed, as `draw_curves` wants them."""

    def curve(run: Outcome, task: str) -> tuple[np.ndarray, np.ndarray]:
        points = run.curve["tasks"][task]
        return _settled(np.array(points["env_steps"]), np.array(points["success"]), run.curve["settled_from"])

    return {
        task: {arm: [curve(run, task) for run in trained] for arm, trained in runs.items()}
        for task in experiment.env.tasks
    }


def _by_task(trained: list[Outcome]) -> dict[str, list[TaskResult]]:
    return {task: [run.tasks[task] for run in trained] for task in trained[0].tasks}
