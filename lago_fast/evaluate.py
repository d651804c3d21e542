"""Evaluation of anything that acts: success per task with Wilson's interval.

Every env plays whole episodes in rounds, one each, so that no outcome is over-represented among the first to finish.
Test: pytest tests/test_evaluate.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from lago_fast.envs.suites import Script, suite_named
from lago_fast.envs.vec_env import ArrayVecEnv
from lago_fast.errors import UnsupportedArgument, check_seed
from lago_fast.presets import EnvSettings

ENVS_PER_TASK = 25
Z_95 = 1.959963984540054


class View(NamedTuple):
    """What an actor may look at; each takes what it needs."""

    observation: np.ndarray  # [N, O], as policies see it
    state: np.ndarray  # [N, S], raw
    instruction_id: np.ndarray  # [N], of the env that is played
    env: ArrayVecEnv  # for scripts that look ahead with the simulator


Act = Callable[[View], np.ndarray]  # -> actions [N, D], or [N] where they are discrete


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


def weighted_mean(parts: Sequence[tuple[TaskResult, float]]) -> tuple[float, tuple[float, float]]:
    """Return the sum of success rates times weights, and its 95 % interval from Wilson's of each rate.

    The intervals are combined as by Zou and Donner (Statistics in Medicine 27, 2008): of one rate it is Wilson's.
    """
    mean = below = above = 0.0
    for result, weight in parts:
        rate, (low, high) = result.successes / result.episodes, wilson(result.successes, result.episodes)
        mean += weight * rate
        below += (weight * (rate - low)) ** 2
        above += (weight * (high - rate)) ** 2
    return mean, (mean - math.sqrt(below), mean + math.sqrt(above))


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
    """Play whole episodes on each task that is evaluated and count successes.

    Args:
        act: maps what is seen to actions.
        settings: tasks and horizon.
        episodes_per_task: how many.
        seed: of the simulators; keep it apart from the seeds of training.
        instruction_table: [M, Z], a row per wording of `known_tasks(settings)`.
    """
    env = make_evaluation_env(settings, episodes_per_task, seed, instruction_table)
    rounds = math.ceil(episodes_per_task * len(env.tasks) / env.num_envs)
    try:
        episodes = [play_round(env, act, settings.max_episode_steps) for _ in range(rounds)]  # three [N] arrays each
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


def make_evaluation_env(
    settings: EnvSettings, episodes_per_task: int, seed: int, instruction_table: np.ndarray | None = None
) -> ArrayVecEnv:
    """Return the env of the tasks that are evaluated, at most ENVS_PER_TASK of each."""
    tasks, suite = evaluated_tasks(settings), suite_named(settings.env)
    return suite.make(
        tasks,
        min(ENVS_PER_TASK, episodes_per_task) * len(tasks),
        seed=seed,
        max_episode_steps=settings.max_episode_steps,
        instruction_table=rows_for(settings, suite.instructions(tasks), instruction_table),
    )


def evaluated_tasks(settings: EnvSettings) -> tuple[str, ...]:
    """Return the tasks that are evaluated: those named for it, else those of training."""
    return settings.eval_tasks or settings.tasks


def known_tasks(settings: EnvSettings) -> tuple[str, ...]:
    """Return the tasks whose words are known: those of training, then the others that are evaluated."""
    return tuple(dict.fromkeys((*settings.tasks, *settings.eval_tasks)))


def rows_for(settings: EnvSettings, texts: Sequence[str], table: np.ndarray | None) -> np.ndarray | None:
    """Return the rows [len(texts), r] of some wordings, out of a table with a row for each that the settings know.

    Raises:
        UnsupportedArgument: a wording that the table does not have.
    """
    if table is None:
        return None
    row = {text: i for i, text in enumerate(suite_named(settings.env).texts(known_tasks(settings)))}
    unknown = [text for text in texts if text not in row]
    if unknown:
        raise UnsupportedArgument(
            f"tasks: what the policy sees of {unknown[0]!r} and {len(unknown) - 1} other wordings was never computed; "
            "name their tasks as --eval-tasks when it is trained"
        )
    return table[[row[text] for text in texts]]


def play_round(env: ArrayVecEnv, act: Act, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Play one episode in every env; return success at any step, success at the end, and the return, [N] each."""
    observation, instruction_id = env.reset()
    success, at_end, over = np.zeros((3, env.num_envs), dtype=bool)
    total = np.zeros(env.num_envs)
    for _ in range(steps):
        step = env.step(act(View(observation, observation[:, : env.state_dim], instruction_id, env)))
        success |= step.success & ~over
        at_end = np.where(over, at_end, step.success)
        total += np.where(over, 0.0, step.raw_reward)
        over |= step.terminated | step.truncated
        if over.all():
            break
        observation, instruction_id = step.observation, step.instruction_id
    return success, at_end, total


def script_actors(settings: EnvSettings) -> dict[str, Act]:
    """Return the environment's scripts as actors over the envs that `evaluate` makes, by name."""

    def actor(script: Script) -> Act:
        return lambda view: script(view.env, view.state)

    scripts = suite_named(settings.env).scripts(evaluated_tasks(settings))
    return {name: actor(script) for name, script in scripts.items()}


def random_actor(action_dim: int, seed: int, *, discrete: bool = False) -> Act:
    """Return an actor that draws uniformly from the box [-1, 1]^D, or among D discrete actions."""
    check_seed("seed", seed)
    rng = np.random.default_rng(seed)

    def act(view: View) -> np.ndarray:
        if discrete:
            return rng.integers(action_dim, size=len(view.state))
        return rng.uniform(-1, 1, size=(len(view.state), action_dim)).astype(np.float32)

    return act


def draw_actions(log_probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return one action [N] per row of log-probabilities [N, A], drawn from them (the Gumbel-max trick)."""
    return (log_probs + rng.gumbel(size=log_probs.shape)).argmax(axis=1)
