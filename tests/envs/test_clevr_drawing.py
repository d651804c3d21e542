"""Pictures of CLEVR-Robot: what is where in them, by both renderers, captions and films."""

import subprocess
import sys

import numpy as np
import pytest

from lago_fast.envs import clevr_gl
from lago_fast.envs.clevr_drawing import BALL_RGB, Painter, caption, draw, write_film
from lago_fast.errors import DeviceUnavailable, MissingExtra, UnsupportedArgument

SCENES = np.array(
    [
        [(-0.4, 0.0), (0.0, 0.0), (0.4, 0.0), (-0.2, 0.4), (0.2, 0.4)],
        [(0.4, 0.5), (0.0, 0.5), (-0.4, 0.5), (0.2, 0.0), (-0.2, 0.0)],
    ]
)


def pixel(xy, size):
    """Row and column of a place: x to the right, y up, 1.5 m around (0, 0.2)."""
    return int((0.5 - (xy[1] - 0.2) / 1.5) * size), int((xy[0] / 1.5 + 0.5) * size)


def assert_shows(images, size):
    assert images.shape == (2, size, size, 3)
    assert images.dtype == np.uint8
    for image, scene in zip(images, SCENES, strict=True):
        for ball, xy in enumerate(scene):
            seen = image[pixel(xy + np.array([0.05, 0.0]), size)].astype(float)
            cosine = seen @ BALL_RGB[ball] / np.linalg.norm(seen) / np.linalg.norm(BALL_RGB[ball])
            assert cosine > 0.98, (ball, seen)
            rim = image[pixel(xy - np.array([0.0, 0.15]), size)].astype(float)
            assert rim.std() < 12, "beside a ball is the grey table"


@pytest.mark.parametrize("size", [64, 200])
def test_drawing_shows_each_ball_in_its_place(size):
    assert_shows(draw(SCENES, size), size)
    np.testing.assert_array_equal(draw(SCENES[1:], size)[0], draw(SCENES, size)[1])


def test_gl_shows_the_same():
    painter = Painter("gl")
    try:
        images = painter(SCENES, 128)
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    assert_shows(images, 128)
    assert_shows(painter(SCENES, 96), 96)
    child = painter._scenes[96]._child
    child.kill()
    child.wait()
    with pytest.raises(DeviceUnavailable, match="the process that renders died"):
        painter(SCENES, 96)
    painter.close()
    painter.close()


@pytest.mark.parametrize("moment", ["written", "read in part", "started"])
def test_after_an_interrupt_gl_shows_what_it_is_asked_for(monkeypatch, moment):
    try:
        scene = clevr_gl.GlScene(64)
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    expected, read = scene(SCENES), scene._read

    def interrupted(count):
        if moment == "read in part":
            read(count // 3)
        raise KeyboardInterrupt

    if moment == "started":
        scene.close()
    monkeypatch.setattr(scene, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scene(SCENES[::-1])
    assert scene._child.poll() is not None
    monkeypatch.undo()
    for scenes, images in ((SCENES, expected), (SCENES[1:], expected[1:])):
        np.testing.assert_array_equal(scene(scenes), images)
    scene.close()


@pytest.mark.slow
def test_triton_can_be_imported_after_gl():
    code = (
        "import numpy as np\n"
        "from lago_fast.envs.clevr_drawing import Painter\n"
        "Painter('auto')(np.zeros((1, 5, 2)), 64)\n"
        "import triton\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_gl_it_is_a_drawing_unless_gl_was_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(clevr_gl, "BACKENDS", ("nothing",))
    monkeypatch.setenv("MUJOCO_GL", "")
    painter = Painter("auto")
    with caplog.at_level("WARNING", logger="lago_fast"):
        np.testing.assert_array_equal(painter(SCENES, 64), draw(SCENES, 64))
    assert painter.renderer == "drawing"
    assert "images are drawings" in caplog.text
    with pytest.raises(DeviceUnavailable, match=r"nothing: .*renderer='drawing'"):
        Painter("gl")(SCENES, 64)


def test_captions_add_as_many_lines_as_they_need():
    frame = np.full((64, 200, 3), 7, np.uint8)
    short, long = caption(frame, "push it"), caption(frame, "push " * 30)
    for captioned in (short, long):
        np.testing.assert_array_equal(captioned[:64], frame)
        assert captioned[64:].max() > 200
        assert captioned.dtype == np.uint8
    assert short.shape == (64 + 24, 200, 3)
    assert long.shape[0] > short.shape[0] + 32


def test_films_are_read_back(tmp_path):
    import imageio.v3 as imageio

    frames = [caption(image, "line up the balls") for image in draw(SCENES, 64)]
    write_film(tmp_path / "film.gif", frames)
    back = imageio.imread(tmp_path / "film.gif")
    assert back.shape == (2, *frames[0].shape)
    assert np.abs(back.astype(int) - np.stack(frames)).mean() < 12  # of few colours
    with pytest.raises(UnsupportedArgument, match=r"film.avi.*\.gif"):
        write_film(tmp_path / "film.avi", frames)
    with pytest.raises(UnsupportedArgument, match="at least one"):
        write_film(tmp_path / "film.gif", [])


def test_missing_packages_name_the_remedy(monkeypatch, tmp_path):
    frames = list(draw(SCENES, 64))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtra, match=r"imageio\[ffmpeg\]"):
        write_film(tmp_path / "film.mp4", frames)
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    with pytest.raises(MissingExtra, match="a GIF only imageio"):
        write_film(tmp_path / "film.gif", frames)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match="Pillow"):
        caption(frames[0], "push it")
