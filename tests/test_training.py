"""A training run on Meta-World that is stopped and resumed, with and without a prior, is one that was not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stable_baselines3.common.logger import configure

from lago_fast import FastKLPPO, runs
from lago_fast.algorithms.checkpoint import paths_in
from lago_fast.algorithms.stage_clock import STAGES
from lago_fast.errors import NoCheckpoint, UnsupportedArgument
from lago_fast.presets import PRESETS
from lago_fast.priors.amortised import AmortisedPrior, StudentConfig
from lago_fast.priors.finetune import fit_prior
from lago_fast.stage_one import compact_table, instructions_of
from lago_fast.training import WINDOW, SuccessCurve, train_run

pytest.importorskip("envpool", reason="Meta-World needs the extra 'envs'")
pytest.importorskip("transformers", reason="stage 1 needs the extra 'llm'")

BASE = PRESETS["demo"]
TOY = replace(
    BASE,
    env=replace(BASE.env, tasks=("reach", "push"), num_envs=4, max_episode_steps=20),
    train=replace(BASE.train, steps_per_task=300, n_steps=32, batch_size=64, n_epochs=2, guard=False),
)
STUDENT = StudentConfig(hidden=8, audit_rows=32, audit_window=128, audit_batch=8, refresh_steps=4, refresh_rows=32)


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory):
    """A student of a prior that was hardly fitted: it learns while the policy does."""
    from transformers import BertConfig

    from tests.priors.conftest import WORDS, write_backbone

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    folder = tmp_path_factory.mktemp("backbone")
    backbone = write_backbone(folder, BertConfig(vocab_size=len(WORDS) + 1, max_position_embeddings=64, **sizes))
    rng = np.random.default_rng(0)
    states = rng.normal(size=(64, 39)).astype(np.float32)
    actions = np.tanh(states[:, :4])
    texts = instructions_of(TOY)
    ids = rng.integers(len(texts), size=64)
    # every text of the vocabulary's one unknown word has the same latent, which is as good here
    exact = fit_prior(states, actions, ids, np.arange(64) // 8, texts, backbone=str(backbone), epochs=1)
    student = AmortisedPrior(exact, STUDENT).fit(states, ids, epochs=1, noisy_copies=0)
    return student.save(tmp_path_factory.mktemp("student") / "student"), compact_table_of(exact)


def compact_table_of(exact):
    table = exact.instruction_table().numpy()
    return compact_table(table + 0.1 * np.random.default_rng(1).normal(size=table.shape).astype(np.float32))


def trained(arm, folder, prior_folder, **options):
    student, table = prior_folder
    folder.mkdir(exist_ok=True)
    prior = AmortisedPrior.load(student) if arm == "lago" else None
    return train_run(arm, 5, TOY, folder=folder, table=table, prior=prior, num_threads=1, **options)


def columns(folder):
    return np.genfromtxt(folder / "progress.csv", delimiter=",", names=True)


class Stop(Exception):
    pass


@pytest.mark.parametrize("arm", ["ppo", "lago"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(arm, prior_folder, tmp_path):
    assert torch.get_num_threads() == 1
    reference = trained(arm, tmp_path / "whole", prior_folder, checkpoint_every=1, restart_at=(3,))

    def stop(done, total):
        del total
        if done > 4 * TOY.env.num_envs * 32 * 0.9:  # in the fourth iteration or after it
            raise Stop

    with pytest.raises(Stop):
        trained(arm, tmp_path / "cut", prior_folder, checkpoint_every=3, progress=stop)
    assert [path.stem[-1] for path in paths_in(tmp_path / "cut" / "checkpoints")] == ["0", "3"]
    resumed = trained(arm, tmp_path / "cut", prior_folder, checkpoint_every=1, resume=True)

    for name, tensor in reference.model.policy.state_dict().items():
        assert torch.equal(resumed.model.policy.state_dict()[name], tensor), name
    assert runs.read_json(tmp_path / "cut" / "curve.json") == runs.read_json(tmp_path / "whole" / "curve.json")
    got, expected = columns(tmp_path / "cut"), columns(tmp_path / "whole")
    assert set(got.dtype.names) == set(expected.dtype.names)
    clocks = {"timefps", "timetime_elapsed", *(f"time{stage}_s" for stage in STAGES)}
    for name in set(expected.dtype.names) - clocks:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    if arm == "lago":
        assert got["priorstudent_refits"].sum() > 0
        last = [load_file(paths_in(tmp_path / name / "checkpoints")[-1]) for name in ("cut", "whole")]
        assert last[0].keys() == last[1].keys()
        for name, tensor in last[1].items():
            assert torch.equal(last[0][name], tensor), name


def test_what_cannot_be_resumed_is_refused(prior_folder, tmp_path):
    with pytest.raises(NoCheckpoint, match="no checkpoint"):
        trained("ppo", tmp_path, prior_folder, resume=True)
    trained("ppo", tmp_path, prior_folder)
    with pytest.raises(UnsupportedArgument, match="nothing is left"):
        trained("ppo", tmp_path, prior_folder, resume=True)
    assert Path(tmp_path / "model.zip").is_file()


def test_the_first_episodes_to_end_are_no_success_yet(tmp_path):
    model = FastKLPPO("MlpPolicy", "CartPole-v1", device="cpu")
    model.set_logger(configure(str(tmp_path), []))
    curve = SuccessCurve(["a"], np.zeros(1, dtype=np.int64), whole=100)
    curve.init_callback(model)
    curve.recent[0].extend([True] * WINDOW)

    def end_rollout(at):
        curve.num_timesteps = at
        curve._on_rollout_end()
        return curve.steps_to_90["a"]

    assert end_rollout(80) is None
    model.envs_anew_at = 90  # the guard's prior has played
    assert end_rollout(150) is None
    assert curve.settled_from == 190
    again = SuccessCurve(["a"], np.zeros(1, dtype=np.int64))
    again.take_back(curve.kept())
    assert again.settled_from == 190
    assert end_rollout(200) == 200
