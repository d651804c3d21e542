"""Scripted Meta-World experts, by the official package's policies, and the episodes they play.

The policies are Python and take one observation at a time; here they are looped over the rows. They read
the goal from the observation, so the environment must show it.
Source: https://github.com/Farama-Foundation/Metaworld, `metaworld/policies`.
Tests: tests/envs/test_experts.py.
"""

import warnings
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from lago_fast.envs.metaworld import STATE_DIM, MetaworldArrayEnv
from lago_fast.envs.metaworld_tasks import check_tasks
from lago_fast.errors import MissingExtra, UnsupportedArgument

Expert = Callable[[np.ndarray], np.ndarray]


class Episode(NamedTuple):
    """One episode as it was played; T steps."""

    states: np.ndarray  # [T + 1, S] float32, the last one terminal
    actions: np.ndarray  # [T, D] float32 or [T] int64, as executed
    rewards: np.ndarray  # [T] float32, the simulator's
    success: np.ndarray  # [T] bool
    instruction: str
    env_seed: int  # of the simulator whose `round`-th episode this is
    round: int
    terminated: bool = False  # at the last step; else it is truncated there


def make_expert(task: str) -> Expert:
    """The scripted expert of a task: states [n, 39] -> actions [n, 4] float32, clipped to [-1, 1].

    Raises:
        UnknownTask: not one of the 50 tasks.
        MissingExtra: the `metaworld` package is not installed.
    """
    check_tasks([task])
    try:
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise MissingExtra("scripted experts need Meta-World: pip install 'lago_fast[envs]'") from error
    policy_class: Any = ENV_POLICY_MAP[f"{task}-v3"]  # the package types its values as the abstract base
    policy = policy_class()

    def act(states: np.ndarray) -> np.ndarray:
        states = np.array(states, np.float64)  # a copy: some policies write into what they are given
        if states.ndim != 2 or states.shape[1] != STATE_DIM:
            raise UnsupportedArgument(f"states has shape {states.shape}; expected [n, {STATE_DIM}]")
        with warnings.catch_warnings():
            # many policies ask for more than the box allows and say so at every step
            warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
            actions = np.stack([policy.get_action(state) for state in states])
        return np.clip(actions, -1.0, 1.0).astype(np.float32)

    return act


def play_expert(
    task: str,
    *,
    action_noise: float = 0.0,
    stop_after_success: int | None = None,
    seed: int = 0,
    max_episode_steps: int = 500,
    num_envs: int = 10,
) -> Iterator[Episode]:
    """Episodes of a task's scripted expert without end, in whole rounds of `num_envs`.

    An episode's length does not decide whether it is among the first. Arguments as in
    `lago_fast.demos.record_demos`; the environments are closed with the generator.
    """
    for_env, for_noise = np.random.SeedSequence([seed, zlib.crc32(task.encode())]).spawn(2)
    noise = np.random.default_rng(for_noise)
    expert = make_expert(task)
    env = MetaworldArrayEnv(
        [task], num_envs, seed=int(for_env.generate_state(1)[0]), max_episode_steps=max_episode_steps
    )
    try:
        for number in count():
            yield from _play_round(env, expert, noise, action_noise, stop_after_success, number)
    finally:
        env.close()


def _play_round(
    env: MetaworldArrayEnv,
    expert: Expert,
    noise: np.random.Generator,
    action_noise: float,
    stop_after_success: int | None,
    number: int,
) -> list[Episode]:
    """One episode of every environment."""
    state, instruction_id = env.reset()
    states, actions, steps = [state], [], []
    last_step = np.full(env.num_envs, env.max_episode_steps - 1)
    for t in range(env.max_episode_steps):
        action = expert(states[-1])
        action = np.clip(action + action_noise * noise.standard_normal(action.shape), -1.0, 1.0)
        actions.append(action.astype(np.float32))
        steps.append(env.step(actions[-1]))
        states.append(steps[-1].observation)
        if stop_after_success is not None:
            last_step = np.where(steps[-1].success, np.minimum(last_step, t + stop_after_success), last_step)
        if (t >= last_step).all():
            break
    return [
        Episode(
            states=np.stack([row[i] for row in states[: end + 2]]),
            actions=np.stack([row[i] for row in actions[: end + 1]]),
            rewards=np.array([step.raw_reward[i] for step in steps[: end + 1]]),
            success=np.array([step.success[i] for step in steps[: end + 1]]),
            instruction=env.instructions[instruction_id[i]],
            env_seed=env.env_seeds[i],
            round=number,
        )
        for i, end in enumerate(last_step)
    ]
