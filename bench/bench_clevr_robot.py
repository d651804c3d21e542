"""CLEVR-Robot: pushes per second of the bare physics, by either engine; and of the whole environment.

Run: pytest bench/bench_clevr_robot.py --benchmark-only
"""

import time
from itertools import count

import numpy as np
import pytest

from lago_fast import runs
from lago_fast.envs.clevr_physics import ClevrPhysics
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv

DIRECTIONS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0.8, 0.8], [-0.8, 0.8], [0.8, -0.8], [-0.8, -0.8]])
SETTLING_PUSHES = 5


def reached(rows):
    """States that a random policy reaches, and the next push in each: qpos, qvel, start, ctrl."""
    rng = np.random.default_rng(0)
    physics = ClevrPhysics(rows, num_threads=1)
    grid = np.stack(np.meshgrid([-0.4, 0.0, 0.4], [-0.1, 0.3]), axis=-1).reshape(-1, 2)
    places = np.stack([rng.permutation(grid)[:5] for _ in range(rows)]) + rng.uniform(-0.04, 0.04, (rows, 5, 2))
    qpos, qvel = physics.initial_state(places)
    for _ in range(SETTLING_PUSHES + 1):
        ctrl = DIRECTIONS[rng.integers(8, size=rows)]
        start = physics.ball_xy(qpos)[np.arange(rows), rng.integers(5, size=rows)] - 0.15 * ctrl
        push = qpos, qvel, start, ctrl
        qpos, qvel, _ = physics.push(*push)
    return push


@pytest.mark.parametrize("num_envs", [1, 64, 256])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("engine", ["mujoco", "native"])
def test_bare_physics(benchmark, engine, num_threads, num_envs):
    push = reached(num_envs)
    physics = ClevrPhysics(num_envs, engine=engine, num_threads=num_threads)
    got, expected = physics.push(*push), ClevrPhysics(num_envs, engine="mujoco", num_threads=1).push(*push)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-6)
    benchmark(physics.push, *push)
    benchmark.extra_info.update(engine=engine, num_threads=num_threads, num_envs=num_envs, **runs.provenance())
    if benchmark.stats is not None:  # --benchmark-disable
        benchmark.extra_info["pushes_per_s"] = num_envs / benchmark.stats.stats.median


@pytest.mark.parametrize("num_envs", [1, 8, 64, 256])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("engine", ["mujoco", "native"])
def test_whole_environment(benchmark, engine, num_threads, num_envs):
    """A random policy on relation goals: goals, judges, rewards and resets beside the pushes that they wait for."""
    env = ClevrRobotArrayEnv(["real"], num_envs, num_threads=num_threads, engine=engine, seed=0)
    actions = np.random.default_rng(0).integers(40, size=(997, num_envs))  # drawn beforehand, and used in turn
    turn = count()
    env.physics = watch = Watch(env.physics)
    env.reset()
    for _ in range(60):  # past the first ends, so that resets are spread over the steps
        env.step(actions[next(turn) % len(actions)])
    watch.seconds, seconds, steps = 0.0, 0.0, 0

    def step():
        nonlocal seconds, steps
        start = time.perf_counter()
        row = env.step(actions[next(turn) % len(actions)])
        seconds += time.perf_counter() - start
        steps += int(row.valid.sum())

    benchmark(step)
    env.close()
    benchmark.extra_info.update(engine=engine, num_threads=num_threads, num_envs=num_envs, **runs.provenance())
    benchmark.extra_info.update(env_steps_per_s=steps / seconds, share_of_push=watch.seconds / seconds)


class Watch:
    """The physics, with a watch on its pushes."""

    def __init__(self, physics):
        self.physics, self.seconds = physics, 0.0

    def __getattr__(self, name):
        return getattr(self.physics, name)

    def push(self, *args):
        start = time.perf_counter()
        after = self.physics.push(*args)
        self.seconds += time.perf_counter() - start
        return after
