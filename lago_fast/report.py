"""From outcomes to a report: rates, intervals, sample efficiency, and the curves to draw.

Test: pytest tests/test_report.py
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lago_fast import evaluate as evaluation
from lago_fast.algorithms.stage_clock import shares
from lago_fast.evaluate import TaskResult
from lago_fast.presets import Experiment


class Outcome(NamedTuple):
    """What one training run came to."""

    arm: str
    seed: int
    curve: dict[str, Any]  # {"tasks": {task: {"env_steps", "success"}}, "steps_to_90": {task: n | None}}
    env_steps: int
    wall_s: float
    audit_kl_nats: float | None
    implementations: dict[str, str]
    tasks: dict[str, TaskResult]  # evaluated after training
    stage_s: dict[str, float]  # seconds of each stage of training


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
    results = {**references, **{arm: _by_task(trained) for arm, trained in runs.items()}}
    tasks: dict[str, dict[str, Any]] = {task: {} for task in experiment.env.tasks}
    arms: dict[str, dict[str, Any]] = {}
    for arm, per_task in results.items():
        trained = runs.get(arm, [])
        for task, seeds in per_task.items():
            steps = [run.curve["steps_to_90"][task] for run in trained]
            tasks[task][arm] = {**evaluation.pool(seeds).summary(), "steps_to_90": _mean_steps(steps)}
        everything = evaluation.pool([r for seeds in per_task.values() for r in seeds])
        wall, env_steps = sum(r.wall_s for r in trained), sum(r.env_steps for r in trained)
        arms[arm] = {
            **everything.summary(),
            "env_steps": env_steps,
            "env_steps_per_s": env_steps / wall if wall else None,
            "steps_to_90": _mean_steps([tasks[task][arm]["steps_to_90"] for task in per_task]),
            "wall_s": wall,
            "stages": stages([run.stage_s for run in trained]),
        }
    audits = [run.audit_kl_nats for run in runs.get("lago", []) if run.audit_kl_nats is not None]
    return {
        "arms": arms,
        "tasks": tasks,
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
        "prior_metrics": prior_metrics,
        "audit_kl_nats": float(np.mean(audits)) if audits else None,
        "warm_start": False,
        **rates,
        "implementations": next((r.implementations for seeds in runs.values() for r in seeds), {}),
        "torch_threads": torch.get_num_threads(),
        "settings": asdict(experiment),
        "wall_s": wall_s,
    }


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
    """Return per task how many env steps PPO and LaGO took to 90 % of PPO's best training success.

    Curves are means over seeds. A task on which PPO's best is below 5 % has no meaningful threshold and is left out
    of the mean ratio.
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
        tasks[task] = {"ppo_best_success": best, "steps": reached, "lago_over_ppo": ratio}
    ratios = [t["lago_over_ppo"] for t in tasks.values() if t["ppo_best_success"] >= 0.05]
    complete = ratios and all(r is not None for r in ratios)
    return {"tasks": tasks, "mean_lago_over_ppo": float(np.mean(ratios)) if complete else None}


def _mean_curves(runs: list[Outcome]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    curves = {}
    for task in runs[0].curve["tasks"]:
        points = [run.curve["tasks"][task] for run in runs]
        n = min(len(p["env_steps"]) for p in points)
        curves[task] = (
            np.array(points[0]["env_steps"][:n]),
            np.mean([p["success"][:n] for p in points], axis=0),
        )
    return curves


def _first(steps: np.ndarray, success: np.ndarray, threshold: float) -> int | None:
    reached = np.flatnonzero(success >= threshold)
    return int(steps[reached[0]]) if len(reached) else None


def curves_of(experiment: Experiment, runs: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Return task -> arm -> one (env steps, success) per seed, as `draw_curves` wants them."""
    return {
        task: {
            arm: [(r.curve["tasks"][task]["env_steps"], r.curve["tasks"][task]["success"]) for r in trained]
            for arm, trained in runs.items()
        }
        for task in experiment.env.tasks
    }


def _by_task(trained: list[Outcome]) -> dict[str, list[TaskResult]]:
    return {task: [run.tasks[task] for run in trained] for task in trained[0].tasks}


def load_report(path: Path) -> dict[str, Any]:
    """Return a report as `compare` wrote it."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
