"""CLEVR-Robot: pushes per second of the bare physics, by either engine; and of the whole environment.

Run: pytest bench/bench_clevr_robot.py --benchmark-only
"""

import numpy as np
import pytest

from lago_fast import runs
from lago_fast.envs.clevr_physics import ClevrPhysics

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
