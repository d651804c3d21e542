"""What policies see of the instructions, and which words a demonstrated row gets."""

import numpy as np

from lago_fast.demos import Demonstrations
from lago_fast.envs.metaworld import task_phrasings
from lago_fast.presets import EnvSettings, Experiment
from lago_fast.stage_one import compact_table, instructions_of, paraphrase


def distances(rows):
    return np.linalg.norm(rows[:, None] - rows[None], axis=-1)


def test_the_compact_table_keeps_every_distance_up_to_one_factor():
    latents = np.random.default_rng(0).normal(size=(6, 40))
    table = compact_table(latents)
    assert table.shape == (6, 5)
    before, after = distances(latents), distances(table)
    off = ~np.eye(6, dtype=bool)
    ratio = after[off] / before[off]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(table, axis=1).mean(), 1.0, rtol=1e-5)


def test_a_row_gets_the_words_of_its_own_task():
    experiment = Experiment(env=EnvSettings(tasks=("push", "reach"), num_envs=2))
    instructions = instructions_of(experiment)
    n = 200
    task_id = np.repeat([0, 1], n // 2)
    demos = Demonstrations(
        np.zeros((n, 39), np.float32),
        np.zeros((n, 4), np.float32),
        np.zeros(n, np.int64),
        ["x"],
        task_id,
        task_id,
        ["reach", "push"],  # in another order than the experiment's
        np.ones(2, bool),
        -np.ones(4, np.float32),
        np.ones(4, np.float32),
    )
    texts = [instructions[i] for i in paraphrase(demos, instructions, seed=0)]
    assert set(texts[: n // 2]) == set(task_phrasings()["reach"])
    assert set(texts[n // 2 :]) == set(task_phrasings()["push"])
