"""The physics of CLEVR-Robot: five balls on a walled table and an agent that pushes them, many scenes at a time.

The scene is `assets/clevr_robot.xml`, and MuJoCo 3.3.0 stepping it is the definition (`engine="mujoco"`). The native
engine (csrc/clevr_robot) follows MuJoCo's rules for this scene alone, and solves its contacts exactly.
Source of the scene: https://github.com/google-research/clevr_robot_env. Tests: tests/envs/test_clevr_physics.py.
"""

from importlib.resources import files
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lago_fast import _C
from lago_fast.cores import usable_cores
from lago_fast.errors import MissingExtra, UnsupportedArgument, check_whole

if TYPE_CHECKING:
    import mujoco

BALLS = ("red", "blue", "green", "purple", "cyan")
BALL_RADIUS = 0.13
TIMESTEP_S = 0.01
NQ, NV = 37, 32
# An agent that starts this near to the origin, in m along each axis, cannot reach the ends of its slides in that
# many substeps; the native engine knows no ends.
FURTHEST_START = 1.5
MOST_SUBSTEPS = 200
FURTHEST_BALL = 1.0  # along each axis; the walls stand within 0.7

_RESTING_Z = -0.195  # in the scene's file; they rise towards the contacts' margin from there
_LARGEST = 1e10  # MuJoCo gives a simulation up beyond this
_AGENT_Q, _AGENT_V = 35, 30
_BALL_XYZ = np.arange(_AGENT_Q).reshape(len(BALLS), 7)[:, :3]  # columns of qpos
_BALL_XY = _BALL_XYZ[:, :2]
_QPOS_LIMITS = np.full(NQ, _LARGEST)
_QPOS_LIMITS[_BALL_XYZ] = FURTHEST_BALL

Floats = NDArray[np.float64]


class ClevrPhysics:
    """Pushes in many scenes at a time, each a pure function of its state, the agent's start and the force.

    `qpos` is five free joints (x, y, z in m; a quaternion w, x, y, z), then the agent's x and y. `qvel` is five
    times a velocity in m/s and an angular velocity in rad/s in the ball's own frame, then the agent's velocity.

    Args:
        num_envs: rows that a call will usually have; no more threads than that are used. Calls may have any number.
        engine: "native", or "mujoco": MuJoCo's own thread pool. They agree within 1e-6 m after a push.
        num_threads: default: all cores that this process may use. Results do not depend on it.

    Raises:
        UnsupportedArgument, MissingExtra: see the messages.
    """

    def __init__(
        self, num_envs: int, engine: Literal["native", "mujoco"] = "native", num_threads: int | None = None
    ) -> None:
        check_whole(1, num_envs=num_envs)
        if num_threads is not None:
            check_whole(1, num_threads=num_threads)
        if engine not in ("native", "mujoco"):
            raise UnsupportedArgument(f"engine={engine!r}: give 'native' or 'mujoco'")
        self.engine = engine
        self.num_threads = min(num_envs, num_threads or usable_cores())
        self._stepper: _NativeStepper | _MujocoStepper
        self._stepper = (_NativeStepper if engine == "native" else _MujocoStepper)(self.num_threads)

    def push(
        self, qpos: Floats, qvel: Floats, start: Floats, ctrl: Floats, substeps: int | ArrayLike = 40
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Place the agent, at rest, and let the force act; the inputs stay as they are.

        Args:
            qpos: [N, 37].
            qvel: [N, 32]; the agent's is not used.
            start: [N, 2] where the agent is placed, in m; at most 1.5 from the origin along each axis.
            ctrl: [N, 2] force on the agent in N; MuJoCo clips each at 2.
            substeps: [N] or one for all, steps of 10 ms, 1 to 200.

        Returns:
            `qpos` and `qvel` afterwards, and which rows diverged [N]: their state was or became no number or larger
            than 1e10, or a ball was or came more than 1 m from the origin along an axis, far outside of the walls.
            Such a row keeps the state that it was given. No row depends on another.

        Raises:
            UnsupportedArgument: an array of another shape, a start or a force that is no number or out of range.
        """
        qpos, qvel = _checked("qpos", qpos, NQ), _checked("qvel", qvel, NV)
        start, ctrl = _checked("start", start, 2), _checked("ctrl", ctrl, 2)
        lengths = {"qpos": len(qpos), "qvel": len(qvel), "start": len(start), "ctrl": len(ctrl)}
        if len(set(lengths.values())) > 1:
            raise UnsupportedArgument(f"rows differ: {lengths}; give one row of each for every scene")
        near = np.abs(start) <= FURTHEST_START
        if not near.all():
            raise UnsupportedArgument(f"start: row {_first_bad(near)} is not within {FURTHEST_START} m of the origin")
        number = np.isfinite(ctrl)
        if not number.all():
            raise UnsupportedArgument(f"ctrl: row {_first_bad(number)} is no number; give a force in N")
        steps = _checked_substeps(substeps, len(qpos))

        before_q, before_v = qpos.copy(), qvel.copy()
        before_q[:, _AGENT_Q:] = start
        before_v[:, _AGENT_V:] = 0.0
        broken = ~_sound(before_q, before_v)
        if broken.any():
            # The engine gets a sound scene in their place, on which it spends no warning.
            before_q[broken], before_v[broken] = _at_rest()
        after_q, after_v, diverged = self._stepper.step(before_q, before_v, ctrl, steps)
        diverged |= broken | ~_sound(after_q, after_v)
        if diverged.any():
            after_q[diverged], after_v[diverged] = qpos[diverged], qvel[diverged]
        return after_q, after_v, diverged

    def initial_state(self, ball_xy: Floats) -> tuple[Floats, Floats]:
        """Scenes at rest from the balls' places.

        Args:
            ball_xy: [N, 5, 2] in m.

        Returns:
            qpos [N, 37] with the agent at the origin, and qvel [N, 32].
        """
        ball_xy = np.asarray(ball_xy, dtype=np.float64)
        if ball_xy.ndim != 3 or ball_xy.shape[1:] != (len(BALLS), 2):
            raise UnsupportedArgument(f"ball_xy: expected [N, 5, 2], got {list(ball_xy.shape)}")
        rest_q, rest_v = _at_rest()
        qpos = np.tile(rest_q, (len(ball_xy), 1))
        qpos[:, _BALL_XY] = ball_xy
        return qpos, np.tile(rest_v, (len(ball_xy), 1))

    def ball_xy(self, qpos: Floats) -> Floats:
        """The balls' places [N, 5, 2] of `qpos` [N, 37], in the order of `BALLS`."""
        return _checked("qpos", qpos, NQ)[:, _BALL_XY]

    def model(self) -> "mujoco.MjModel":
        """The scene as MuJoCo's model, to render for one."""
        return _import_mujoco().MjModel.from_xml_string(_scene())


class _MujocoStepper:
    """MuJoCo's rollout, one MjData for each thread; MuJoCo writes what it gives up into MUJOCO_LOG.TXT."""

    def __init__(self, num_threads: int) -> None:
        mujoco = _import_mujoco()
        from mujoco import rollout

        self._model = mujoco.MjModel.from_xml_string(_scene())
        self._data = [mujoco.MjData(self._model) for _ in range(num_threads)]
        # The calling thread works alone where the pool has none.
        self._rollout = rollout.Rollout(nthread=num_threads if num_threads > 1 else 0)

    def step(
        self, qpos: Floats, qvel: Floats, ctrl: Floats, substeps: NDArray[np.int64]
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        rows = len(qpos)
        if rows == 0:
            return qpos, qvel, np.zeros(0, dtype=bool)
        most = int(substeps.max())
        # the state is the time, qpos and qvel
        state = np.concatenate([np.zeros((rows, 1)), qpos, qvel], axis=1)
        control = np.repeat(ctrl[:, None], most, axis=1)
        states, _ = self._rollout.rollout(self._model, self._data, state, control)
        last = states[np.arange(rows), substeps - 1]
        # MuJoCo resets what it gives up, and the time with it.
        reset: NDArray[np.bool_] = np.abs(last[:, 0] - substeps * TIMESTEP_S) > TIMESTEP_S / 2
        return last[:, 1 : 1 + NQ], last[:, 1 + NQ :], reset


class _NativeStepper:
    """The native engine, which works in place."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    def step(
        self, qpos: Floats, qvel: Floats, ctrl: Floats, substeps: NDArray[np.int64]
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        diverged = np.empty(len(qpos), dtype=bool)
        _C.clevr_push(
            qpos.ctypes.data,
            qvel.ctypes.data,
            ctrl.ctypes.data,
            substeps.ctypes.data,
            diverged.ctypes.data,
            rows=len(qpos),
            threads=self._num_threads,
        )
        return qpos, qvel, diverged


def _at_rest() -> tuple[Floats, Floats]:
    """One scene's state, with the balls apart."""
    places = [(-0.4, 0.0), (0.0, 0.0), (0.4, 0.0), (-0.2, 0.4), (0.2, 0.4)]
    balls = [coordinate for x, y in places for coordinate in (x, y, _RESTING_Z, 1.0, 0.0, 0.0, 0.0)]
    return np.array([*balls, 0.0, 0.0]), np.zeros(NV)


def _sound(qpos: Floats, qvel: Floats) -> NDArray[np.bool_]:
    # a comparison with NaN is false
    near = (np.abs(qpos) <= _QPOS_LIMITS).all(axis=1)
    return np.asarray(near & (np.abs(qvel) <= _LARGEST).all(axis=1))


def _first_bad(good: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(~good.all(axis=1))[0])


def _checked(name: str, value: Floats, width: int) -> Floats:
    array = np.ascontiguousarray(value, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != width:
        raise UnsupportedArgument(f"{name}: expected [N, {width}], got {list(array.shape)}")
    return array


def _checked_substeps(substeps: int | ArrayLike, rows: int) -> NDArray[np.int64]:
    array = np.asarray(substeps)
    if not np.issubdtype(array.dtype, np.integer) or array.shape not in ((), (rows,)):
        raise UnsupportedArgument(f"substeps: expected one integer or [{rows}], got {array.dtype} {list(array.shape)}")
    if ((array < 1) | (array > MOST_SUBSTEPS)).any():
        raise UnsupportedArgument(f"substeps: give 1 to {MOST_SUBSTEPS}, got {array.min()} to {array.max()}")
    return np.ascontiguousarray(np.broadcast_to(array, (rows,)), dtype=np.int64)


def _scene() -> str:
    return files("lago_fast.envs").joinpath("assets/clevr_robot.xml").read_text(encoding="utf-8")


def _import_mujoco() -> ModuleType:
    try:
        import mujoco
    except ImportError as error:
        raise MissingExtra("CLEVR-Robot needs MuJoCo: pip install 'lago_fast[envs]'") from error
    module: ModuleType = mujoco
    return module
