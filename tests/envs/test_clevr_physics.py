"""The physics of CLEVR-Robot against recorded pushes, and the native engine against MuJoCo on random ones.

The recording is `shared/data/clevr_robot_pushes.npz` above the repository: 600 pushes of the published scene under
MuJoCo 3.3.0. Its arrays, N = 600: `qpos_before` [N, 37], `qvel_before` [N, 32], `action` [N] = 8 * ball + direction,
`qpos_after`, `qvel_after`, `ball_xy_before` and `ball_xy_after` [N, 5, 2], `mujoco_version`. A push places the agent
0.15 directions before the ball.
"""

import threading
from pathlib import Path

import mujoco
import numpy as np
import pytest

from lago_fast import _C
from lago_fast.envs.clevr_physics import BALLS, ClevrPhysics
from lago_fast.errors import UnsupportedArgument

DIRECTIONS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0.8, 0.8], [-0.8, 0.8], [0.8, -0.8], [-0.8, -0.8]])
TOLERANCE_M = 1e-6
ENGINES = ["native", "mujoco"]


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


def random_scenes(rng, count):
    """Places of balls that are apart, every second scene a cluster, many of them into the walls."""
    places = np.empty((count, len(BALLS), 2))
    for n in range(count):
        apart = 0.36 if n % 2 else 0.2
        low, high = ([-0.5, -0.3], [0.5, 0.5]) if n % 2 else ([-0.3, -0.2], [0.3, 0.3])
        while True:
            places[n] = rng.uniform(low, high, places[n].shape)
            gaps = np.linalg.norm(places[n][:, None] - places[n], axis=-1)[np.triu_indices(len(BALLS), 1)]
            if gaps.min() >= apart:
                break
    return places


def random_push(rng, ball_xy, kind):
    """The agent's start, its force and the substeps of one push in each scene, of a kind of action."""
    rows = len(ball_xy)
    if kind == "ball":
        ctrl = DIRECTIONS[rng.integers(8, size=rows)]
        start = ball_xy[np.arange(rows), rng.integers(len(BALLS), size=rows)] - 0.15 * ctrl
        return start, ctrl, np.full(rows, 40)
    if kind == "grid":
        ctrl = 1.1 * DIRECTIONS[rng.integers(8, size=rows)]
        return [-0.7, -0.35] + [0.14, 0.12] * rng.integers(10, size=(rows, 2)), ctrl, np.full(rows, 40)
    angle = rng.uniform(-np.pi, 1.1 * np.pi, rows)
    ctrl = 1.2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return rng.uniform(-0.7, 0.77, (rows, 2)), ctrl, rng.integers(1, 127, size=rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_recorded_push_is_met(recorded, engine):
    physics = ClevrPhysics(64, engine=engine, num_threads=2)
    assert str(recorded["mujoco_version"]) == mujoco.__version__ == "3.3.0"
    qpos, qvel, diverged = physics.push(
        recorded["qpos_before"], recorded["qvel_before"], recorded["start"], recorded["ctrl"]
    )
    assert not diverged.any()
    np.testing.assert_allclose(physics.ball_xy(qpos), recorded["ball_xy_after"], rtol=0, atol=TOLERANCE_M)
    np.testing.assert_allclose(qpos, recorded["qpos_after"], rtol=0, atol=TOLERANCE_M)
    np.testing.assert_allclose(qvel, recorded["qvel_after"], rtol=0, atol=1e-5)


def test_the_engines_agree_on_random_pushes(capsys):
    rng = np.random.default_rng(0)
    native, definition = (ClevrPhysics(200, engine=engine, num_threads=2) for engine in ENGINES)
    qpos, qvel = native.initial_state(random_scenes(rng, 200))
    furthest = 0.0
    # the balls go on from where the last push left them, and with its velocities
    for kind in ["ball", "ball", "grid", "continuous"] * 3:
        push = random_push(rng, native.ball_xy(qpos), kind)
        got, got_velocity, got_diverged = native.push(qpos, qvel, *push)
        qpos, qvel, diverged = definition.push(qpos, qvel, *push)
        assert not diverged.any()
        assert not got_diverged.any()
        np.testing.assert_allclose(got, qpos, rtol=0, atol=TOLERANCE_M)
        np.testing.assert_allclose(got_velocity, qvel, rtol=0, atol=1e-5)
        furthest = max(furthest, np.abs(native.ball_xy(got) - native.ball_xy(qpos)).max())
    with capsys.disabled():
        print(f"\nnative against MuJoCo, 2,400 random pushes: balls at most {furthest:.1e} m apart", end="")
    assert furthest <= TOLERANCE_M


def test_the_native_engine_is_exact_where_mujoco_solves_to_the_end():
    """What the engines differ by is where MuJoCo's solver stops, not a rule."""
    rng = np.random.default_rng(5)
    physics = ClevrPhysics(8, num_threads=1)
    model = physics.model()
    model.opt.tolerance, model.opt.iterations = 1e-15, 200
    model.opt.ls_tolerance, model.opt.ls_iterations = 1e-4, 200
    data = mujoco.MjData(model)
    qpos, qvel = physics.initial_state(random_scenes(rng, 8))
    for kind in ["ball", "grid", "continuous"] * 5:
        start, ctrl, substeps = random_push(rng, physics.ball_xy(qpos), kind)
        after, velocity, _ = physics.push(qpos, qvel, start, ctrl, substeps)
        for n in range(8):
            mujoco.mj_resetData(model, data)
            data.qpos[:], data.qvel[:] = qpos[n], qvel[n]
            data.qpos[35:], data.qvel[30:] = start[n], 0
            mujoco.mj_forward(model, data)
            data.ctrl[:] = ctrl[n]
            mujoco.mj_step(model, data, substeps[n])
            np.testing.assert_allclose(after[n], data.qpos, rtol=0, atol=1e-12)
            np.testing.assert_allclose(velocity[n], data.qvel, rtol=0, atol=1e-10)
        qpos, qvel = after, velocity


def test_the_engines_agree_on_piles():
    """Balls pressed into each other, the walls and the agent, in motion: twenty contacts and more at once."""
    rng = np.random.default_rng(7)
    native, definition = (ClevrPhysics(48, engine=engine, num_threads=1) for engine in ENGINES)
    centre = np.repeat([[-0.5, -0.2], [0.0, 0.2], [0.45, 0.55]], 16, axis=0)
    qpos, qvel = native.initial_state(centre[:, None] + rng.uniform(-0.1, 0.1, (48, len(BALLS), 2)))
    qpos[:, 2:35:7] += rng.uniform(-0.05, 0.05, (48, len(BALLS)))
    qvel[:, :30] = rng.normal(0, 1, (48, 30))
    push = centre + rng.uniform(-0.1, 0.1, (48, 2)), rng.uniform(-2, 2, (48, 2))
    for substeps in (1, 40):
        got, expected = native.push(qpos, qvel, *push, substeps), definition.push(qpos, qvel, *push, substeps)
        assert not got[2].any()
        assert not expected[2].any()
        np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=TOLERANCE_M)
        np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "value"), [(slice(0, 37), np.nan), (slice(0, 1), np.inf), (slice(2, 35, 7), -1e4), (slice(0, 35), 0.0)]
)
def test_the_native_core_survives_any_state(columns, value):
    """Of states that the binding's callers keep from it: no number, every plane met at once, all balls in one place."""
    qpos, qvel = ClevrPhysics(1).initial_state(np.zeros((1, len(BALLS), 2)))
    qpos[:, columns] = value
    ctrl, substeps, diverged = np.ones((1, 2)), np.array([200]), np.array([7], dtype=np.uint8)
    arrays = qpos, qvel, ctrl, substeps, diverged
    _C.clevr_push(*(array.ctypes.data for array in arrays), rows=1, threads=1)
    assert diverged[0] in (0, 1)
    assert diverged[0] == 1 or np.isfinite(qpos).all()
    if not np.isfinite(value):
        assert diverged[0] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_depends_on_no_other_row_and_no_thread(engine):
    rng = np.random.default_rng(1)
    physics = ClevrPhysics(32, engine=engine, num_threads=1)
    qpos, qvel = physics.initial_state(random_scenes(rng, 32))
    start, ctrl, substeps = random_push(rng, physics.ball_xy(qpos), "continuous")
    expected = physics.push(qpos, qvel, start, ctrl, substeps)
    threaded = ClevrPhysics(32, engine=engine, num_threads=3).push(qpos, qvel, start, ctrl, substeps)
    reverse = physics.push(qpos[::-1], qvel[::-1], start[::-1], ctrl[::-1], substeps[::-1])
    for n in range(32):
        row = slice(n, n + 1)
        single = physics.push(qpos[row], qvel[row], start[row], ctrl[row], substeps[row])
        for whole, other, alone, flipped in zip(expected, threaded, single, reverse, strict=True):
            np.testing.assert_array_equal(other[n], whole[n])
            np.testing.assert_array_equal(alone[0], whole[n])
            np.testing.assert_array_equal(flipped[31 - n], whole[n])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_diverged_row_is_marked_and_alone(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs there what it gives up
    physics = ClevrPhysics(6, engine=engine)
    qpos, qvel = physics.initial_state(random_scenes(np.random.default_rng(2), 6))
    start, ctrl = np.full((6, 2), -0.55), np.full((6, 2), 0.5)
    expected, expected_velocity, none = physics.push(qpos, qvel, start, ctrl)
    assert not none.any()
    bad = [1, 2, 4, 5]
    qpos[1, 9], qvel[1, 0] = np.nan, np.inf
    qvel[2, 2] = 1e9  # of which the table makes more than MuJoCo goes on with
    qpos[4, 14] = 1.01  # outside of the walls
    qvel[5, 18] = 1000.0  # soon outside
    got, velocity, diverged = physics.push(qpos, qvel, start, ctrl)
    np.testing.assert_array_equal(np.flatnonzero(diverged), bad)
    np.testing.assert_array_equal(got[bad], qpos[bad])
    np.testing.assert_array_equal(velocity[bad], qvel[bad])
    np.testing.assert_array_equal(got[[0, 3]], expected[[0, 3]])
    np.testing.assert_array_equal(velocity[[0, 3]], expected_velocity[[0, 3]])


def test_the_inputs_stay_as_they_are():
    physics = ClevrPhysics(2)
    qpos, qvel = physics.initial_state(random_scenes(np.random.default_rng(3), 2))
    arrays = [qpos, qvel, np.full((2, 2), 0.1), np.ones((2, 2))]
    before = [array.copy() for array in arrays]
    physics.push(*arrays)
    for array, kept in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_agent_is_placed_at_rest_and_its_force_clipped(engine):
    physics = ClevrPhysics(1, engine=engine)
    qpos, qvel = physics.initial_state(np.array([[[-0.4, 0.3], [0.4, 0.3], [-0.4, -0.1], [0.4, -0.1], [0, 0.4]]]))
    qpos[:, 35:], qvel[:, 30:] = 0.3, 5.0
    got, velocity, _ = physics.push(qpos, qvel, np.zeros((1, 2)), np.array([[0.0, -3.0]]), 1)
    # a free agent: m = 0.04 + 0.5 * 4/3 pi 0.05^3, damped by 0.5; the damping of the step is implicit
    mass = 0.04 + 0.5 * 4 / 3 * np.pi * 0.05**3
    speed = 0.01 * -2.0 / (mass + 0.01 * 0.5)
    np.testing.assert_allclose(velocity[0, 30:], [0, speed], rtol=1e-12)
    np.testing.assert_allclose(got[0, 35:], [0, 0.01 * speed], rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_ball_comes_to_rest_where_the_contact_carries_it(engine):
    physics = ClevrPhysics(1, engine=engine)
    qpos, qvel = physics.initial_state(np.array([[[-0.4, 0.3], [0.4, 0.3], [-0.4, -0.1], [0.4, -0.1], [0, 0.4]]]))
    away, still = np.full((1, 2), 1.5), np.zeros((1, 2))
    for _ in range(20):
        qpos, qvel, _ = physics.push(qpos, qvel, away, still)
    np.testing.assert_allclose(qvel, 0, atol=1e-12)
    # At rest the four edges carry the weight: 4 D K imp (margin - distance) = m g, in units of the contact's own mass.
    depth = 0.002 - (qpos[0, 2] + 0.325 - 0.13)
    mass = 4 / 3 * np.pi * 0.13**3
    impedance = 0.9 + 0.05 * 2 * (depth / 0.001) ** 2
    stiffness = impedance / ((1 - impedance) * 2 * 0.64 * 1.64 / (mass + 0.04))
    assert 4 * stiffness * impedance * depth / (0.95 * 0.02) ** 2 == pytest.approx(mass * 9.81, rel=1e-9)


def test_the_gil_is_dropped():
    physics = ClevrPhysics(512, num_threads=1)
    qpos, qvel = physics.initial_state(np.tile(random_scenes(np.random.default_rng(4), 1), (512, 1, 1)))
    beats, done = [], threading.Event()

    def beat():
        while not done.wait(1e-4):
            beats.append(1)

    other = threading.Thread(target=beat)
    other.start()
    before = len(beats)
    physics.push(qpos, qvel, np.zeros((512, 2)), np.ones((512, 2)), 200)
    during = len(beats) - before
    done.set()
    other.join()
    assert during > 5  # a held GIL lets one or two through, around the call


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


def test_no_scenes_are_no_work():
    for engine in ENGINES:
        physics = ClevrPhysics(1, engine=engine)
        qpos, qvel = physics.initial_state(np.zeros((0, 5, 2)))
        got, velocity, diverged = physics.push(qpos, qvel, np.zeros((0, 2)), np.zeros((0, 2)))
        assert (got.shape, velocity.shape, diverged.shape) == ((0, 37), (0, 32), (0,))


def test_bad_input_is_refused_by_name():
    physics = ClevrPhysics(1)
    qpos, qvel = physics.initial_state(np.zeros((2, 5, 2)))
    start, ctrl = np.ones((2, 2)), np.zeros((2, 2))
    for bad, name in [
        ((qpos[:, :36], qvel, start, ctrl), "qpos"),
        ((qpos, qvel[0], start, ctrl), "qvel"),
        ((qpos, qvel, start[:1], ctrl), "rows differ"),
        ((qpos, qvel, start * [1, np.nan], ctrl), "start"),
        ((qpos, qvel, start * 1.6, ctrl), "start"),
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
