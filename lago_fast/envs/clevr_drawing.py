"""Pictures of CLEVR-Robot: MuJoCo's renderer, or a plain drawing of our own where there is no GL; captions and films.

Both look straight down on the same square metre and a half, x to the right and y (behind) up.
Tests: tests/envs/test_clevr_drawing.py.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lago_fast.envs.clevr_goals import NUM_BALLS, nearest
from lago_fast.envs.clevr_physics import BALL_RADIUS
from lago_fast.errors import DeviceUnavailable, MissingExtra, UnsupportedArgument

if TYPE_CHECKING:
    from lago_fast.envs.clevr_gl import GlScene

RENDERERS = ("auto", "gl", "drawing")
CENTRE_M, SPAN_M = np.array([0.0, 0.2]), 1.5  # the middle of the walls, and the side of what is seen
WALLS_M = np.array([(-0.6, -0.3), (0.6, 0.7)])
BALL_RGB = np.array([(255, 26, 26), (51, 128, 255), (51, 255, 0), (204, 51, 255), (51, 255, 255)], np.float32)
TABLE_RGB, FLOOR_RGB = np.float32(150), np.float32(105)
CAPTION_LINE = 16  # pixels
_log = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def _board(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [size], y [size] of the pixels' centres in metres, and the empty table [size, size, 3]."""
    line = ((np.arange(size) + 0.5) / size - 0.5) * SPAN_M
    x, y = line + CENTRE_M[0], CENTRE_M[1] - line
    inside = ((x >= WALLS_M[0, 0]) & (x <= WALLS_M[1, 0])) & ((y >= WALLS_M[0, 1]) & (y <= WALLS_M[1, 1]))[:, None]
    empty = np.where(inside, TABLE_RGB, FLOOR_RGB)
    return x, y, np.repeat(empty[..., None], 3, axis=2).astype(np.float32)


def draw(ball_xy: np.ndarray, size: int) -> np.ndarray:
    """Balls as shaded discs: [n, size, size, 3] uint8 for `ball_xy` [n, 5, 2] in metres."""
    x, y, empty = _board(size)
    image = np.tile(empty, (len(ball_xy), 1, 1, 1))
    for ball in range(NUM_BALLS):
        dx = x - ball_xy[:, ball, 0, None]
        dy = y - ball_xy[:, ball, 1, None]
        distance = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)
        # a soft edge of one pixel, and darker towards the rim
        cover = np.clip((BALL_RADIUS - distance) * (size / SPAN_M) + 0.5, 0.0, 1.0)[..., None].astype(np.float32)
        light = (1.0 - 0.4 * np.minimum(distance / BALL_RADIUS, 1.0) ** 2)[..., None].astype(np.float32)
        image += cover * (light * BALL_RGB[ball] - image)
    return image.round().astype(np.uint8)


class Painter:
    """Images of scenes by the renderer that was asked for; "auto" decides when the first image is asked for.

    Args:
        renderer: "gl", "drawing", or "auto": the first of the two that works here.

    Raises:
        UnsupportedArgument: another renderer.
        DeviceUnavailable: from a call: "gl" was asked for, and neither EGL nor OSMesa works here.
    """

    def __init__(self, renderer: str) -> None:
        if renderer not in RENDERERS:
            raise UnsupportedArgument(f"renderer={renderer!r} is unknown; {nearest(renderer, RENDERERS)}")
        self.renderer = renderer
        self._scenes: dict[int, GlScene] = {}  # by size

    def __call__(self, ball_xy: np.ndarray, size: int) -> np.ndarray:
        """[n, size, size, 3] uint8 for `ball_xy` [n, 5, 2] in metres."""
        if self.renderer == "auto":
            self.renderer = self._choose(size)
        if self.renderer == "drawing":
            return draw(ball_xy, size)
        return self._gl(size)(ball_xy)

    def _choose(self, size: int) -> str:
        try:
            self._gl(size)
        except DeviceUnavailable as error:
            _log.warning("images are drawings: %s", error)
            return "drawing"
        return "gl"

    def _gl(self, size: int) -> "GlScene":
        from lago_fast.envs.clevr_gl import GlScene

        if size not in self._scenes:
            self._scenes[size] = GlScene(size)
        return self._scenes[size]

    def close(self) -> None:
        """Free what GL holds, if it does; a second call does nothing."""
        for scene in self._scenes.values():
            scene.close()
        self._scenes.clear()


def caption(frame: np.ndarray, text: str) -> np.ndarray:
    """A frame [H, W, 3] uint8 with the text below it, in as many lines as it needs.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise MissingExtra("captions need Pillow: pip install 'lago_fast[envs]'") from error
    width = frame.shape[1]
    pen = ImageDraw.Draw(Image.new("RGB", (width, 1)))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer) > width - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    strip = Image.new("RGB", (width, CAPTION_LINE * len(lines) + 8), "black")
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        pen.text((4, 4 + CAPTION_LINE * number), line, fill="white")
    return np.concatenate([frame, np.asarray(strip)], axis=0)


def write_film(path: Path, frames: Sequence[np.ndarray], frames_per_s: float = 5.0) -> None:
    """Write frames [H, W, 3] uint8 of one size as a GIF, or as an MP4 by the name's ending.

    Raises:
        UnsupportedArgument: another ending, or no frame.
        MissingExtra: imageio is not installed, or for MP4 imageio-ffmpeg.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise UnsupportedArgument(f"{path.name}: films end in .gif or .mp4")
    if not len(frames):
        raise UnsupportedArgument("frames: give at least one")
    try:
        import imageio.v3 as imageio

        if path.suffix == ".mp4":
            import imageio_ffmpeg  # noqa: F401 - what imageio's plugin needs
    except ImportError as error:
        raise MissingExtra("films need pip install 'imageio[ffmpeg]'; a GIF only imageio") from error
    if path.suffix == ".gif":
        imageio.imwrite(path, np.stack(frames), duration=1000.0 / frames_per_s, loop=0)
    else:
        imageio.imwrite(path, np.stack(frames), plugin="FFMPEG", fps=frames_per_s)
