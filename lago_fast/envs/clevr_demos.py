"""Episodes of CLEVR-Robot's scripts: the expert that looks ahead, and a greedy script that does not.

Tests: tests/envs/test_clevr_demos.py.
"""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from lago_fast.envs.clevr_actions import PUSHES
from lago_fast.envs.clevr_expert import make_clevr_expert
from lago_fast.envs.clevr_goals import AXES
from lago_fast.envs.clevr_judges import satisfied
from lago_fast.envs.clevr_rewards import BESIDE_M
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv
from lago_fast.envs.experts import Episode
from lago_fast.errors import UnsupportedArgument

UNSTUCK = 0.1  # share of the greedy script's pushes that are drawn at random


def play_clevr_expert(
    family: str,
    *,
    action_noise: float = 0.0,
    stop_after_success: int | None = None,
    seed: int = 0,
    max_episode_steps: int = 50,
    num_envs: int = 10,
) -> Iterator[Episode]:
    """Episodes of the expert on a family without end, in whole rounds of `num_envs`.

    An episode's length does not decide whether it is among the first. An episode ends with its success. Arguments as
    in `lago_fast.demos.record_demos`; the environments are closed with the generator.

    Raises:
        UnsupportedArgument: noise, or steps after the success, which this environment does not have.
    """
    if action_noise or stop_after_success:
        raise UnsupportedArgument("action_noise, stop_after_success: CLEVR-Robot's episodes have neither; leave it out")
    env = ClevrRobotArrayEnv([family], num_envs, seed=seed, max_episode_steps=max_episode_steps)
    expert = make_clevr_expert(env)
    try:
        for number in count():
            yield from _play_round(env, expert, number)
    finally:
        env.close()


def _play_round(env: ClevrRobotArrayEnv, expert: Callable[[], np.ndarray], number: int) -> list[Episode]:
    """One episode of every environment."""
    state, instruction_id = env.reset()
    states, actions, steps = [state], [], []
    last_step = np.full(env.num_envs, -1)
    while (last_step < 0).any():
        actions.append(expert())
        steps.append(env.step(actions[-1]))
        states.append(steps[-1].observation)
        ended = steps[-1].terminated | steps[-1].truncated
        last_step = np.where((last_step < 0) & ended, len(steps) - 1, last_step)
    return [
        Episode(
            states=np.stack([row[i] for row in states[: end + 2]]),
            actions=np.array([row[i] for row in actions[: end + 1]]),
            rewards=np.array([step.raw_reward[i] for step in steps[: end + 1]]),
            success=np.array([step.success[i] for step in steps[: end + 1]]),
            instruction=env.instructions[instruction_id[i]],
            env_seed=env.env_seeds[i],
            round=number,
            terminated=bool(steps[end].terminated[i]),
        )
        for i, end in enumerate(last_step)
    ]


def make_greedy_script(env: ClevrRobotArrayEnv, seed: int = 0) -> Callable[[], np.ndarray]:
    """A script without a simulator: push the source of the first open sub-goal towards its place.

    That is beside the destination. It takes the push whose direction is nearest, whatever stands in the way; a tenth
    of its pushes are random, since a push against a wall would be repeated for ever. Returns a function that gives
    the actions [N] for the state now.
    """
    rng = np.random.default_rng(seed)
    unit = PUSHES / np.linalg.norm(PUSHES, axis=1, keepdims=True)

    def act() -> np.ndarray:
        actions = rng.integers(env.action_space.n, size=env.num_envs)  # type: ignore[union-attr]  # of "perfect"
        for family in env.families:
            goals, xy = family.now, env.ball_xy[family.rows]
            rows = np.arange(len(xy))
            k = satisfied(goals, xy, env.judge).argmin(axis=1)
            source, axis = goals.source[rows, k], AXES[goals.direction[rows, k]]
            towards = axis
            if goals.kind != "easy":
                towards = xy[rows, goals.destination[rows, k]] + BESIDE_M * axis - xy[rows, source]
            greedy = source * len(PUSHES) + (towards @ unit.T).argmax(axis=1)
            mine = np.arange(family.rows.start, family.rows.stop)
            kept = rng.random(len(mine)) >= UNSTUCK
            actions[mine[kept]] = greedy[kept]
        return actions

    return act
