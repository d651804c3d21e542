"""A gymnasium vector env as Stable-Baselines3 wants it, in each of gymnasium's three ways to start the next episode.

SAME_STEP and DISABLED become Stable-Baselines3's own lane. NEXT_STEP, gymnasium's default, cannot: the trainer steps it
by a lane that marks the row after an end invalid.
Test: pytest tests/algorithms/test_gymnasium_vector.py
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from lago_fast.algorithms.lanes import Episode, LaneStep, whole_id
from lago_fast.errors import UnsupportedArgument

FINAL = ("final_info", "_final_info", "final_obs", "_final_obs")  # what an info says of the episode before


class GymnasiumVecEnv(VecEnv):
    """A Stable-Baselines3 vector env over a gymnasium one.

    At an end an info holds `terminal_observation`, `TimeLimit.truncated` and `episode`, and whatever the env itself
    says of that row. Reset options and setting attributes of some envs only are refused.

    Args:
        env: the vector env; its metadata name the autoreset mode.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env = env  # which the next line asks for its render mode
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.autoreset_mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.next_step_lane = NextStepLane(self) if self.autoreset_mode is AutoresetMode.NEXT_STEP else None
        self.episodes = _Episodes(env.num_envs)

    def reset(self) -> Any:
        """Start a new episode everywhere; returns observations [N, ...]."""
        if any(self._options):
            raise UnsupportedArgument("options: they cannot be given to single envs of a gymnasium vector env")
        seeds = self._seeds if any(seed is not None for seed in self._seeds) else None
        observation, infos = self.env.reset(seed=seeds)  # type: ignore[arg-type]
        self.reset_infos = [info_of(infos, i) for i in range(self.num_envs)]
        self._reset_seeds()
        self.episodes.start()
        return copied(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep actions [N, ...] for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Step; envs that ended already stand at their next episode's start.

        Raises:
            UnsupportedArgument: the env starts the next episode one step later.
        """
        if self.next_step_lane is not None:
            raise UnsupportedArgument(
                "env: with AutoresetMode.NEXT_STEP only FastKLPPO itself can step it, not a wrapper before it; "
                'make it with vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}'
            )
        observation, reward, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        records = [info_of(infos, i) for i in range(self.num_envs)]
        for episode in self.episodes.add(reward, done, records):
            records[episode.env]["episode"] = self.episodes.record(episode)
        last, fresh = copied(observation), infos
        if self.autoreset_mode is AutoresetMode.DISABLED and done.any():
            observation, fresh = self.env.reset(options={"reset_mask": done})
        for i in np.flatnonzero(done).tolist():
            self.reset_infos[i] = info_of({key: column for key, column in fresh.items() if key not in FINAL}, i)
        for i, info in enumerate(records):
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            if done[i]:
                info["terminal_observation"] = info.pop("final_obs", row_of(last, i))
        return copied(observation), np.asarray(reward, np.float32), done, records

    def close(self) -> None:
        """Close the vector env."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of each env asked for, or the vector env's own where it has one for all."""
        if hasattr(self.env, "get_attr") and not hasattr(self.env, attr_name):
            values: Sequence[Any] = self.env.get_attr(attr_name)
        else:
            values = [getattr(self.env, attr_name)] * self.num_envs
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all envs."""
        self._refuse_some(indices)
        if hasattr(self.env, "set_attr"):
            self.env.set_attr(attr_name, value)
        else:
            setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of all envs."""
        self._refuse_some(indices)
        if hasattr(self.env, "call"):
            return list(self.env.call(method_name, *method_args, **method_kwargs))
        return [getattr(self.env, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Return True for `Monitor`, whose `episode` records this class writes itself; else False."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def _refuse_some(self, indices: Any) -> None:
        if indices is not None and set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise UnsupportedArgument("indices: a gymnasium vector env is addressed as a whole; give None")


class NextStepLane:
    """The lane of a NEXT_STEP env: an ended env ignores its next action and returns its next first observation."""

    def __init__(self, owner: GymnasiumVecEnv) -> None:
        self.owner = owner

    def begin(self) -> np.ndarray:
        self._ended = np.zeros(self.owner.num_envs, bool)
        ids = [whole_id(info.get("instruction_id", 0), i) for i, info in enumerate(self.owner.reset_infos)]
        self._instruction_id = np.array(ids, dtype=np.int64)
        return self._instruction_id.copy()

    def step(self, actions: np.ndarray) -> LaneStep:
        observation, reward, terminated, truncated, infos = self.owner.env.step(actions)
        valid = ~self._ended
        terminated, truncated = terminated & valid, truncated & valid & ~terminated
        self._ended = terminated | truncated
        records = [info_of(infos, i) for i in range(len(valid))]
        episodes = self.owner.episodes.add(np.where(valid, reward, 0.0), self._ended, records, valid)
        for i, info in enumerate(records):
            self._instruction_id[i] = whole_id(info.get("instruction_id", self._instruction_id[i]), i)
            info["TimeLimit.truncated"] = bool(truncated[i])
        for episode in episodes:
            records[episode.env] |= {"episode": self.owner.episodes.record(episode)}
            records[episode.env]["terminal_observation"] = row_of(copied(observation), episode.env)
        nothing = np.zeros(0, np.int64)
        return LaneStep(
            copied(observation),
            np.where(valid, reward, 0.0).astype(np.float32),
            terminated,
            truncated,
            valid,
            self._instruction_id.copy(),
            nothing,
            nothing,
            episodes,
            [episode.success for episode in episodes if episode.success is not None],
            records,
        )


class _Episodes:
    """Return, length and success of the episodes under way."""

    def __init__(self, num_envs: int) -> None:
        self.total, self.length = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.started = time.perf_counter()

    def start(self) -> None:
        self.total[:], self.length[:] = 0.0, 0

    def record(self, episode: Episode) -> dict[str, Any]:
        """Return an episode as Stable-Baselines3's Monitor writes it."""
        return {"r": episode.total_reward, "l": episode.length, "t": time.perf_counter() - self.started}

    def add(
        self, reward: np.ndarray, ended: np.ndarray, infos: list[dict[str, Any]], valid: np.ndarray | bool = True
    ) -> list[Episode]:
        """Count a step and return the episodes that ended with it."""
        self.total += reward
        self.length += valid
        episodes = []
        for i in np.flatnonzero(ended).tolist():
            success = infos[i].get("is_success")
            episodes.append(Episode(i, float(self.total[i]), int(self.length[i]), success))
            self.total[i], self.length[i] = 0.0, 0
        return episodes


def info_of(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """Return what gymnasium's dictionary of columns says of env `i`; what it says of an ended episode comes first."""
    info: dict[str, Any] = {}
    for key, column in infos.items():
        if key.startswith("_") or ("_" + key in infos and not infos["_" + key][i]):
            continue
        if key == "final_info":
            info |= info_of(column, i)
        elif key == "final_obs" or not isinstance(column, dict):
            info.setdefault(key, row_of(column, i))
    return info


def row_of(columns: Any, i: int) -> Any:
    """Return row `i` of an array, or of each array of a dictionary."""
    return {key: column[i] for key, column in columns.items()} if isinstance(columns, dict) else columns[i]


def copied(observation: Any) -> Any:
    """Return a copy of an array, or of a dictionary of arrays: an env may write its next step into the same memory."""
    if isinstance(observation, dict):
        return {key: np.array(column) for key, column in observation.items()}
    return np.array(observation)
