"""CLEVR-Robot as numpy columns: five balls, an agent that pushes them, and a goal in words.

The physics is `clevr_physics`; goals, wordings, judges and rewards have files of their own. The splits, the reward
and the averages of LaGO's authors are not known: what is here follows KALM and ImagineBench, on whose wrapper of
https://github.com/google-research/clevr_robot_env their task is built. Tests: tests/envs/test_clevr_robot.py.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError, ResetNeeded

from lago_fast.envs.clevr_actions import PUSH_NAMES, PUSHES, Drive, action_space, check_actions, drive
from lago_fast.envs.clevr_drawing import Painter
from lago_fast.envs.clevr_episodes import Episodes, Family, families_of
from lago_fast.envs.clevr_goals import check_families, nearest, split_families
from lago_fast.envs.clevr_judges import EASY_JUDGES, JUDGES, easy_by_action, easy_by_shift, offsets, satisfied_at
from lago_fast.envs.clevr_observations import OBSERVATIONS, Observer
from lago_fast.envs.clevr_physics import ClevrPhysics
from lago_fast.envs.clevr_rewards import REWARDS, SINGLE_RELATION, Moved, careless
from lago_fast.envs.clevr_scenes import GAP_M
from lago_fast.envs.state_words import describe_clevr
from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv, ReturnNormalizer, checked_instruction_table
from lago_fast.errors import NonFiniteError, UnsupportedArgument, check_seed, check_whole

if TYPE_CHECKING:
    from lago_fast.envs.sb3_adapter import SB3VecEnv

MAX_EPISODE_STEPS = 50
QUIRKS = ("stale-first-push", "lagged-reward")
_ALL = slice(None)
_log = logging.getLogger(__name__)


class ClevrRobotArrayEnv(ArrayVecEnv):
    """Families of CLEVR-Robot side by side, as numpy columns with NEXT_STEP autoreset.

    Environment i belongs to family `i // (num_envs / len(families))`. Each episode draws a scene, a goal of the
    family that does not hold in it, and one of the goal's wordings. The instruction carries the goal, also with one
    family: a policy that is not given the `instruction_table` cannot know what to do. Velocities are carried from
    push to push. Row i depends on `seed`, i and its own actions alone. `diverged` [N] counts the episodes of each
    environment that ended, as truncations with the last good state, because their simulation went astray.

    Args:
        families: of "real", "rephrase", "easy", "two-goals", "three-goals", "line", "gather".
        num_envs: total number of environments, divisible by the number of families.
        seed: from which the seed of each environment is derived.
        action_type: "perfect" (40 pushes of a ball), "discrete" (800) or "continuous" (4 numbers, clipped to
            [-1, 1.1]); see `clevr_actions`.
        observation: "positions" of the balls (10), "positions_velocities" (20), "order_invariant" (5 rows of 15: x,
            y, one-hot size, colour, material and shape) or "image" (64 rows of 64 pixels of 3, from above).
        max_episode_steps: an episode is truncated after so many steps; one of "easy" always ends with its first.
        reward: "progress" (10 per metre gained and 10 at success: meant for learning), "sparse", "kalm",
            "kalm-careful", "imagine", "clevr", "clevr-movement" or "clevr-quiet"; see `clevr_rewards`.
        judge: of relations: "kalm" (sector and distance), "clevr" or "clevr-polar"; see `clevr_judges`.
        easy_judge: "action" (the push is the right one) or "shift" (a ball moved the right way).
        terminate_on_success: end an episode at its first success, as a termination.
        instruction_table: [M, Z] float32, one row per entry of `instructions`; the row of the episode's
            instruction is appended to the observation.
        phrasings: "all" draws among a goal's wordings, "first" always uses the plainest.
        normalize_reward: scale `reward` by a running std of the discounted return, one per family.
        gamma: discount of that return.
        num_threads: of the physics; default: all cores.
        engine: of the physics: see `ClevrPhysics`.
        solved_start: let an episode start with its goal reached; the original draws only goals that are not.
        ball_gap: least distance between two balls at the start, metres.
        renderer: of images: "gl" (MuJoCo), "drawing" (ours, in numpy), or "auto": "gl" where it works, else
            "drawing", which is logged.
        quirks: errors of the published evaluation to repeat. "stale-first-push": the first push of an episode aims
            at where the balls of another scene lay. "lagged-reward": the hard families' reward of "imagine" is paid
            one step late, and for the last step never.

    Raises:
        UnknownTask, UnsupportedArgument, NonFiniteError, SceneUnsampled, DeviceUnavailable, MissingExtra: see the
        messages.
    """

    def __init__(
        self,
        families: Sequence[str],
        num_envs: int,
        *,
        seed: int = 0,
        action_type: Literal["perfect", "discrete", "continuous"] = "perfect",
        observation: Literal["positions", "positions_velocities", "order_invariant", "image"] = "positions",
        max_episode_steps: int = MAX_EPISODE_STEPS,
        reward: str = "progress",
        judge: Literal["kalm", "clevr", "clevr-polar"] = "kalm",
        easy_judge: Literal["action", "shift"] = "action",
        terminate_on_success: bool = True,
        instruction_table: np.ndarray | None = None,
        phrasings: Literal["all", "first"] = "all",
        normalize_reward: bool = False,
        gamma: float = 0.99,
        num_threads: int | None = None,
        engine: Literal["native", "mujoco"] = "native",
        solved_start: bool = False,
        ball_gap: float = GAP_M,
        renderer: Literal["auto", "gl", "drawing"] = "auto",
        quirks: Sequence[str] = (),
    ) -> None:
        self.tasks = check_families(families)
        _check_counts(len(self.tasks), num_envs, max_episode_steps)
        for name, value, known in (
            ("observation", observation, OBSERVATIONS),
            ("reward", reward, tuple(REWARDS)),
            ("judge", judge, tuple(JUDGES)),
            ("easy_judge", easy_judge, EASY_JUDGES),
            ("phrasings", phrasings, ("all", "first")),
            *(("quirks", quirk, QUIRKS) for quirk in quirks),
        ):
            _check_name(name, value, known)
        if not np.isfinite(ball_gap):
            raise UnsupportedArgument(f"ball_gap={ball_gap}: give metres")
        self.action_space = action_space(action_type)
        _check_together(self.tasks, action_type, easy_judge, reward, quirks)

        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.action_type, self.judge, self.easy_judge = action_type, judge, easy_judge
        self.terminate_on_success, self.quirks = terminate_on_success, tuple(quirks)
        self.families, self.instructions = families_of(self.tasks, num_envs, phrasings)
        self.task_id = np.repeat(np.arange(len(self.tasks), dtype=np.int64), num_envs // len(self.tasks))
        self._easy = (np.array(self.tasks) == "easy")[self.task_id]
        self._horizon = np.where(self._easy, 1, max_episode_steps)
        self.reward_name, self._reward = reward, REWARDS[reward]
        self.normalizer = ReturnNormalizer(num_envs, gamma, group=self.task_id) if normalize_reward else None

        self.physics = ClevrPhysics(num_envs, engine, num_threads)
        self._painter = Painter(renderer)
        table = None if instruction_table is None else checked_instruction_table(instruction_table, self.instructions)
        self._observer = Observer(observation, self._painter, table)
        self.state_dim, self.observation_space = self._observer.state_dim, self._observer.space
        self.action_names = PUSH_NAMES if action_type == "perfect" else ()
        if observation.startswith("positions"):
            self.describe_state = describe_clevr  # type: ignore[method-assign]
        self._gap, self._solved_start = ball_gap, solved_start
        self._qpos, self._qvel = self.physics.initial_state(np.zeros((num_envs, 5, 2)))
        self._ball_xy, self._stale_xy = np.zeros((2, num_envs, 5, 2))
        self.instruction_id, self.episode_step, self.diverged = np.zeros((3, num_envs), np.int64)
        self._ended = np.zeros(num_envs, bool)
        self._actions: np.ndarray | None = None
        self._was_reset = self._closed = False
        self.seed(seed)

    def seed(self, seed: int) -> list[int]:
        """Reseed from the next `reset` on; the statistics of `normalize_reward` are kept.

        Returns the seed of each environment; that of environment i does not depend on how many there are. Raises
        UnsupportedArgument for a seed that is negative.
        """
        check_seed("seed", seed)
        keys = np.random.SeedSequence(seed).generate_state(self.num_envs, np.uint64)
        self.env_seeds: list[int] = keys.tolist()
        self._reseeded: Episodes | None = Episodes(self.families, keys, self._gap, self.judge, self._solved_start)
        return list(self.env_seeds)

    @property
    def physics_state(self) -> tuple[np.ndarray, np.ndarray]:
        """qpos [N, 37] and qvel [N, 32] as they are now: copies, as `ClevrPhysics` takes them."""
        return self._qpos.copy(), self._qvel.copy()

    @property
    def ended(self) -> np.ndarray:
        """[N] bool, the environments whose next row starts an episode: a copy."""
        return self._ended.copy()

    @property
    def ball_xy(self) -> np.ndarray:
        """[N, 5, 2] metres, the balls' centres as they are now: a copy."""
        return self._ball_xy.copy()

    def set_state(self, ids: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Put the environments `ids` [n], amid their episodes, into states qpos [n, 37], qvel [n, 32].

        Returns their observations [n, O].

        Raises:
            NonFiniteError: a state that holds NaN or infinity.
            UnsupportedArgument: a shape that does not fit.
        """
        self._check_ready()
        ids = np.asarray(ids)
        for name, rows, own in (("qpos", qpos, self._qpos), ("qvel", qvel, self._qvel)):
            if np.shape(rows) != (len(ids), own.shape[1]):
                raise UnsupportedArgument(f"{name} has shape {np.shape(rows)}; expected {(len(ids), own.shape[1])}")
            bad = ~np.isfinite(rows).all(axis=1)
            if bad.any():
                raise NonFiniteError(f"{name}: NaN or infinity for environment {ids[bad.argmax()]}; give a full state")
        self._qpos[ids], self._qvel[ids] = qpos, qvel
        self._ball_xy[ids] = self.physics.ball_xy(self._qpos[ids])
        self._judge_starts(ids)
        return self._observe()[ids]

    def reset(self) -> ArrayReset:
        """Start a new episode in every environment; a step under way is dropped."""
        if self._closed:
            raise ClosedEnvironmentError("reset() after close(): make a new environment")
        self._actions, self._was_reset = None, True
        if self._reseeded is not None:
            self._episodes, self._reseeded = self._reseeded, None
        if self.normalizer is not None:
            self.normalizer.start_episodes()
        return self.reset_envs(np.arange(self.num_envs))

    def reset_envs(self, ids: np.ndarray) -> ArrayReset:
        """Start a new episode now in the environments `ids` [n]; their next row is valid."""
        self._check_ready()
        ids = np.asarray(ids)
        self._begin_episodes(ids)
        return ArrayReset(self._observe(ids), self.instruction_id[ids])

    def send(self, actions: np.ndarray) -> None:
        """Take the actions of one step: [N] integers, or [N, 4], clipped to the box, for "continuous"."""
        self._check_ready()
        self._actions = check_actions(self.action_space, actions, self.num_envs)

    def recv(self) -> ArrayStep:
        """Simulate the step that `send` started."""
        if self._actions is None:
            raise NoAsyncCallError("recv() without send(): send actions first", "step")
        actions, self._actions = self._actions, None
        valid, before = ~self._ended, self._ball_xy
        diverged = self._push(actions, valid)
        self._begin_episodes(np.flatnonzero(self._ended))
        self.episode_step += valid
        return self._judge_step(actions, before, valid, diverged)

    def _push(self, actions: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Simulate the valid rows; returns [N] bool which of them diverged, which stay as they were."""
        rows = slice(None) if valid.all() else np.flatnonzero(valid)
        qpos, qvel, moves = self._qpos[rows], self._qvel[rows], self._aim(actions[rows], rows)
        new_qpos, new_qvel, lost = self.physics.push(qpos, qvel, moves.start, moves.ctrl, moves.substeps)
        diverged = np.zeros(self.num_envs, bool)
        diverged[rows] = lost
        if lost.any():
            self.diverged += diverged
            _log.warning("diverged: the simulations of environments %s; their episodes end", np.flatnonzero(diverged))
        if valid.all():
            self._qpos, self._qvel = new_qpos, new_qvel
        else:
            self._qpos[rows], self._qvel[rows] = new_qpos, new_qvel
        self._ball_xy = self.physics.ball_xy(self._qpos)
        return diverged

    def _aim(self, actions: np.ndarray, rows: slice | np.ndarray) -> Drive:
        ball_xy = self._ball_xy[rows]
        if "stale-first-push" in self.quirks:
            first = self.episode_step[rows] == 0
            ball_xy = np.where(first[:, None, None], self._stale_xy[rows], ball_xy)
        return drive(self.action_type, actions, ball_xy)

    def _judge_step(
        self, actions: np.ndarray, before: np.ndarray, valid: np.ndarray, diverged: np.ndarray
    ) -> ArrayStep:
        """Success, rewards and ends of a step that has been simulated; remembers who ended."""
        counted = valid & ~diverged
        success, stopped = np.zeros((2, self.num_envs), bool)
        raw_reward = np.zeros(self.num_envs)
        for family in self.families:
            rows = family.rows
            moved = self._judge_family(family, actions[rows], before[rows], counted[rows])
            success[rows], raw_reward[rows] = moved.success, self._reward(moved)
            if self.reward_name == "kalm-careful":
                stopped[rows] = careless(moved)
        raw_reward[~counted] = 0.0

        terminated = counted & (stopped | self._easy)
        if self.terminate_on_success:
            terminated |= success
        truncated = valid & ((self.episode_step >= self._horizon) | diverged) & ~terminated
        self._ended = terminated | truncated
        raw = raw_reward.astype(np.float32)
        reward = raw.copy() if self.normalizer is None else self.normalizer(raw, valid, self._ended)
        return ArrayStep(
            self._observe(), reward, raw, terminated, truncated, valid, success, self.instruction_id.copy()
        )

    def _judge_family(self, family: Family, actions: np.ndarray, before: np.ndarray, counted: np.ndarray) -> Moved:
        """What a step did in the environments of one family."""
        after = self._ball_xy[family.rows]
        offsets_before, family.offsets = family.offsets, offsets(family.now, after)
        met = satisfied_at(family.goals.kind, *family.offsets, self.judge)
        if family.name != "easy":
            success = met.all(axis=1)
        elif self.easy_judge == "shift":
            success = easy_by_shift(family.now, before, after)
        else:
            success = easy_by_action(family.now, *np.divmod(actions, len(PUSHES)))
        change = met.sum(axis=1) - family.met.sum(axis=1)
        paid = family.change_before if "lagged-reward" in self.quirks else change
        family.met, family.change_before = met, change
        return Moved(family.now, before, after, offsets_before, family.offsets, success & counted, paid)

    def _begin_episodes(self, ids: np.ndarray) -> None:
        """Start the next episodes of the environments `ids` [m]."""
        if not len(ids):
            return
        scene, goal, self.instruction_id[ids] = self._episodes.take(ids)
        self._qpos[ids], self._qvel[ids] = self.physics.initial_state(scene)
        self._ball_xy[ids] = scene
        self.episode_step[ids] = 0
        self._ended[ids] = False
        if "stale-first-push" in self.quirks:
            self._stale_xy[ids] = self._episodes.stale_scenes(ids)
        for family in self.families:
            mine = (ids >= family.rows.start) & (ids < family.rows.stop)
            family.assign(ids[mine] - family.rows.start, goal[mine])
        self._judge_starts(ids)

    def _judge_starts(self, ids: np.ndarray) -> None:
        """See what holds in the environments `ids` [m], which were put where they are."""
        for family in self.families:
            local = ids[(ids >= family.rows.start) & (ids < family.rows.stop)] - family.rows.start
            along, across = offsets(family.now.take(local), self._ball_xy[family.rows.start + local])
            family.offsets[0][local], family.offsets[1][local] = along, across
            family.met[local] = satisfied_at(family.goals.kind, along, across, self.judge)
            family.change_before[local] = 0

    def _observe(self, rows: np.ndarray | slice = _ALL) -> np.ndarray:
        return self._observer(self._ball_xy[rows], self._qvel[rows], self.instruction_id[rows])

    def render(self, rows: np.ndarray | None = None, size: int = 256) -> np.ndarray:
        """Images [n, size, size, 3] uint8 of the environments `rows` [n], default all, from above."""
        return self._painter(self._ball_xy if rows is None else self._ball_xy[rows], size)

    def _check_ready(self) -> None:
        if self._closed:
            raise ClosedEnvironmentError("the environment is closed: make a new one")
        if not self._was_reset:
            raise ResetNeeded("call reset() before the first step")
        if self._actions is not None:
            raise AlreadyPendingCallError("a step is under way: call recv() first", "step")

    def close(self) -> None:
        """Free the renderer; a second call does nothing."""
        self._painter.close()
        self._actions, self._closed = None, True


def make_clevr_robot(num_envs: int, split: str | Sequence[str] = "real", **settings: Any) -> "SB3VecEnv":
    """CLEVR-Robot as a stable-baselines3 vector environment with same-step autoreset.

    Args:
        num_envs: total number of environments.
        split: "real", "rephrase", "easy", "hard" (its four families), or a list of families.
        settings: the keywords of `ClevrRobotArrayEnv`, which is the attribute `array_lane`.

    Raises:
        UnknownTask: no such split or family, with the nearest names.
    """
    from lago_fast.envs.sb3_adapter import SB3VecEnv

    return SB3VecEnv(ClevrRobotArrayEnv(split_families(split), num_envs, **settings))


def _check_counts(num_families: int, num_envs: int, max_episode_steps: int) -> None:
    check_whole(1, num_envs=num_envs, max_episode_steps=max_episode_steps)
    if num_envs % num_families:
        raise UnsupportedArgument(
            f"num_envs={num_envs} is no multiple of the {num_families} families: give {num_families} or a multiple"
        )


def _check_name(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnsupportedArgument(f"{argument}={value!r} is unknown; {nearest(value, known)}")


def _check_together(families: list[str], action_type: str, easy_judge: str, reward: str, quirks: Sequence[str]) -> None:
    """Refuse what has no meaning together."""
    if "easy" in families and easy_judge == "action" and action_type != "perfect":
        raise UnsupportedArgument(
            f"action_type={action_type!r}: 'easy' asks which ball is pushed, which only 'perfect' says; "
            "give easy_judge='shift'"
        )
    others = [family for family in families if family not in ("real", "rephrase")]
    if reward in SINGLE_RELATION and others:
        raise UnsupportedArgument(
            f"reward={reward!r} is defined for one relation only, not for {others[0]!r}; give 'progress', 'sparse' "
            "or 'imagine'"
        )
    if "stale-first-push" in quirks and action_type != "perfect":
        raise UnsupportedArgument("quirks: 'stale-first-push' needs action_type='perfect', which aims at a ball")
    if "lagged-reward" in quirks and (reward != "imagine" or set(others) <= {"easy"}):
        raise UnsupportedArgument("quirks: 'lagged-reward' is of reward='imagine' in the hard families only")
