"""MuJoCo's renderer for the scenes of CLEVR-Robot, off screen, by EGL or OSMesa, in a process of its own.

Of its own because Mesa's drivers bring an LLVM whose names are visible to all that is loaded after them, and a triton
that is imported later (by a torch optimiser, for one) crashes on it. The parent writes the number of scenes and the
balls' places to the child's standard input, and reads pixels. Test: tests/envs/test_clevr_drawing.py.
"""

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any, BinaryIO

import numpy as np

from lago_fast.envs.clevr_drawing import CENTRE_M, SPAN_M
from lago_fast.envs.clevr_physics import BALLS, ClevrPhysics
from lago_fast.errors import DeviceUnavailable

BACKENDS = ("egl", "osmesa")
_HEIGHT_M, _TABLE_Z_M = 40.0, -0.325  # so high that perspective all but vanishes
_READY = b"r"


class GlScene:
    """Square images of scenes from straight above; MuJoCo's own MUJOCO_GL names the backend, else the first that works.

    Args:
        size: pixels of a side.

    Raises:
        DeviceUnavailable: neither EGL nor OSMesa makes a context, or the child died.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        asked = os.environ.get("MUJOCO_GL", "")
        self._backends = (asked,) if asked in BACKENDS else BACKENDS
        self._launch()

    def _launch(self) -> None:
        self._in_step, reasons = False, []
        for backend in self._backends:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
            self._child = _start(backend, self._size, self._errors)
            self._stop = weakref.finalize(self, _stop, self._child, self._errors)
            with self._exchange():
                if self._read(1) == _READY:
                    return
                reasons.append(f"{backend}: {self._last_words()}")
            self._stop()
        raise DeviceUnavailable(
            f"renderer='gl': no off-screen GL here ({'; '.join(reasons)}); install libegl1 or libosmesa6, or give "
            "renderer='drawing'"
        )

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Stop the child where its answer may not be read to the end: the next one would begin there."""
        self._in_step = False
        try:
            yield
        except BaseException:
            self._stop()
            raise
        self._in_step = True

    def __call__(self, ball_xy: np.ndarray) -> np.ndarray:
        """[n, size, size, 3] uint8 of balls at `ball_xy` [n, 5, 2] in metres; the agent is left out.

        After a call that was interrupted or failed it starts a new child.
        """
        if not (self._in_step and self._stop.alive):
            self._stop()
            self._launch()
        with self._exchange():
            return self._ask(ball_xy)

    def _ask(self, ball_xy: np.ndarray) -> np.ndarray:
        assert self._child.stdin is not None
        wanted = len(ball_xy) * self._size * self._size * 3
        try:
            self._child.stdin.write(np.int64(len(ball_xy)).tobytes() + ball_xy.astype(np.float64).tobytes())
            self._child.stdin.flush()
            pixels = self._read(wanted)
        except BrokenPipeError:
            pixels = b""
        if len(pixels) < wanted:
            raise DeviceUnavailable(
                f"renderer='gl': the process that renders died ({self._last_words()}); give renderer='drawing'"
            )
        return np.frombuffer(pixels, np.uint8).reshape(len(ball_xy), self._size, self._size, 3).copy()

    def _read(self, count: int) -> bytes:
        assert self._child.stdout is not None
        return self._child.stdout.read(count)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        """End the child, of which an image would start another; a second call does nothing."""
        self._stop()


def _start(backend: str, size: int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    command = [sys.executable, "-m", "lago_fast.envs.clevr_gl", backend, str(size)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, env=environment)


def _stop(child: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    child.kill()
    child.communicate()
    errors.close()


def _serve(backend: str, size: int, requests: BinaryIO, answers: BinaryIO) -> None:
    """The child: scenes in, pixels out, until the input ends."""
    context = import_module(f"mujoco.{backend}").GLContext(size, size)
    context.make_current()
    camera = _Camera(size)
    answers.write(_READY)
    answers.flush()
    while header := requests.read(8):
        count = int(np.frombuffer(header, np.int64)[0])
        places = np.frombuffer(requests.read(count * len(BALLS) * 16), np.float64).reshape(count, len(BALLS), 2)
        for balls in places:
            answers.write(camera(balls).tobytes())
        answers.flush()


class _Camera:
    """One scene at a time, in the context that is current."""

    def __init__(self, size: int) -> None:
        import mujoco

        self._model = model = ClevrPhysics(1).model()
        self._data = mujoco.MjData(model)
        model.vis.global_.fovy = np.degrees(2 * np.arctan(SPAN_M / 2 / (_HEIGHT_M - _TABLE_Z_M)))
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        # the light from the camera alone shows the colours; the agent is no part of what is seen
        model.light_active[:] = 0
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.5, 0.5
        model.geom_rgba[model.geom("agent").id, 3] = 0.0
        self._renderer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._renderer)
        self._scene, self._options = mujoco.MjvScene(model, maxgeom=50), mujoco.MjvOption()
        self._camera: Any = mujoco.MjvCamera()
        self._camera.lookat[:] = (*CENTRE_M, _TABLE_Z_M)
        self._camera.distance = _HEIGHT_M - _TABLE_Z_M
        self._camera.azimuth, self._camera.elevation = 90.0, -90.0
        self._view = mujoco.MjrRect(0, 0, size, size)
        self._columns = [int(model.jnt_qposadr[model.joint(name).id]) for name in BALLS]
        self._image = np.zeros((size, size, 3), np.uint8)

    def __call__(self, balls: np.ndarray) -> np.ndarray:
        import mujoco

        for column, xy in zip(self._columns, balls, strict=True):
            self._data.qpos[column : column + 2] = xy
        mujoco.mj_kinematics(self._model, self._data)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, self._data, self._options, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._view, self._scene, self._renderer)
        mujoco.mjr_readPixels(self._image, None, self._view, self._renderer)
        return self._image[::-1]


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
