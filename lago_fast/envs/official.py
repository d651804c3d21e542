"""Meta-World's own Python environments, as a stable-baselines3 user steps them: the baseline of speed tables.

Source: https://github.com/Farama-Foundation/Metaworld. Test: pytest tests/envs/test_official_env.py
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from lago_fast.envs.metaworld import STATE_DIM
from lago_fast.envs.metaworld_tasks import check_tasks
from lago_fast.errors import MissingExtra


class OfficialMetaworld(gym.Wrapper):
    """One official environment with a visible goal, float32 observations and the instruction's row behind the state.

    Args:
        task: short name such as "drawer-open".
        seed: of its goals.
        max_episode_steps: an episode is truncated after so many steps.
        instruction_row: [Z] float32, appended to each observation; None: nothing is.

    Raises:
        UnknownTask: not one of the 50 tasks.
        MissingExtra: the `metaworld` package is not installed.
    """

    def __init__(self, task: str, seed: int, max_episode_steps: int, instruction_row: np.ndarray | None) -> None:
        check_tasks([task])
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        except ImportError as error:
            raise MissingExtra("the official environments need Meta-World: pip install 'lago_fast[envs]'") from error
        # the package types these constructors as their base class, which takes no seed
        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"]
        env = make(seed=seed)
        env._freeze_rand_vec = False  # a new goal at every reset, as in EnvPool
        super().__init__(gym.wrappers.TimeLimit(env, max_episode_steps))
        self._row = np.zeros(0, np.float32) if instruction_row is None else instruction_row.astype(np.float32)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (STATE_DIM + len(self._row),), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, env.action_space.shape, np.float32)

    def reset(self, **settings: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode with a new goal."""
        observation, info = self.env.reset(**settings)
        return self._observe(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Step with an action [4]."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(observation), float(reward), bool(terminated), bool(truncated), info

    def _observe(self, state: np.ndarray) -> np.ndarray:
        return np.concatenate([state.astype(np.float32), self._row])


def official_makers(
    tasks: tuple[str, ...], num_envs: int, max_episode_steps: int, rows: dict[str, np.ndarray] | None
) -> list[Callable[[], gym.Env[Any, Any]]]:
    """Return one constructor per environment, as DummyVecEnv and SubprocVecEnv take them.

    Args:
        tasks: short names.
        num_envs: in all, split evenly.
        max_episode_steps: horizon.
        rows: task -> instruction row [Z]; None where policies see no instruction.
    """

    def maker(i: int) -> Callable[[], gym.Env[Any, Any]]:
        task = tasks[i * len(tasks) // num_envs]
        row = None if rows is None else rows[task]
        return lambda: OfficialMetaworld(task, seed=i, max_episode_steps=max_episode_steps, instruction_row=row)

    return [maker(i) for i in range(num_envs)]
