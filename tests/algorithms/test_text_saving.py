"""A saved learner is the same after loading, and is refused with another prior, encoder or file."""

import random
import tempfile
from pathlib import Path

import pytest
import torch

from lago_fast.algorithms.checkpoint import read_tensors, write_tensors
from lago_fast.algorithms.cql_prior import CQLPrior
from lago_fast.algorithms.dqn_prior import DQNPrior
from lago_fast.errors import (
    CorruptFile,
    EncoderMismatch,
    HashMismatch,
    LagoError,
    NoCheckpoint,
    PriorMismatch,
    UnsupportedArgument,
)
from tests.algorithms.test_cql_prior import EVERYTHING
from tests.algorithms.test_safe_load import little_memory, mutate
from tests.algorithms.text_fakes import UNIFORM, FakeEncoder, FakePrior, TableGame, state_of
from tests.priors.test_folder import changed_leaf

STATE = state_of(["hall", "roof", "tower"])


@pytest.fixture(scope="module")
def learnt():
    arguments = {"seed": 0, "learning_starts": 10, "train_freq": (1, "step"), "net_arch": (16, 8), "k": None}
    return DQNPrior(TableGame(2), UNIFORM, FakeEncoder(), **arguments).learn(60)


def test_a_loaded_model_says_and_learns_the_same(learnt, tmp_path):
    learnt.save(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = DQNPrior.load(tmp_path / "model", learnt.encoder, prior=UNIFORM)
    assert torch.equal(loaded.q_values(STATE), learnt.q_values(STATE))
    assert (loaded.num_timesteps, loaded.n_updates) == (learnt.num_timesteps, learnt.n_updates)
    assert loaded.arguments == {**learnt.arguments, "train_freq": [1, "step"]}
    batch = learnt.replay_buffer.sample(16)
    kept = [p.clone() for p in (*learnt.network.parameters(), *learnt.target.parameters())]
    moved = []
    for model in (learnt, loaded):
        model.gradient_step(batch)
        moved.append([p.detach().clone() for p in (*model.network.parameters(), *model.target.parameters())])
    for before, one, other in zip(kept, *moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert not torch.equal(before, one)


def test_a_loaded_model_goes_on_learning_and_predicts_without_an_env(learnt, tmp_path):
    learnt.save(tmp_path / "model.safetensors")
    loaded = DQNPrior.load(tmp_path / "model.safetensors", FakeEncoder(), prior=UNIFORM, env=TableGame(2))
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps >= learnt.num_timesteps + 20
    alone = DQNPrior.load(tmp_path / "model", FakeEncoder(), prior=UNIFORM)
    assert len(alone.predict(STATE)[0]) == 3


def test_an_offline_learner_too(tmp_path):
    model = CQLPrior(EVERYTHING, None, FakeEncoder(), seed=0, cql_coef=0.5).learn(20)
    model.save(tmp_path / "cql")
    loaded = CQLPrior.load(tmp_path / "cql", FakeEncoder(), transitions=EVERYTHING)
    assert torch.equal(loaded.q_values(STATE), model.q_values(STATE))
    assert loaded.cql_coef == 0.5
    assert loaded.learn(3, reset_num_timesteps=False).n_updates == 23


def test_another_prior_or_encoder_is_refused(learnt, tmp_path):
    path = tmp_path / "model"
    learnt.save(path)
    with pytest.raises(EncoderMismatch, match="encoder other"):
        DQNPrior.load(path, FakeEncoder("other"), prior=UNIFORM)
    for prior in (None, FakePrior(lambda *_: 1.0, "other")):
        with pytest.raises(PriorMismatch, match="prior uniform and got"):
            DQNPrior.load(path, FakeEncoder(), prior=prior)
    with pytest.raises(UnsupportedArgument, match=r"holds a DQNPrior; load it with DQNPrior\.load"):
        CQLPrior.load(path, FakeEncoder(), prior=UNIFORM)


def test_a_file_that_is_no_model_is_refused(learnt, tmp_path):
    with pytest.raises(NoCheckpoint):
        DQNPrior.load(tmp_path / "nowhere", FakeEncoder(), prior=UNIFORM)
    learnt.save(tmp_path / "model")
    kept = read_tensors(tmp_path / "model.safetensors")

    def changed(tensors=(), **figures):
        write_tensors(tmp_path / "other.safetensors", {**kept.tensors, **dict(tensors)}, {**kept.figures, **figures})
        return DQNPrior.load(tmp_path / "other", FakeEncoder(), prior=UNIFORM)

    write_tensors(tmp_path / "other.safetensors", {}, {"class": "DQNPrior"})
    with pytest.raises(CorruptFile, match="holds no model"):
        DQNPrior.load(tmp_path / "other", FakeEncoder(), prior=UNIFORM)
    with pytest.raises(CorruptFile, match="lacks something"):
        changed({"network.state.weight": torch.zeros(3, 3)})
    with pytest.raises(CorruptFile, match="lacks something"):
        changed({"optimizer.0.exp_avg": torch.zeros(5)})
    with pytest.raises(CorruptFile, match="lacks something"):
        changed(n_updates=None)
    for arguments in ({"colour": 1}, {"net_arch": "wide"}, {"gamma": "much"}):
        with pytest.raises(CorruptFile, match="arguments"):
            changed(arguments={**kept.figures["arguments"], **arguments})


def test_every_altered_byte_is_found(learnt, tmp_path):
    learnt.save(tmp_path / "model")
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(HashMismatch):
        DQNPrior.load(path, FakeEncoder(), prior=UNIFORM)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFile):
        DQNPrior.load(path, FakeEncoder(), prior=UNIFORM)


def damaged(content, kept, rng):
    """Return a file that is damaged, or one with whole checksums, by somebody who means it: other figures or shapes."""
    if rng.random() < 0.4:
        return mutate(content, rng)
    tensors, figures = dict(kept.tensors), kept.figures
    if rng.random() < 0.7:
        figures = changed_leaf(figures, rng)
    else:
        name = rng.choice(sorted(tensors))
        tensors[name] = rng.choice([torch.zeros(3), tensors[name].reshape(-1)[:1], tensors[name].int()])
        if rng.random() < 0.3:
            del tensors[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.safetensors"
        write_tensors(path, tensors, figures)
        return path.read_bytes()


@pytest.mark.parametrize("name", ["DQNPrior", "CQLPrior"])
def test_mutated_learners_are_loaded_or_refused_by_a_typed_error(learnt, name, tmp_path, request):
    model = learnt if name == "DQNPrior" else CQLPrior(EVERYTHING, UNIFORM, FakeEncoder(), net_arch=(8,)).learn(5)
    model.save(tmp_path / "whole")
    path = tmp_path / "whole.safetensors"
    content, kept, rng = path.read_bytes(), read_tensors(path), random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    with little_memory():
        for _ in range(request.config.getoption("--mutations")):
            path.write_bytes(damaged(content, kept, rng))
            try:
                loaded = type(model).load(path, FakeEncoder(), prior=UNIFORM)
                outcomes["read"] += 1
            except LagoError:
                outcomes["refused"] += 1
            else:
                assert loaded.q_values(STATE).shape == (3, 3)
    assert min(outcomes.values()) > 0
