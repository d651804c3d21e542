"""What policies see of the instructions, and which words a demonstrated row gets."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lago_fast import stage_one
from lago_fast.demos import Demonstrations
from lago_fast.envs.clevr_language import family_instructions
from lago_fast.envs.metaworld_tasks import task_phrasings
from lago_fast.envs.suites import suite_named
from lago_fast.errors import DemonstrationError, UnsupportedArgument
from lago_fast.evaluate import rows_for
from lago_fast.presets import EnvSettings, Experiment, PriorSettings
from lago_fast.priors.base import PriorOutput
from lago_fast.stage_one import (
    StageOne,
    amortise,
    compact_table,
    instructions_of,
    paraphrase,
    paraphrases,
    policy_table,
)


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


def test_other_wordings_are_put_into_the_space_of_those_of_training():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 40)) * [[3.0], [1.0], [0.1]]
    first, others = rng.normal(size=(30, 3)) @ mixing, rng.normal(size=(5, 3)) @ mixing
    table = compact_table(np.concatenate([first, others]), fitted=30)
    # what lies in the span of the first keeps its distances too, and the first are seen as without the others
    assert table.shape == (35, 3)
    np.testing.assert_allclose(table[:30], compact_table(first), atol=1e-5)
    off = ~np.eye(35, dtype=bool)
    ratio = distances(table)[off] / distances(np.concatenate([first, others]))[off]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    # the smallest direction explains about a thousandth
    assert compact_table(np.concatenate([first, others]), fitted=30, explained=0.99).shape == (35, 2)
    np.testing.assert_array_equal(compact_table(first, explained=1.0), compact_table(first))


def test_policies_of_one_goal_see_no_words_and_evaluation_adds_rows():
    one = EnvSettings(tasks=("push",), num_envs=2)
    assert policy_table(np.ones((3, 4)), one) is None
    clevr = EnvSettings(env="clevr-robot", tasks=("easy",), eval_tasks=("line",), num_envs=2)
    texts = instructions_of(Experiment(env=clevr))
    assert texts[:240] == family_instructions("easy")
    assert texts[240:] == family_instructions("line")
    latents = np.random.default_rng(0).normal(size=(250, 6))
    table = policy_table(latents, clevr)
    assert table.shape == (250, 6)
    env = suite_named("clevr-robot").make(["line"], 1, seed=0)
    np.testing.assert_array_equal(rows_for(clevr, env.instructions, table), table[240:])
    with pytest.raises(UnsupportedArgument, match="was never computed"):
        rows_for(clevr, family_instructions("gather"), table)


def test_a_row_gets_the_words_of_its_own_goal():
    suite = suite_named("clevr-robot")
    goals = suite.goals("real")
    shown = [goals[7][3], goals[50][0]]
    n = 300
    demos = Demonstrations(
        np.zeros((n, 10), np.float32),
        np.zeros(n, np.int64),
        np.arange(n) % 2,
        shown,
        np.arange(n),
        np.zeros(n, np.int64),
        ["real"],
        np.ones(n, bool),
        np.zeros(0, np.float32),
        np.zeros(0, np.float32),
        40,
    )
    instructions = suite.texts(["easy", "real"])
    texts = [instructions[i] for i in paraphrase(demos, instructions, seed=0, suite=suite)]
    assert set(texts[::2]) <= set(goals[7])
    assert set(texts[1::2]) <= set(goals[50])
    assert len(set(texts[::2])) > 40
    several = paraphrases(demos, instructions, seed=0, count=3, suite=suite)
    for k in range(3):
        np.testing.assert_array_equal(several[:, k], paraphrase(demos, instructions, seed=k, suite=suite))
    assert not np.array_equal(several[:, 0], several[:, 1])
    with pytest.raises(DemonstrationError, match="'do it' is no wording"):
        paraphrase(demos._replace(instructions=["do it", shown[1]]), instructions, seed=0, suite=suite)


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


class Elsewhere:
    """What lies on a device whose numbers have to be fetched: all of it zero."""

    def __init__(self, shape):
        self.shape = shape

    def cpu(self):
        return torch.zeros(self.shape)


class StudentElsewhere:
    """A student on a device other than the CPU, for which "meta" stands; it keeps what it is fitted to."""

    device = torch.device("meta")

    def __init__(self, exact, *_):
        self.instructions, self.fits = exact.instructions, []
        self.exact = SimpleNamespace(bounded=lambda answer: answer)

    def fit(self, states, instruction_id, *, episode_id, **_):
        assert {column.device.type for column in (states, instruction_id, episode_id)} == {"cpu"}
        self.fits.append((states, episode_id))

    def __call__(self, state, instruction_id):
        assert state.device == instruction_id.device == self.device
        return PriorOutput(mean=Elsewhere((len(state), 4)))


def test_a_student_on_a_device_plays_other_episodes_at_every_level_of_noise(monkeypatch):
    env = EnvSettings(tasks=("reach",), num_envs=2, max_episode_steps=3)
    texts = suite_named("metaworld").texts(["reach"])
    demos = Demonstrations(
        np.zeros((4, 39), np.float32),
        np.zeros((4, 4), np.float32),
        np.zeros(4, np.int64),
        texts[:1],
        np.array([0, 0, 1, 1]),
        np.zeros(4, np.int64),
        ["reach"],
        np.ones(2, bool),
        -np.ones(4, np.float32),
        np.ones(4, np.float32),
    )
    monkeypatch.setattr(stage_one, "AmortisedPrior", StudentElsewhere)
    stage = StageOne(demos, SimpleNamespace(instructions=texts), texts, None)
    experiment = Experiment(env=env, prior=replace(PriorSettings(), rollout_noise=(0.0, 0.0)))
    found = {}
    for seed in (0, 1):
        (first, _), (states, episodes) = amortise(stage, experiment, seed).fits
        assert torch.equal(first, states[:4])
        # of each level two of three steps in both envs, each an episode of its own
        assert episodes.tolist() == [0, 0, 1, 1, 2, 3, 2, 3, 4, 5, 4, 5]
        found |= {(seed, level): states[4 + 4 * level :][:2] for level in (0, 1)}
    starts = {tuple(start) for pair in found.values() for start in pair.tolist()}
    assert len(starts) == 8, "levels and seeds start from states of their own"
