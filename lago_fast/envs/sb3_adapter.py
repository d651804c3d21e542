"""Any array-lane environment as a stable-baselines3 `VecEnv`: the only file that imports SB3 here.

Same-step autoreset, as SB3 expects: an environment that ended is reset before the step returns, its last
observation is a copy in `info["terminal_observation"]`, and `TimeLimit.truncated` tells a truncation (to be
bootstrapped) from a termination. Transition for transition it carries what the array lane's valid rows do.
Tests: tests/envs/test_sb3_adapter.py.
"""

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from lago_fast.envs.vec_env import ArrayVecEnv
from lago_fast.errors import UnsupportedArgument


class SB3VecEnv(VecEnv):
    """A stable-baselines3 vector environment over an `ArrayVecEnv`, which is its `array_lane`.

    Every info holds `success` (at this step), `instruction_id` (of the returned observation) and
    `TimeLimit.truncated`. At an end also `terminal_observation` (a copy), `terminal_instruction_id`,
    `is_success` (at any step of the episode) and `episode` {r: sum of raw rewards, l: steps, t: seconds},
    which SB3's loggers read as they read a `Monitor`'s.

    `seed` follows SB3's rule: it takes effect at the next `reset`, and `PPO(seed=...)` calls it.
    """

    def __init__(self, array_lane: ArrayVecEnv) -> None:
        self.array_lane = array_lane
        n = array_lane.num_envs
        super().__init__(n, array_lane.observation_space, array_lane.action_space)
        self._return = np.zeros(n, np.float64)
        self._length = np.zeros(n, np.int64)
        self._succeeded = np.zeros(n, bool)
        self._start = time.perf_counter()

    def reset(self) -> VecEnvObs:
        """Start a new episode everywhere; returns observations [N, O]."""
        if any(self._options):
            raise UnsupportedArgument("options: these environments have no reset options")
        observation, instruction_id = self.array_lane.reset()
        self.reset_infos = [{"instruction_id": int(i)} for i in instruction_id]
        self._return[:], self._length[:], self._succeeded[:] = 0.0, 0, False
        return observation

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Reseed from the next `reset` on, on either lane; None draws a seed.

        Returns the seed of each environment. Raises NotImplementedError where the array lane cannot.
        """
        if seed is None:
            seed = int(np.random.default_rng().integers(2**32))
        return self.array_lane.seed(seed)

    def step_async(self, actions: np.ndarray) -> None:
        """Start a step with actions [N, D]."""
        self.array_lane.send(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Finish the step; environments that ended already stand at their next episode's start."""
        step = self.array_lane.recv()
        done = step.terminated | step.truncated
        self._return += step.raw_reward
        self._length += 1
        self._succeeded |= step.success
        infos: list[dict[str, Any]] = [
            {"success": bool(success), "instruction_id": int(i), "TimeLimit.truncated": bool(truncated)}
            for success, i, truncated in zip(step.success, step.instruction_id, step.truncated, strict=True)
        ]
        ended = np.flatnonzero(done)
        if len(ended):
            fresh = self.array_lane.reset_envs(ended)
            for i, instruction_id in zip(ended.tolist(), fresh.instruction_id, strict=True):
                infos[i] |= self._end_info(i, step.observation[i], infos[i]["instruction_id"])
                infos[i]["instruction_id"] = int(instruction_id)
            step.observation[ended] = fresh.observation
            self._return[ended], self._length[ended], self._succeeded[ended] = 0.0, 0, False
        return step.observation, step.reward, done, infos

    def _end_info(self, i: int, observation: np.ndarray, instruction_id: int) -> dict[str, Any]:
        return {
            "terminal_observation": observation.copy(),
            "terminal_instruction_id": instruction_id,
            "is_success": bool(self._succeeded[i]),
            "episode": {
                "r": float(self._return[i]),
                "l": int(self._length[i]),
                "t": round(time.perf_counter() - self._start, 6),
            },
        }

    def close(self) -> None:
        """Close the array lane; a second call does nothing."""
        self.array_lane.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the array lane, once per environment asked for."""
        return [getattr(self.array_lane, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the array lane, which all environments share.

        Raises:
            UnsupportedArgument: `indices` names only some environments.
            AttributeError: the array lane has no such attribute.
        """
        self._refuse_some(indices)
        getattr(self.array_lane, attr_name)
        setattr(self.array_lane, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the array lane once; its result is repeated for each environment.

        Raises:
            UnsupportedArgument: `indices` names only some environments.
        """
        self._refuse_some(indices)
        result = getattr(self.array_lane, method_name)(*method_args, **method_kwargs)
        return [result] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """True for `Monitor`, whose `episode` records these environments write themselves; else False."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def _refuse_some(self, indices: VecEnvIndices) -> None:
        if indices is not None and set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise UnsupportedArgument("indices: native environments share attributes and methods; give None")
