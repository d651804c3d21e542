"""Two ways to step a vector env, seen as one by the collector: the array lane and Stable-Baselines3's.

The array lane (NEXT_STEP) returns an episode's true last observation and marks the row after it invalid.
Stable-Baselines3's lane (same-step) returns the next episode's first observation, the true last one in `infos`.
Test: pytest tests/algorithms/test_lanes.py
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from lago_fast.algorithms.workers import layers
from lago_fast.errors import UnsupportedArgument


class Episode(NamedTuple):
    env: int  # index in the vector env
    total_reward: float  # the simulator's, not normalised
    length: int  # env steps
    success: Any  # at any step: True or False, or a share, as the env says it; None where it does not
    info: dict[str, Any] | None = None  # as a Monitor wrote it; None where there is none


class LaneStep(NamedTuple):
    observation: Any  # [N, ...], or a dictionary of such
    reward: np.ndarray  # [N] float32
    terminated: np.ndarray  # [N] bool
    truncated: np.ndarray  # [N] bool
    valid: np.ndarray  # [N] bool
    instruction_id: np.ndarray  # [N] int64, of the returned observation
    replaced: np.ndarray  # [k] env indices whose true last observation stands in `last_observation`
    last_observation: Any  # [k, ...], or a dictionary of such
    episodes: list[Episode]  # that ended with this step
    successes: list[float]  # of these, and of ended episodes whose return nobody counts; as the env says, where it does
    infos: Sequence[dict[str, Any]]  # Stable-Baselines3's


class ArrayInfos(Sequence[dict[str, Any]]):
    """The infos of a step of the array lane, by Stable-Baselines3's names; each is made when it is asked for, and anew.

    Args:
        step: of the array lane.
        episodes: that ended with it.
        started: when the lane began, by `time.perf_counter`.
    """

    def __init__(self, step: Any, episodes: list[Episode], started: float) -> None:
        self._step, self._episodes, self._started = step, episodes, started

    def __len__(self) -> int:
        return len(self._step.reward)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        step, i = self._step, range(len(self))[index]
        info: dict[str, Any] = {"success": bool(step.success[i]), "instruction_id": int(step.instruction_id[i])}
        info["TimeLimit.truncated"] = bool(step.truncated[i])
        for episode in self._episodes:
            if episode.env == i:
                about = {"r": episode.total_reward, "l": episode.length, "t": time.perf_counter() - self._started}
                info |= {"episode": about, "is_success": bool(episode.success)}
                info["terminal_observation"] = step.observation[i].copy()
                info["terminal_instruction_id"] = info["instruction_id"]
        return info


class Lane(Protocol):
    def begin(self) -> np.ndarray:
        """Take over an env that was just reset; return its instruction ids [N]."""

    def step(self, actions: np.ndarray) -> LaneStep:
        """Step every env with actions [N, ...] inside the action space."""


class ArrayLane:
    """The lane of `lago_fast.envs`: whole arrays, no dictionaries.

    Args:
        env: the array lane of a vector env (`lago_fast.envs.vec_env.ArrayVecEnv`).
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self._total = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, dtype=np.int64)
        self._success = np.zeros(env.num_envs, dtype=bool)
        self._none = np.zeros(0, dtype=np.int64)
        self._started = time.perf_counter()

    def begin(self) -> np.ndarray:
        self._total[:], self._length[:], self._success[:] = 0, 0, False
        return self.env.instruction_id.copy()

    def step(self, actions: np.ndarray) -> LaneStep:
        return self._noted(self.env.step(actions))

    def _noted(self, step: Any) -> LaneStep:
        """Count a step of the env towards its episodes."""
        self._total += step.raw_reward
        self._length += step.valid
        self._success |= step.success & step.valid
        episodes = []
        for env in np.flatnonzero(step.terminated | step.truncated):
            episodes.append(
                Episode(int(env), float(self._total[env]), int(self._length[env]), bool(self._success[env]))
            )
            self._total[env], self._length[env], self._success[env] = 0, 0, False
        return LaneStep(
            step.observation,
            step.reward,
            step.terminated,
            step.truncated,
            step.valid,
            step.instruction_id,
            self._none,
            step.observation[:0],
            episodes,
            [bool(episode.success) for episode in episodes],
            ArrayInfos(step, episodes, self._started),
        )


class GroupedLane(ArrayLane):
    """An array lane whose env steps group by group (`lago_fast.envs.groups`)."""

    def send(self, group: int, actions: np.ndarray) -> None:
        """Start a step of a group with its actions, inside the action space."""
        self.env.send_group(group, actions)

    def recv(self, group: int) -> Any:
        """Wait for a group's step; it has `observation` and `instruction_id`."""
        return self.env.recv_group(group)

    def drop(self, group: int) -> None:
        """Wait for a group's step that nobody will learn from; of its episodes only where they stand is kept."""
        part, rows = self.env.recv_group(group), self.env.groups[group]
        going_on = ~(part.terminated | part.truncated)
        self._total[rows] = (self._total[rows] + part.raw_reward) * going_on
        self._length[rows] = (self._length[rows] + part.valid) * going_on
        self._success[rows] = (self._success[rows] | (part.success & part.valid)) & going_on

    def join(self, parts: list[Any]) -> LaneStep:
        """Return one step of every group as one of all."""
        return self._noted(self.env.join(parts))


class Sb3Lane:
    """The lane of any Stable-Baselines3 vector env.

    Args:
        env: the vector env; `instruction_id` in its infos is honoured where it exists. The id of a next episode's first
            observation is read from `reset_infos`, as Stable-Baselines3's own vector envs fill them, or from the info
            of the step itself where that has a `terminal_instruction_id` beside it.

    Raises:
        UnsupportedArgument: at a reset or a step, an `instruction_id` that is no integer.
    """

    def __init__(self, env: VecEnv) -> None:
        self.env = env
        self._instruction_id = np.zeros(env.num_envs, dtype=np.int64)

    def _read_ids(self, infos: Sequence[dict[str, Any]], done: np.ndarray) -> np.ndarray:
        """Return the ids of the returned observations; wrappers do not hand on what is known of a reset."""
        owner: Any = [layer for layer in layers(self.env) if isinstance(layer, VecEnv)][-1]
        # an adapter of a foreign vector env need not fill them, nor call the constructor that makes them
        at_resets = getattr(owner, "reset_infos", None) or []
        for i, info in enumerate(infos):
            known = info.get("instruction_id", self._instruction_id[i])
            if done[i] and "terminal_instruction_id" not in info and i < len(at_resets):
                known = at_resets[i].get("instruction_id", known)
            self._instruction_id[i] = whole_id(known, i)
        return self._instruction_id.copy()

    def begin(self) -> np.ndarray:
        nothing: list[dict[str, Any]] = [{}] * self.env.num_envs
        return self._read_ids(nothing, np.ones(self.env.num_envs, dtype=bool))

    def step(self, actions: np.ndarray) -> LaneStep:
        observation, reward, ended, infos = self.env.step(actions)
        done = np.asarray(ended, dtype=bool)
        # as in Stable-Baselines3: without its last observation, nothing is known of what would have come
        truncated = done & np.array(
            [info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None for info in infos],
            dtype=bool,
        )
        replaced = np.flatnonzero(truncated)
        episodes = [
            _episode(i, info["episode"], info.get("is_success"))
            for i, info in enumerate(infos)
            if info.get("episode") is not None
        ]
        return LaneStep(
            observation,
            reward,
            done & ~truncated,
            truncated,
            np.ones(len(done), dtype=bool),
            self._read_ids(infos, done),
            replaced,
            _stacked([infos[i]["terminal_observation"] for i in replaced]),
            episodes,
            [infos[i]["is_success"] for i in np.flatnonzero(done) if infos[i].get("is_success") is not None],
            infos,
        )


def whole_id(known: Any, i: int) -> int:
    """Return env `i`'s instruction id as its info has it; raises UnsupportedArgument for what is no integer."""
    try:
        whole = int(known)
        fits = bool(whole == known) and -(2**63) <= whole < 2**63
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UnsupportedArgument(
            f'env: info["instruction_id"] of env {i} is {known!r}; give the integer by which the env counts '
            "its instructions, and a text under another name"
        )
    return whole


def _episode(env: int, record: dict[str, Any], success: Any) -> Episode:
    """Return an episode by the record of a Monitor, or of a wrapper that writes arrays of one."""
    total_reward, length = (float(np.mean(np.asarray(record[key]))) for key in ("r", "l"))
    return Episode(env, total_reward, int(length), success, record)


def _stacked(observations: list[Any]) -> Any:
    """Return observations as one array [k, ...], or as a dictionary of such."""
    if observations and isinstance(observations[0], dict):
        return {key: np.stack([o[key] for o in observations]) for key in observations[0]}
    return np.array(observations)


def array_lane_of(env: VecEnv) -> Any | None:
    """Return the array lane of a vector env, None where it has none or a wrapper stands before it."""
    # a wrapper hands unknown attributes through, and its own work would be passed over
    return None if isinstance(env, VecEnvWrapper) else getattr(env, "array_lane", None)


def lane_of(env: VecEnv) -> Lane:
    """Return the fastest lane by which a vector env can be stepped."""
    array_lane = array_lane_of(env)
    if array_lane is not None:
        return GroupedLane(array_lane) if hasattr(array_lane, "groups") else ArrayLane(array_lane)
    next_step_lane = None if isinstance(env, VecEnvWrapper) else getattr(env, "next_step_lane", None)
    return Sb3Lane(env) if next_step_lane is None else next_step_lane


def example_of(space: spaces.Space[Any]) -> np.ndarray | dict[str, np.ndarray]:
    """Return zeros of an observation's shape and dtype, key by key for a Dict."""
    if isinstance(space, spaces.Dict):
        return {key: np.zeros(part.shape or (), part.dtype) for key, part in space.items()}
    return np.zeros(space.shape or (), space.dtype)


def bounded_actions(policy: ActorCriticPolicy, actions: np.ndarray) -> np.ndarray:
    """Return a policy's actions as the env takes them."""
    space = policy.action_space
    if not isinstance(space, spaces.Box):
        return actions
    if policy.squash_output:
        return policy.unscale_action(actions)
    # the policy is an unbounded Gaussian; the env gets its samples inside the box
    return np.clip(actions, space.low, space.high)


def episode_info(episode: Episode, start_time: float) -> dict[str, Any]:
    """Return an episode as Stable-Baselines3's Monitor reports it."""
    return episode.info or {"r": episode.total_reward, "l": episode.length, "t": time.time() - start_time}
