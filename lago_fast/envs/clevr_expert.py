"""A scripted expert for CLEVR-Robot: it tries every push in the simulator and takes the best.

It sees the whole state of the physics, velocities included, and the goal itself instead of the instruction; no
policy does. Tests: tests/envs/test_clevr_expert.py.
"""

from collections.abc import Callable
from itertools import product

import numpy as np

from lago_fast.envs.clevr_actions import PUSHES, drive
from lago_fast.envs.clevr_goals import NUM_BALLS, Goals
from lago_fast.envs.clevr_judges import GATHER_DISTANCE_M, PUSHES_TOWARDS, offsets, satisfied
from lago_fast.envs.clevr_rewards import BESIDE_M
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv
from lago_fast.errors import UnsupportedArgument

NUM_PUSHES = NUM_BALLS * len(PUSHES)

# Five touching balls are wider than the table: a line that fits zigzags, or climbs, at little less than 30 degrees.
# So each ball has its place along x, and each of the sixteen ways up and down gives the places along y.
_LINE_X_M = np.linspace(-0.4667, 0.4667, NUM_BALLS)
_LINE_STEP_M = 0.127
_LINE_Y_M = _LINE_STEP_M * np.array(
    [np.cumsum([0, *signs]) for signs in product((1, -1), repeat=NUM_BALLS - 1)]
)  # [16, 5], up to a shift
_REACH_Y_M = (-0.165, 0.565)  # of centres, between the walls


def make_clevr_expert(env: ClevrRobotArrayEnv) -> Callable[[], np.ndarray]:
    """The expert of an environment: without arguments, the actions [N] int64 for the state that it is in now.

    Every call simulates 40 pushes per environment. Squares of distances are what it makes small: of the ways to
    be a metre away in all, it prefers that in which no ball is far off, and is stopped by far fewer deadlocks.

    Raises:
        UnsupportedArgument: the environment's `action_type` is not "perfect", or its `easy_judge` not "action".
    """
    if env.action_type != "perfect":
        raise UnsupportedArgument(f"action_type={env.action_type!r}: the expert knows 'perfect' only")
    if env.easy_judge != "action":
        raise UnsupportedArgument(f"easy_judge={env.easy_judge!r}: the expert knows 'action' only")

    def act() -> np.ndarray:
        actions = np.zeros(env.num_envs, np.int64)
        (qpos, qvel), ended = env.physics_state, env.ended
        for family in env.families:
            rows = np.arange(family.rows.start, family.rows.stop)
            rows = rows[~ended[rows]]
            goals = family.now.take(rows - family.rows.start)
            if family.name == "easy":
                towards = PUSHES_TOWARDS[goals.direction[:, 0]].argmax(axis=1)
                actions[rows] = len(PUSHES) * goals.source[:, 0] + towards
            elif len(rows):
                actions[rows] = _best_push(env, goals, qpos[rows], qvel[rows])
        return actions

    return act


def _best_push(env: ClevrRobotArrayEnv, goals: Goals, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """The push [n] after which a state [n, 37], [n, 32] is nearest to its goal."""
    every = np.repeat(np.arange(len(qpos)), NUM_PUSHES)
    qpos, qvel, goals = qpos[every], qvel[every], goals.take(every)
    pushes = np.arange(len(every)) % NUM_PUSHES
    moves = drive("perfect", pushes, env.physics.ball_xy(qpos))
    after, _, diverged = env.physics.push(qpos, qvel, moves.start, moves.ctrl, moves.substeps)
    ball_xy = env.physics.ball_xy(after)
    cost = squared_distance(goals, ball_xy)
    cost[satisfied(goals, ball_xy, env.judge).all(axis=1)] = -1.0
    cost[diverged] = np.inf
    return cost.reshape(-1, NUM_PUSHES).argmin(axis=1)


def squared_distance(goals: Goals, ball_xy: np.ndarray) -> np.ndarray:
    """[n] square metres, a sum over sub-goals or balls, from `ball_xy` [n, 5, 2] to where `goals` hold safely."""
    if goals.kind == "line":
        return _from_line(ball_xy)
    along, across = offsets(goals, ball_xy)
    if goals.kind == "gather":
        short = np.maximum(np.hypot(along, across) - GATHER_DISTANCE_M, 0.0)
    else:
        short = np.hypot(along - BESIDE_M, across)
    return (short * short).sum(axis=1)


def _from_line(ball_xy: np.ndarray) -> np.ndarray:
    """The sum over balls to the nearest of the sixteen lines, each shifted along y to fit best."""
    y = ball_xy[:, None, :, 1] - _LINE_Y_M  # [n, 16, 5]
    low, high = _REACH_Y_M[0] - _LINE_Y_M.min(axis=1), _REACH_Y_M[1] - _LINE_Y_M.max(axis=1)
    y = y - np.clip(y.mean(axis=2), low, high)[..., None]
    x = ball_xy[:, :, 0] - _LINE_X_M
    return (x * x).sum(axis=1) + (y * y).sum(axis=2).min(axis=1)
