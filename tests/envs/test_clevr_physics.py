"""The physics of CLEVR-Robot against 600 pushes that were recorded from the published scene under MuJoCo 3.3.0.

The recording is `shared/data/clevr_robot_pushes.npz` beside the repository. Its arrays, N = 600: `qpos_before` [N, 37]
and `qvel_before` [N, 32]; `action` [N] = 8 * ball + direction; `qpos_after`, `qvel_after`; `ball_xy_before` and
`ball_xy_after` [N, 5, 2]; `mujoco_version`. A push places the agent 0.15 directions before the ball.
"""

from pathlib import Path

import numpy as np
import pytest

from lago_fast.envs.clevr_physics import BALLS, ClevrPhysics
from lago_fast.errors import UnsupportedArgument

DIRECTIONS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0.8, 0.8], [-0.8, 0.8], [0.8, -0.8], [-0.8, -0.8]])
TOLERANCE_M = 1e-6


@pytest.fixture(scope="module")
def recorded():
    """The recorded pushes, and the agent's start and force of each."""
    places = [p / "shared" / "data" / "clevr_robot_pushes.npz" for p in Path(__file__).resolve().parents]
    found = [place for place in places if place.is_file()]
    if not found:
        pytest.skip("the recorded pushes are not there: shared/data/clevr_robot_pushes.npz above the repository")
    with np.load(found[0]) as arrays:
        pushes = dict(arrays)
    ball, direction = np.divmod(pushes["action"], len(DIRECTIONS))
    pushes["ctrl"] = DIRECTIONS[direction]
    pushes["start"] = pushes["ball_xy_before"][np.arange(len(ball)), ball] - 0.15 * pushes["ctrl"]
    return pushes


def test_every_recorded_push_is_met(recorded):
    physics = ClevrPhysics(64, engine="mujoco", num_threads=2)
    assert str(recorded["mujoco_version"]) == "3.3.0"
    qpos, qvel, diverged = physics.push(
        recorded["qpos_before"], recorded["qvel_before"], recorded["start"], recorded["ctrl"]
    )
    assert not diverged.any()
    np.testing.assert_allclose(physics.ball_xy(qpos), recorded["ball_xy_after"], rtol=0, atol=TOLERANCE_M)
    np.testing.assert_allclose(qpos, recorded["qpos_after"], rtol=0, atol=TOLERANCE_M)
    np.testing.assert_allclose(qvel, recorded["qvel_after"], rtol=0, atol=1e-5)


def test_a_scene_starts_at_the_places_given():
    physics = ClevrPhysics(1)
    places = np.random.default_rng(0).uniform(-0.4, 0.4, (3, len(BALLS), 2))
    qpos, qvel = physics.initial_state(places)
    np.testing.assert_array_equal(physics.ball_xy(qpos), places)
    np.testing.assert_array_equal(qpos[0, :7], [*places[0, 0], -0.195, 1, 0, 0, 0])
    assert qpos.shape == (3, 37)
    assert qvel.shape == (3, 32)
    assert not qvel.any()
    model = physics.model()
    assert [model.body(i).name for i in range(1, model.nbody)] == [*BALLS, "agent"]


def test_bad_input_is_refused_by_name():
    physics = ClevrPhysics(1)
    qpos, qvel = physics.initial_state(np.zeros((2, 5, 2)))
    start, ctrl = np.ones((2, 2)), np.zeros((2, 2))
    for bad, name in [
        ((qpos[:, :36], qvel, start, ctrl), "qpos"),
        ((qpos, qvel[0], start, ctrl), "qvel"),
        ((qpos, qvel, start[:1], ctrl), "rows differ"),
        ((qpos, qvel, start * [1, np.nan], ctrl), "start"),
        ((qpos, qvel, start * 2.5, ctrl), "start"),
        ((qpos, qvel, start, ctrl + np.inf), "ctrl"),
        ((qpos, qvel, start, ctrl, 0), "substeps"),
        ((qpos, qvel, start, ctrl, [40, 40, 40]), "substeps"),
        ((qpos, qvel, start, ctrl, 1.5), "substeps"),
    ]:
        with pytest.raises(UnsupportedArgument, match=name):
            physics.push(*bad)
    with pytest.raises(UnsupportedArgument, match="ball_xy"):
        physics.initial_state(np.zeros((5, 2)))
    for settings in ({"num_envs": 0}, {"num_envs": 1, "num_threads": 0}, {"num_envs": 1, "engine": "bullet"}):
        with pytest.raises(UnsupportedArgument, match=list(settings)[-1]):
            ClevrPhysics(**settings)
