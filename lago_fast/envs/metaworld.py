"""Meta-World v3 by EnvPool's native C++ simulators: one pool per task, several tasks side by side.

Goals are visible (`partially_observable=False`). Semantics of EnvPool 1.2.5 that this file relies on: the
step that reaches `max_episode_steps` returns the true terminal observation; the next step of that
environment ignores its action and returns the first observation of a new episode with a reward that is no
transition's; nothing terminates on success; seeds are fixed at construction.
Source: https://github.com/sail-sg/envpool, https://github.com/Farama-Foundation/Metaworld.
Tests: tests/envs/test_metaworld.py, and test_official_metaworld.py against Meta-World's own functions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError, ResetNeeded
from gymnasium.spaces import Box

from lago_fast.cores import usable_cores
from lago_fast.envs.bare_pool import BarePool, import_envpool
from lago_fast.envs.fresh_pool import FreshPool
from lago_fast.envs.groups import GroupedArrayEnv
from lago_fast.envs.metaworld_tasks import check_settings, check_tasks, envpool_id, task_phrasings
from lago_fast.envs.state_words import describe_metaworld
from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv, ReturnNormalizer, checked_instruction_table
from lago_fast.errors import EnvironmentFailed, NonFiniteError, UnsupportedArgument, check_seed, check_whole

if TYPE_CHECKING:
    from lago_fast.envs.sb3_adapter import SB3VecEnv

STATE_DIM = 39
ACTION_DIM = 4
# their goal drifts from episode to episode of one simulator; see fresh_pool.py
USED_ONCE = ("hammer", "shelf-place")


class MetaworldArrayEnv(ArrayVecEnv):
    """Meta-World v3 tasks side by side, as numpy columns with NEXT_STEP autoreset.

    Environment i belongs to task `i // (num_envs / len(tasks))`. Each episode draws one of its task's
    instructions. Results depend on `seed` alone, not on `num_threads`.

    Args:
        tasks: short names such as "drawer-open".
        num_envs: total number of environments, divisible by the number of tasks.
        seed: from which the seed of each environment and its instructions are derived.
        max_episode_steps: an episode is truncated after so many steps.
        terminate_on_success: end an episode at its first success: as a truncation, to be bootstrapped (a
            positive dense reward would otherwise punish success), unless `success_reward` is set.
        success_reward: added to the learner's reward (not to `raw_reward`) at a success, which then is a
            true termination. Needs `terminate_on_success`.
        instruction_table: [M, Z] float32, one row per entry of `instructions`; the row of the episode's
            instruction is appended to the observation when there is more than one task.
        phrasings: "all" draws among a task's phrasings, "first" always uses the plainest.
        normalize_reward: scale `reward` by a running std of the discounted return, one per task: their dense
            rewards differ by an order of magnitude, and under a common scale the largest drowns the others.
        gamma: discount of that return.
        num_threads: threads per pool (one pool per task); default: the cores shared among the pools.
        first_env: number of the first environment in a larger vector env that this one is a part of, from whose
            seed each then takes its own.

    Raises:
        UnknownTask, UnsupportedArgument, MissingExtra: see the messages.
        NonFiniteError: from reset, send and recv, naming environment and step.
        EnvironmentFailed: from reset and recv: EnvPool left an environment out.

    Not supported: rendering, goals hidden from the observation.
    """

    action_names = ("x", "y", "z", "grip")
    describe_state = staticmethod(describe_metaworld)

    def __init__(
        self,
        tasks: Sequence[str],
        num_envs: int,
        *,
        seed: int = 0,
        max_episode_steps: int = 500,
        terminate_on_success: bool = False,
        success_reward: float = 0.0,
        instruction_table: np.ndarray | None = None,
        phrasings: Literal["all", "first"] = "all",
        normalize_reward: bool = False,
        gamma: float = 0.99,
        num_threads: int | None = None,
        first_env: int = 0,
    ) -> None:
        self.tasks = check_tasks(tasks)
        check_settings(len(self.tasks), num_envs, max_episode_steps, phrasings, num_threads)
        check_whole(0, first_env=first_env)
        if not np.isfinite(success_reward) or (success_reward != 0.0 and not terminate_on_success):
            raise UnsupportedArgument(f"success_reward={success_reward}: finite, and with terminate_on_success=True")
        self._envpool = import_envpool()

        # one contiguous block of environments and of instructions per task
        self.num_envs, per_task = num_envs, num_envs // len(self.tasks)
        self._rows = [slice(k * per_task, (k + 1) * per_task) for k in range(len(self.tasks))]
        self.task_id = np.repeat(np.arange(len(self.tasks), dtype=np.int64), per_task)
        chosen = [task_phrasings()[task][: 1 if phrasings == "first" else None] for task in self.tasks]
        self.instructions = [text for texts in chosen for text in texts]
        self._phrasing_count = np.array([len(texts) for texts in chosen])[self.task_id]
        self._phrasing_start = np.cumsum([0] + [len(texts) for texts in chosen])[self.task_id]

        table = None if instruction_table is None else checked_instruction_table(instruction_table, self.instructions)
        self._table = table if len(self.tasks) > 1 else None
        self.state_dim = STATE_DIM
        width = STATE_DIM + (0 if self._table is None else self._table.shape[1])
        self.observation_space = Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self.max_episode_steps = max_episode_steps
        self.terminate_on_success, self.success_reward = terminate_on_success, success_reward
        self.num_threads = num_threads or max(1, usable_cores() // len(self.tasks))
        self.normalizer = ReturnNormalizer(num_envs, gamma, group=self.task_id) if normalize_reward else None

        self._first_env = first_env
        self._pools: list[Any] = []
        # torn: the simulators are not where they are believed to be, as while rows are on their way from them
        self._was_reset = self._pending = self._torn = self._closed = False
        self.seed(seed)

    def seed(self, seed: int) -> list[int]:
        """Reseed from the next `reset` on, which builds the pools anew, since EnvPool fixes seeds there.

        The statistics of `normalize_reward` are kept. Returns the seed of each environment.
        """
        check_seed("seed", seed)
        for_envs, _ = np.random.SeedSequence(seed).spawn(2)
        words = for_envs.generate_state(self._first_env + self.num_envs)[self._first_env :]
        # EnvPool reads seeds as signed 32-bit integers
        self.env_seeds: list[int] = (words >> 1).astype(np.int64).tolist()
        self._seed, self._stale = seed, True
        return list(self.env_seeds)

    def _build(self) -> None:
        """Make the pools and generators that follow from the seed."""
        self._torn = True
        self._pools.clear()  # frees old simulators before new ones take memory
        _, for_instructions = np.random.SeedSequence(self._seed).spawn(2)
        sequences = for_instructions.spawn(self._first_env + self.num_envs)[self._first_env :]
        self._generators = [np.random.default_rng(s) for s in sequences]
        self._pools = [self._make_pool(task, rows) for task, rows in zip(self.tasks, self._rows, strict=True)]
        self.instruction_id = np.zeros(self.num_envs, np.int64)
        self.episode_step = np.zeros(self.num_envs, np.int64)
        self._ended = np.zeros(self.num_envs, bool)
        self._reset_by_hand = np.zeros(self.num_envs, bool)
        self._first_state = np.zeros((self.num_envs, STATE_DIM), np.float32)
        self._stale = self._pending = False

    def _make_pool(self, task: str, rows: slice) -> Any:
        """EnvPool's simulators of a task, for the environments `rows`."""

        def build(seeds: list[int]) -> BarePool:
            pool = self._envpool.make_gymnasium(
                envpool_id(task),
                num_envs=len(seeds),
                num_threads=min(self.num_threads, len(seeds)),
                env_seed=seeds,
                partially_observable=False,
                max_episode_steps=self.max_episode_steps,
            )
            return BarePool(pool)

        seeds = self.env_seeds[rows]
        return FreshPool(lambda seed: build([seed]), seeds) if task in USED_ONCE else build(seeds)

    def reset(self) -> ArrayReset:
        """Start a new episode in every environment; a step under way is waited for and dropped.

        After a call that was interrupted or failed midway it starts over from the seed, with new simulators: EnvPool
        would hand out the rows of that call first.
        """
        if self._closed:
            raise ClosedEnvironmentError("reset() after close(): make a new environment")
        if self._pending and not self._torn:
            self._receive()
            self._torn = False
        if self._stale or self._torn:
            self._build()
        self._was_reset = True
        if self.normalizer is not None:
            self.normalizer.start_episodes()
        return self._reset_rows(np.arange(self.num_envs))

    def reset_envs(self, ids: np.ndarray) -> ArrayReset:
        """Start a new episode now in the environments `ids` [n]; their next row is valid."""
        self._check_ready()
        return self._reset_rows(np.asarray(ids))

    def _reset_rows(self, ids: np.ndarray) -> ArrayReset:
        self._torn = True
        chosen = np.zeros(self.num_envs, bool)
        chosen[ids] = True
        self._start_reset(chosen)
        self._finish_reset(chosen)
        self._begin_episodes(chosen)
        self._check_finite("the simulator's observation", self._first_state)
        fresh = ArrayReset(self._observe(self._first_state)[ids], self.instruction_id[ids])
        self._torn = False
        return fresh

    def send(self, actions: np.ndarray) -> None:
        """Start one step in every environment with actions [N, 4], clipped to the box."""
        self._check_ready()
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs, ACTION_DIM):
            raise UnsupportedArgument(f"actions has shape {actions.shape}; expected {(self.num_envs, ACTION_DIM)}")
        self._check_finite("actions", actions)
        actions = np.clip(actions, -1.0, 1.0).astype(np.float32)

        # EnvPool resets a truncated environment by itself; one that ended by success it must be told to.
        by_hand = self._reset_by_hand
        self._torn = True
        if by_hand.any():
            self._send_some(actions, by_hand)
        else:
            for pool, rows in zip(self._pools, self._rows, strict=True):
                pool.send(actions[rows])
        self._pending = True  # first: between the two an interrupt must find the simulators torn
        self._torn = False

    def _send_some(self, actions: np.ndarray, by_hand: np.ndarray) -> None:
        """Start episodes in the environments `by_hand` [N] and a step in the others."""
        # a partial reset and a partial step must not be under way in one pool at once: their rows collide
        self._start_reset(by_hand)
        for pool, rows in zip(self._pools, self._rows, strict=True):
            if not by_hand[rows].any():
                pool.send(actions[rows])
        self._finish_reset(by_hand)
        for pool, rows in zip(self._pools, self._rows, strict=True):
            others = np.flatnonzero(~by_hand[rows])
            if by_hand[rows].any() and len(others):
                pool.send(actions[rows][others], others)

    def recv(self) -> ArrayStep:
        """Wait for the step that `send` started."""
        self._check_whole()
        if not self._pending:
            raise NoAsyncCallError("recv() without send(): send actions first", "step")
        state, raw_reward, terminated, truncated, success = self._receive()
        valid = ~self._ended
        if self._ended.any():
            self._begin_episodes(self._ended)
        self.episode_step += valid
        self._check_finite("the simulator's observation", state)
        self._check_finite("the simulator's reward", raw_reward[:, None])
        raw_reward[~valid] = 0.0
        success &= valid
        step = self._finish_step(state, raw_reward, terminated & valid, truncated & valid, valid, success)
        self._torn = False
        return step

    def _receive(self) -> tuple[np.ndarray, ...]:
        """Columns of the step under way as EnvPool sees it; rows reset by hand hold their first state."""
        self._torn = True
        state, arrived = self._first_state.copy(), self._reset_by_hand.copy()
        raw_reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated, success = np.zeros((3, self.num_envs), bool)
        for pool, rows in zip(self._pools, self._rows, strict=True):
            if self._reset_by_hand[rows].all():
                continue
            observation, reward, pool_terminated, pool_truncated, info = pool.recv()
            ids = rows.start + info["env_id"].astype(np.intp)  # numpy would convert at each use
            arrived[ids] = True
            state[ids] = observation
            raw_reward[ids] = reward
            terminated[ids], truncated[ids] = pool_terminated, pool_truncated
            success[ids] = info["success"] > 0.5
        self._check_arrived(arrived)
        self._pending = False
        return state, raw_reward, terminated, truncated, success

    def _finish_step(
        self,
        state: np.ndarray,
        raw_reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        valid: np.ndarray,
        success: np.ndarray,
    ) -> ArrayStep:
        """Apply the rules on success and rewards, and remember who ended."""
        reward = raw_reward.copy()
        self._reset_by_hand = np.zeros(self.num_envs, bool)
        if self.terminate_on_success:
            self._reset_by_hand = success.copy()
            if self.success_reward != 0.0:
                reward[success] += np.float32(self.success_reward)
                terminated = terminated | success
            else:
                truncated = truncated | success
        truncated = truncated & ~terminated
        self._ended = terminated | truncated
        if self.normalizer is not None:
            reward = self.normalizer(reward, valid, self._ended)
        return ArrayStep(
            self._observe(state),
            reward,
            raw_reward,
            terminated,
            truncated,
            valid,
            success,
            self.instruction_id.copy(),
        )

    def _start_reset(self, chosen: np.ndarray) -> None:
        for pool, rows in zip(self._pools, self._rows, strict=True):
            ids = np.flatnonzero(chosen[rows]).astype(np.int32)
            if len(ids):
                pool._reset(ids)  # the public reset(ids) waits, and pools would go one after the other

    def _finish_reset(self, chosen: np.ndarray) -> None:
        arrived = ~chosen
        for pool, rows in zip(self._pools, self._rows, strict=True):
            if chosen[rows].any():
                observation, info = pool.recv(reset=True)
                ids = rows.start + info["env_id"]
                arrived[ids], self._first_state[ids] = True, observation
        self._check_arrived(arrived)

    def _check_arrived(self, arrived: np.ndarray) -> None:
        if np.count_nonzero(arrived) != self.num_envs:
            raise EnvironmentFailed(f"EnvPool gave no row of environment {int(arrived.argmin())}: call reset()")

    def _begin_episodes(self, chosen: np.ndarray) -> None:
        """Draw the instructions of new episodes; one generator per environment keeps them independent."""
        for i in np.flatnonzero(chosen):
            draw = self._generators[i].integers(self._phrasing_count[i])
            self.instruction_id[i] = self._phrasing_start[i] + draw
        self.episode_step[chosen] = 0
        self._ended = self._ended & ~chosen
        self._reset_by_hand = self._reset_by_hand & ~chosen

    def _observe(self, state: np.ndarray) -> np.ndarray:
        """State rows with their instruction's row appended, or the array itself when there is no table."""
        if self._table is None:
            return state
        return np.concatenate([state, self._table[self.instruction_id]], axis=1)

    def _check_ready(self) -> None:
        if self._closed:
            raise ClosedEnvironmentError("the environment is closed: make a new one")
        if not self._was_reset:
            raise ResetNeeded("call reset() before the first step")
        self._check_whole()
        if self._pending:
            raise AlreadyPendingCallError("a step is under way: call recv() first", "step")

    def _check_whole(self) -> None:
        if self._torn:
            raise ResetNeeded("an earlier call was interrupted or failed midway, and its rows are lost: call reset()")

    def _check_finite(self, what: str, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            i = int(np.flatnonzero(~finite.all(axis=1))[0])
            raise NonFiniteError(
                f"{what}: NaN or infinity in environment {i} (task {self.tasks[self.task_id[i]]!r}, seed "
                f"{self.env_seeds[i]}) at step {int(self.episode_step[i])} of its episode: check the "
                "policy's outputs and learning rate"
            )

    def close(self) -> None:
        """Free the simulators; a second call does nothing."""
        if self._pending and not self._torn:
            self._receive()
        self._pools.clear()
        self._closed = True


def make_metaworld(tasks: Sequence[str], num_envs: int, **settings: Any) -> "SB3VecEnv":
    """Meta-World tasks as a stable-baselines3 vector environment with same-step autoreset.

    Takes the arguments of `make_metaworld_array`, whose environment is its attribute `array_lane`.
    """
    from lago_fast.envs.sb3_adapter import SB3VecEnv

    return SB3VecEnv(make_metaworld_array(tasks, num_envs, **settings))


def make_metaworld_array(tasks: Sequence[str], num_envs: int, *, groups: int = 1, **settings: Any) -> ArrayVecEnv:
    """Meta-World tasks on the array lane.

    Args:
        tasks, num_envs, settings: as of `MetaworldArrayEnv`.
        groups: with 2 or more, the environments step in so many groups, and FastKLPPO acts for one while the others
            step (double buffering); each holds an equal share of every task. Rows are the same, group by group.

    Raises:
        UnsupportedArgument: groups that do not divide the environments; and as `MetaworldArrayEnv`.
    """
    if groups == 1:
        return MetaworldArrayEnv(tasks, num_envs, **settings)
    if groups < 1 or num_envs % groups:
        raise UnsupportedArgument(f"groups={groups}: give 1 or more that divide num_envs={num_envs}")
    scaled, gamma = settings.pop("normalize_reward", False), settings.get("gamma", 0.99)
    size = num_envs // groups
    members = [MetaworldArrayEnv(tasks, size, first_env=g * size, **settings) for g in range(groups)]
    task_id = np.concatenate([member.task_id for member in members])
    return GroupedArrayEnv(members, ReturnNormalizer(num_envs, gamma, group=task_id) if scaled else None)
