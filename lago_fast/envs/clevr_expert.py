"""A scripted expert for CLEVR-Robot that looks ahead with the simulator itself.

It sees the full state of the physics, velocities included, which no policy does. Tests: tests/envs/test_clevr_expert.py.
"""

from collections.abc import Callable

import numpy as np

from lago_fast.envs.clevr_actions import PUSHES, drive
from lago_fast.envs.clevr_episodes import Family
from lago_fast.envs.clevr_goals import NUM_BALLS, Goals
from lago_fast.envs.clevr_judges import satisfied
from lago_fast.envs.clevr_rewards import remaining
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv
from lago_fast.errors import UnsupportedArgument

NUM_PUSHES = NUM_BALLS * len(PUSHES)


def make_clevr_expert(env: ClevrRobotArrayEnv, beam: int = 0) -> Callable[[], np.ndarray]:
    """The expert of an environment: a function without arguments that gives the actions [N] int64 for its state now.
    """
    if env.action_type != "perfect":
        raise UnsupportedArgument(f"action_type={env.action_type!r}: the expert knows 'perfect' only")

    def act() -> np.ndarray:
        actions = np.zeros(env.num_envs, np.int64)
        qpos, qvel = env.physics_state
        for family in env.families:
            rows = np.arange(family.rows.start, family.rows.stop)
            rows = rows[~env.ended[rows]]
            if len(rows):
                actions[rows] = _best(env, family, rows, qpos[rows], qvel[rows], beam)
        return actions

    return act


def _best(env, family, rows, qpos, qvel, beam):
    goals = _rows_of(family, rows)
    value, q, v = _ahead(env, goals, qpos, qvel)
    if not beam:
        return value.argmin(axis=1)
    first = np.argsort(value, axis=1)[:, :beam]
    n = np.arange(len(rows))[:, None]
    g2 = Goals(goals.kind, *(np.repeat(c, beam, axis=0) for c in goals[1:]))
    second, _, _ = _ahead(env, g2, q[n, first].reshape(-1, q.shape[-1]), v[n, first].reshape(-1, v.shape[-1]))
    v1 = value[n, first]
    total = np.minimum(second.min(axis=1).reshape(-1, beam) + 0.01, v1)
    total = np.where(v1 < -50, v1, total) + 1e-3 * v1
    return first[np.arange(len(rows)), total.argmin(axis=1)]


def _ahead(env, goals, qpos, qvel):
    n = len(qpos)
    q, v = np.repeat(qpos, NUM_PUSHES, axis=0), np.repeat(qvel, NUM_PUSHES, axis=0)
    moves = drive("perfect", np.tile(np.arange(NUM_PUSHES), n), env.physics.ball_xy(q))
    q, v, bad = env.physics.push(q, v, moves.start, moves.ctrl, moves.substeps)
    g = Goals(goals.kind, *(np.repeat(c, NUM_PUSHES, axis=0) for c in goals[1:]))
    value = _value(g, env.physics.ball_xy(q), env.judge)
    value[bad] = np.inf
    return value.reshape(n, -1), q.reshape(n, NUM_PUSHES, -1), v.reshape(n, NUM_PUSHES, -1)


def _value(goals, xy, judge):
    met = satisfied(goals, xy, judge)
    return remaining(goals, xy) - 0.1 * met.sum(1) - 100.0 * met.all(1)


def _rows_of(family: Family, rows: np.ndarray) -> Goals:
    return family.now.take(rows - family.rows.start)
