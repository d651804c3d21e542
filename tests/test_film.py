"""One episode as a film, with its words below it."""

import numpy as np
import pytest

from lago_fast.errors import UnsupportedArgument
from lago_fast.evaluate import random_actor
from lago_fast.film import LAST_FRAMES, film_episode
from lago_fast.presets import EnvSettings

CLEVR = EnvSettings(env="clevr-robot", tasks=("real",), num_envs=1, max_episode_steps=4)


def test_a_film_has_a_picture_per_step_and_shows_the_outcome(tmp_path):
    imageio = pytest.importorskip("imageio.v3", reason="films need the extra 'envs'")
    path = tmp_path / "episode.gif"
    reached = film_episode(random_actor(40, seed=0, discrete=True), CLEVR, "real", path, seed=0)
    frames = imageio.imread(path, index=None)
    assert reached in (True, False)
    assert 2 <= len(frames) <= 5 + LAST_FRAMES  # a GIF holds a picture that does not change once
    height, width = frames.shape[1:3]
    assert height > width  # the words stand below the square picture
    assert np.ptp(frames[0, width:].astype(int)) > 100
    assert (frames[0] != frames[-1]).any()


def test_what_cannot_be_filmed_is_refused(tmp_path):
    act = random_actor(4, seed=0)
    with pytest.raises(UnsupportedArgument, match="video"):
        film_episode(act, EnvSettings(tasks=("reach",)), "reach", tmp_path / "x.gif", seed=0)
    act = random_actor(40, seed=0, discrete=True)
    with pytest.raises(UnsupportedArgument, match=r"\.gif or \.mp4"):
        film_episode(act, CLEVR, "real", tmp_path / "x.png", seed=0)
