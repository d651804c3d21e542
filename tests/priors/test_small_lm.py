"""A model trained here: it learns its walkthroughs, is loaded as any checkpoint, and says what it is."""

import json
import math

import numpy as np
import pytest
import torch

from lago_fast.errors import DemonstrationError, NonFiniteError, RunExists, UnsupportedArgument
from lago_fast.priors.causal_lm import find_causal_lm
from lago_fast.priors.generate_prior import GeneratePrior
from lago_fast.priors.prompt import Prompt
from lago_fast.priors.score_prior import ScorePrior
from lago_fast.priors.small_lm import main, train_small_lm
from lago_fast.priors.walkthroughs import Steps, first_episodes, read_steps

WAYS = {"the kitchen": "go north", "the hall": "open the door", "the cellar": "climb up"}
ACTIONS = tuple(WAYS.values())
SMALL = {"hidden": 32, "layers": 1, "heads": 2, "vocabulary": 300, "context": 128, "max_seconds": None}


@pytest.fixture(scope="module")
def steps():
    """Return four walks through three rooms, each of which has its own way out."""
    rooms = list(WAYS) * 4
    choice = [ACTIONS.index(WAYS[room]) for room in rooms]
    return Steps(["leave"] * 12, rooms, [ACTIONS] * 12, choice, np.arange(12) // 3)


@pytest.fixture(scope="module")
def trained(steps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "llama"
    return folder, train_small_lm(steps, folder, epochs=60, batch_size=6, lr=1e-2, **SMALL)


def test_it_learns_its_walkthroughs_and_is_loaded_as_any_checkpoint(trained):
    folder, about = trained
    lm = find_causal_lm(str(folder))
    assert lm.about == about
    assert (about["trained_by"], about["walkthroughs"], about["steps"]) == ("lago_fast.priors.small_lm", 4, 12)
    assert (lm.max_tokens, lm.model.config.model_type) == (128, "llama")
    states = ["leave"] * 3, list(WAYS), [ACTIONS] * 3
    for prior in (ScorePrior(lm), GeneratePrior(lm, 8, rule="strict")):
        found = prior.query(*states)
        assert found.argmax(dim=1).tolist() == [0, 1, 2]
        assert float(found.max(dim=1).values.exp().min()) > 0.5


def test_the_tokenizer_gives_every_text_back(trained):
    tokenizer = find_causal_lm(str(trained[0])).tokenizer
    text = "You öpen {the} door\n  slowly"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_seed_trains_the_same_weights(steps, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(1)
        train_small_lm(steps, tmp_path / name, architecture="gpt2", epochs=2, seed=seed, **SMALL)
    a, b, c = (find_causal_lm(str(tmp_path / name)) for name in "abc")
    assert a.model.config.model_type == "gpt2"
    assert a.sha256 == b.sha256 != c.sha256
    assert ScorePrior(a).query(["leave"], ["the hall"], [ACTIONS]).shape == (1, 3)


def test_training_ends_with_its_time(steps, tmp_path):
    assert train_small_lm(steps, tmp_path / "a", **{**SMALL, "max_seconds": 1e-9})["updates"] == 1


def test_it_is_trained_as_typed(steps, tmp_path, monkeypatch, capsys):
    rows = zip(*steps._replace(episode_id=steps.episode_id.tolist()), strict=True)
    lines = [json.dumps(dict(zip(Steps._fields, row, strict=True))) for row in rows]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines))
    typed = [str(tmp_path / "steps.jsonl"), str(tmp_path / "out"), "--walkthroughs", "2", "--max-seconds", "0.01"]
    monkeypatch.setattr("sys.argv", ["small_lm", *typed])
    main()
    assert json.loads(capsys.readouterr().out)["walkthroughs"] == 2
    assert find_causal_lm(str(tmp_path / "out")).about["steps"] == 6


def test_steps_are_read_from_lines_of_json(steps, tmp_path):
    rows = zip(*steps._replace(episode_id=steps.episode_id.tolist()), strict=True)
    lines = [json.dumps(dict(zip(Steps._fields, row, strict=True))) for row in rows]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    few = first_episodes(read_steps(tmp_path / "steps.jsonl"), 2)
    assert few.observation == list(WAYS) * 2
    assert few.choice.tolist() == [0, 1, 2, 0, 1, 2]
    (tmp_path / "steps.jsonl").write_text('{"instruction": "leave"}\n')
    for path in ("steps.jsonl", "nowhere.jsonl"):
        with pytest.raises(DemonstrationError, match="cannot be read"):
            read_steps(tmp_path / path)
    with pytest.raises(UnsupportedArgument, match="count: 0"):
        first_episodes(steps, 0)


def test_what_cannot_be_trained_is_refused(steps, trained, tmp_path):
    with pytest.raises(RunExists):
        train_small_lm(steps, trained[0])
    with pytest.raises(UnsupportedArgument, match="multiple of twice the heads"):
        train_small_lm(steps, tmp_path / "a", hidden=30, heads=4)
    with pytest.raises(UnsupportedArgument, match="architecture"):
        train_small_lm(steps, tmp_path / "a", architecture="bert")
    with pytest.raises(UnsupportedArgument, match="more than the 16"):
        train_small_lm(steps, tmp_path / "a", prompt=Prompt(), **{**SMALL, "context": 16})
    with pytest.raises(DemonstrationError, match="choice 3 in row 0"):
        train_small_lm(steps._replace(choice=[3] * 12), tmp_path / "a")
    with pytest.raises(UnsupportedArgument, match="label_smoothing nan"):
        train_small_lm(steps, tmp_path / "a", label_smoothing=math.nan)
    with pytest.raises(UnsupportedArgument, match="seed=-1"):
        train_small_lm(steps, tmp_path / "a", seed=-1)
    with pytest.raises(NonFiniteError, match="nothing was written: lower lr"):
        train_small_lm(steps, tmp_path / "a", **{**SMALL, "lr": 1e30})
    assert not (tmp_path / "a").exists()
