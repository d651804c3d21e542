"""Evaluation of anything that acts on Meta-World: success per task with Wilson's interval.

Every episode runs to the same horizon, so that no outcome is over-represented among the first to finish.
Test: pytest tests/test_evaluate.py
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from lago_fast.envs.experts import make_expert
from lago_fast.envs.metaworld import MetaworldArrayEnv
from lago_fast.presets import EnvSettings

ENVS_PER_TASK = 25
Z_95 = 1.959963984540054


class View(NamedTuple):
    """What an actor may look at; each takes what it needs."""

    observation: np.ndarray  # [N, O], as policies see it
    state: np.ndarray  # [N, S], raw
    instruction_id: np.ndarray  # [N]


Act = Callable[[View], np.ndarray]  # -> actions [N, D]


@dataclass(frozen=True)
class TaskResult:
    """What one actor did on one task."""

    episodes: int
    successes: int  # at any step
    successes_at_end: int
    mean_return: float  # sum of the simulator's rewards

    def summary(self) -> dict[str, Any]:
        """Return rates and the interval, as reports carry them."""
        return {
            "success": self.successes / self.episodes,
            "success_ci95": list(wilson(self.successes, self.episodes)),
            "success_at_end": self.successes_at_end / self.episodes,
            "return": self.mean_return,
            "episodes": self.episodes,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain data."""
        return asdict(self)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion (Wilson, JASA 1927)."""
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # at the ends the formula gives 0 and 1 up to rounding
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def pool(results: list[TaskResult]) -> TaskResult:
    """Return the results of several seeds or tasks as one, episodes added up."""
    episodes = sum(r.episodes for r in results)
    return TaskResult(
        episodes,
        sum(r.successes for r in results),
        sum(r.successes_at_end for r in results),
        sum(r.mean_return * r.episodes for r in results) / episodes,
    )


def evaluate(
    act: Act,
    settings: EnvSettings,
    *,
    episodes_per_task: int,
    seed: int,
    instruction_table: np.ndarray | None = None,
) -> dict[str, TaskResult]:
    """Play whole episodes on each task and count successes.

    Args:
        act: maps what is seen to actions [N, D].
        settings: tasks and horizon.
        episodes_per_task: how many.
        seed: of the simulators; keep it apart from the seeds of training.
        instruction_table: [M, Z], as in training.
    """
    per_task = min(ENVS_PER_TASK, episodes_per_task)
    rounds = math.ceil(episodes_per_task / per_task)
    env = MetaworldArrayEnv(
        settings.tasks,
        per_task * len(settings.tasks),
        seed=seed,
        max_episode_steps=settings.max_episode_steps,
        instruction_table=instruction_table,
    )
    try:
        episodes = [_play_round(env, act) for _ in range(rounds)]  # [rounds] of three [N] arrays
    finally:
        env.close()
    results = {}
    for k, task in enumerate(env.tasks):
        # the last round may hold more episodes than were asked for
        some, end, total = (
            np.concatenate([columns[i][env.task_id == k] for columns in episodes])[:episodes_per_task] for i in range(3)
        )
        results[task] = TaskResult(len(some), int(some.sum()), int(end.sum()), float(total.mean()))
    return results


def _play_round(env: MetaworldArrayEnv, act: Act) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Play one episode in every env; return success at any step, success at the end, and the return, [N] each."""
    observation, instruction_id = env.reset()
    success = np.zeros(env.num_envs, dtype=bool)
    total = np.zeros(env.num_envs)
    for _ in range(env.max_episode_steps):
        step = env.step(act(View(observation, observation[:, : env.state_dim], instruction_id)))
        success |= step.success
        total += step.raw_reward
        observation, instruction_id = step.observation, step.instruction_id
    return success, step.success, total


def expert_actor(settings: EnvSettings, episodes_per_task: int) -> Act:
    """Return the scripted experts as one actor over the envs that `evaluate` makes."""
    experts = [make_expert(task) for task in settings.tasks]
    per_task = min(ENVS_PER_TASK, episodes_per_task)

    def act(view: View) -> np.ndarray:
        return np.concatenate(
            [e(s) for e, s in zip(experts, view.state.reshape(-1, per_task, view.state.shape[1]), strict=True)]
        )

    return act


def random_actor(action_dim: int, seed: int) -> Act:
    """Return an actor that draws uniformly from the box [-1, 1]^D."""
    rng = np.random.default_rng(seed)

    def act(view: View) -> np.ndarray:
        return rng.uniform(-1, 1, size=(len(view.state), action_dim)).astype(np.float32)

    return act
