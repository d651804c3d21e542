"""The scenes and episodes of CLEVR-Robot: the published rules, independence, and goals that do not hold yet."""

import numpy as np
import pytest

from lago_fast.envs.clevr_episodes import KEPT, Episodes, families_of
from lago_fast.envs.clevr_goals import FAMILIES
from lago_fast.envs.clevr_judges import satisfied
from lago_fast.envs.clevr_scenes import hashed, sample_scenes, uniform
from lago_fast.errors import SceneUnsampled

KEYS = hashed(np.array([7], np.uint64), np.arange(4000))


def test_generator_is_splitmix64():
    # the sequence of seed 1234567, as the generator's reference implementations print it
    got = hashed(np.array([1234567], np.uint64), np.arange(3))
    assert got.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_numbers_are_uniform():
    drawn = uniform(KEYS[:50, None], np.arange(2000)).ravel()
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 5000.0) ** 2 / 5000).sum() < 43.8  # chi squared of 19 degrees of freedom at 0.1 %


def test_scenes_keep_the_published_rules():
    scenes = sample_scenes(KEYS)
    x, y = scenes[..., 0], scenes[..., 1]
    assert (np.abs(x) <= 0.5).all()
    assert ((y >= -0.3) & (y <= 0.5)).all()
    first, second = np.triu_indices(5, 1)
    apart = scenes[:, first] - scenes[:, second]
    assert np.linalg.norm(apart, axis=2).min() >= 2 * 0.13 + 0.1
    assert np.abs(apart).min() >= 0.01
    # the whole range is used: the first ball is all but uniform
    assert x[:, 0].min() < -0.49
    assert x[:, 0].max() > 0.49
    assert y[:, 0].min() < -0.29
    assert y[:, 0].max() > 0.49


def test_scenes_are_distributed_as_one_at_a_time():
    """Against the rules written down as a plain loop."""
    rng = np.random.default_rng(0)

    def plain():
        while True:
            balls = []
            for _ in range(5):
                for _ in range(10):
                    new = np.array([rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.5)])
                    offset = np.abs(np.array(balls).reshape(-1, 2) - new)
                    if (np.hypot(*offset.T) >= 0.36).all() and not ((offset > 0) & (offset < 0.01)).any():
                        balls.append(new)
                        break
                else:
                    break
            if len(balls) == 5:
                return np.array(balls)

    ours, theirs = sample_scenes(KEYS), np.stack([plain() for _ in range(1000)])
    for power in (1, 2):
        error = np.hypot((ours**power).std(axis=0) / len(ours) ** 0.5, (theirs**power).std(axis=0) / 1000**0.5)
        difference = (ours**power).mean(axis=0) - (theirs**power).mean(axis=0)
        assert (np.abs(difference) < 4 * error).all()


def test_a_scene_depends_on_its_key_alone():
    together = sample_scenes(KEYS[:40])
    np.testing.assert_array_equal(sample_scenes(KEYS[:40][::-1])[::-1], together)
    for i in (0, 17, 39):
        np.testing.assert_array_equal(sample_scenes(KEYS[i : i + 1])[0], together[i])
    assert len(np.unique(together.reshape(40, -1), axis=0)) == 40


def test_a_scene_that_cannot_be_is_refused():
    with pytest.raises(SceneUnsampled, match=r"ball_gap=0.6.*smaller gap"):
        sample_scenes(KEYS[:2], gap=0.6)


def episodes(names, num_envs, *, solved_start=False, phrasings="all", gap=0.1):
    families, instructions = families_of(names, num_envs, phrasings)
    drawn = Episodes(families, KEYS[:num_envs], gap, "kalm", solved_start)
    return families, instructions, drawn


def test_goals_do_not_hold_at_the_start_unless_that_is_allowed():
    for allowed in (False, True):
        families, _, drawn = episodes(["real", "two-goals", "gather"], 90, solved_start=allowed)
        ids, held = np.arange(90), 0
        for _ in range(20):
            scene, goal, _ = drawn.take(ids)
            for family in families:
                now = family.goals.take(goal[family.rows])
                held += satisfied(now, scene[family.rows]).all(axis=1).sum()
        assert (held > 0) == allowed


def test_every_goal_and_wording_is_drawn_and_they_belong_together():
    families, instructions, drawn = episodes(["real", "easy"], 40)
    goals, wordings = [], []
    for _ in range(2 * KEPT):
        _, goal, wording = drawn.take(np.arange(40))
        goals.append(goal)
        wordings.append(wording)
    goals, wordings = np.array(goals), np.array(wordings)
    assert len(instructions) == 4320 + 240
    for family, count in zip(families, (80, 20), strict=True):
        drawn_goals, drawn_words = goals[:, family.rows], wordings[:, family.rows] - family.first_instruction
        np.testing.assert_array_equal(drawn_words // family.phrasings, drawn_goals)
        shares = np.bincount(drawn_goals.ravel(), minlength=count) * count / drawn_goals.size
        assert shares.min() > 0.4
        assert shares.max() < 1.9
        assert len(np.unique(drawn_words % family.phrasings)) == family.phrasings


def test_episodes_do_not_depend_on_when_they_are_drawn():
    _, _, one = episodes(["real"], 3)
    _, _, other = episodes(["real"], 3)
    kept = [one.take(np.arange(3)) for _ in range(3 * KEPT)]
    # environment 1 alone runs ahead, then the others follow
    ahead = [other.take(np.array([1])) for _ in range(3 * KEPT)]
    behind = [other.take(np.array([0, 2])) for _ in range(3 * KEPT)]
    for together, middle, outer in zip(kept, ahead, behind, strict=True):
        for column, got, rest in zip(together, middle, outer, strict=True):
            np.testing.assert_array_equal(column[1], got[0])
            np.testing.assert_array_equal(column[[0, 2]], rest)


def test_first_wordings_only():
    for name in FAMILIES:
        families, instructions, drawn = episodes([name], 2, phrasings="first")
        assert len(instructions) == len(families[0].goals.source)
        _, goal, wording = drawn.take(np.arange(2))
        np.testing.assert_array_equal(goal, wording)
