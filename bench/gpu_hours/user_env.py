"""EnvPool's Meta-World as a VecEnv of Stable-Baselines3, as a user of both writes it.

EnvPool's rows become a list of dicts, episodes that ended are started again at once and by one call, and time limits
are told from failures. Test: pytest tests/bench/test_user_env.py
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from bench.gpu_hours.work import Work
from lago_fast.cores import usable_cores
from lago_fast.envs.metaworld import envpool_id


class UserVecEnv(VecEnv):
    """A pool of EnvPool as Stable-Baselines3 wants it.

    Args:
        pool: of `envpool.make_gymnasium`, all of whose envs step together.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__(len(pool), pool.observation_space, pool.action_space)
        self.pool = pool

    def reset(self) -> np.ndarray:
        """Start all episodes, and return the first observations [N, S]."""
        return self.pool.reset()[0]

    def step_async(self, actions: np.ndarray) -> None:
        """Start a step of all envs with actions [N, D]."""
        self.pool.send(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Wait for the step, and start again what it ended."""
        observation, reward, terminated, truncated, columns = self.pool.recv()
        done = terminated | truncated
        columns = {name: column for name, column in columns.items() if isinstance(column, np.ndarray)}
        infos = [{name: column[i] for name, column in columns.items()} for i in range(self.num_envs)]
        ended = np.flatnonzero(done)
        for i in ended:
            infos[i]["terminal_observation"] = observation[i].copy()
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        if len(ended):
            observation[ended] = self.pool.reset(ended)[0]
        return observation, reward, done, infos

    def close(self) -> None:
        """Close the pool."""
        self.pool.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the pool, once per env; its envs draw no pictures."""
        value = None if attr_name == "render_mode" else getattr(self.pool, attr_name)
        return [value] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuse: EnvPool's envs have no attributes of their own."""
        raise NotImplementedError("EnvPool's envs have no attributes")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Refuse: EnvPool's envs have no methods of their own."""
        raise NotImplementedError("EnvPool's envs have no methods")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Return that no env is wrapped."""
        del wrapper_class
        return [False] * len(list(self._get_indices(indices)))


def pool_of(task: str, seeds: Sequence[int], max_episode_steps: int) -> Any:
    """Return EnvPool's simulators of a task, the goal shown, on all cores."""
    import envpool

    return envpool.make_gymnasium(
        envpool_id(task),
        num_envs=len(seeds),
        num_threads=usable_cores(),
        env_seed=list(seeds),
        partially_observable=False,
        max_episode_steps=max_episode_steps,
    )


def make_user_env(work: Work) -> VecEnv:
    """Return the work's envs with Stable-Baselines3's own bookkeeping of episodes and scaling of rewards."""
    pool = pool_of(work.task, range(work.seed, work.seed + work.num_envs), work.max_episode_steps)
    return VecNormalize(VecMonitor(UserVecEnv(pool)), norm_obs=False, gamma=work.gamma)
