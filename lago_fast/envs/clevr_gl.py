"""MuJoCo's renderer for the scenes of CLEVR-Robot, off screen, by EGL or OSMesa.

Test: tests/envs/test_clevr_drawing.py.
"""

import os
import weakref
from importlib import import_module
from typing import Any

import mujoco
import numpy as np

from lago_fast.envs.clevr_drawing import CENTRE_M, SPAN_M
from lago_fast.envs.clevr_physics import BALLS
from lago_fast.errors import DeviceUnavailable

BACKENDS = ("egl", "osmesa")
_HEIGHT_M, _TABLE_Z_M = 40.0, -0.325  # so high that perspective all but vanishes


class GlScene:
    """Square images of scenes from straight above.

    Args:
        model: the scene.
        size: pixels of a side.

    Raises:
        DeviceUnavailable: neither EGL nor OSMesa makes a context.
    """

    def __init__(self, model: mujoco.MjModel, size: int) -> None:
        self.size, self._model = size, model
        self._data = mujoco.MjData(model)
        self._context = _context(size)
        model.vis.global_.fovy = np.degrees(2 * np.arctan(SPAN_M / 2 / (_HEIGHT_M - _TABLE_Z_M)))
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self._renderer = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._renderer)
        # at the latest when the interpreter ends, while GL is still there
        self._free = weakref.finalize(self, _free, self._renderer, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=50)
        self._camera, self._options = mujoco.MjvCamera(), mujoco.MjvOption()
        self._camera.lookat[:] = (*CENTRE_M, _TABLE_Z_M)
        self._camera.distance = _HEIGHT_M - _TABLE_Z_M
        self._camera.azimuth, self._camera.elevation = 90.0, -90.0
        # the light from the camera alone shows the colours; the agent is no part of what is seen
        model.light_active[:] = 0
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.5, 0.5
        model.geom_rgba[model.geom("agent").id, 3] = 0.0
        self._columns = [model.jnt_qposadr[model.joint(name).id] for name in BALLS]

    def __call__(self, ball_xy: np.ndarray) -> np.ndarray:
        """[n, size, size, 3] uint8 of balls at `ball_xy` [n, 5, 2] in metres; the agent is left out."""
        self._context.make_current()
        images = np.zeros((len(ball_xy), self.size, self.size, 3), np.uint8)
        view = mujoco.MjrRect(0, 0, self.size, self.size)
        for image, balls in zip(images, ball_xy, strict=True):
            for column, xy in zip(self._columns, balls, strict=True):
                self._data.qpos[column : column + 2] = xy
            mujoco.mj_kinematics(self._model, self._data)
            mujoco.mjv_updateScene(
                self._model,
                self._data,
                self._options,
                None,
                self._camera,
                mujoco.mjtCatBit.mjCAT_ALL,
                self._scene,
            )
            mujoco.mjr_render(view, self._scene, self._renderer)
            mujoco.mjr_readPixels(image, None, view, self._renderer)
        return images[:, ::-1].copy()

    def close(self) -> None:
        """Free the context."""
        self._free()


def _free(renderer: mujoco.MjrContext, context: Any) -> None:
    context.make_current()
    renderer.free()
    context.free()


def _context(size: int) -> Any:
    """A current GL context: by the backend that MuJoCo's own MUJOCO_GL names, else by the first that makes one."""
    asked = os.environ.get("MUJOCO_GL", "")
    reasons = []
    for backend in (asked,) if asked in BACKENDS else BACKENDS:
        # the loaders of GL functions, MuJoCo's and PyOpenGL's, are told by nothing but these
        os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
        try:
            context = import_module(f"mujoco.{backend}").GLContext(size, size)
            context.make_current()
        except (ImportError, RuntimeError, AttributeError) as error:
            reasons.append(f"{backend}: {error}")
            continue
        return context
    raise DeviceUnavailable(
        f"renderer='gl': no off-screen GL here ({'; '.join(reasons)}); install libegl1, or libosmesa6 and set "
        "MUJOCO_GL=osmesa, or give renderer='drawing'"
    )
