"""Tests of lago_fast.text_lane."""

import math

import numpy as np
import pytest
import torch

from lago_fast.envs.text_env import TextState
from lago_fast.errors import PriorMismatch, TrainablePrior, UnsupportedArgument
from lago_fast.text_lane import NumberedPrior, NumberedTexts, TextLane
from tests.algorithms.text_fakes import FakeEncoder, FakePrior, TableGame, state_of


def query(prior, rows):
    rows = torch.from_numpy(rows)
    return prior.query(rows, torch.zeros(len(rows), dtype=torch.int64)).log_probs.exp()


def test_texts_become_numbers_and_texts_again():
    texts = NumberedTexts(FakeEncoder(), 4)
    state = state_of(["hall", "cellar", ""])
    rows = texts.number(state)
    assert rows.shape == (3, 6)
    assert (rows[:, 2:] >= 0).sum(axis=1).tolist() == [3, 2, 0]
    read = texts.read(torch.from_numpy(rows))
    assert (read.instruction, read.observation, read.admissible) == tuple(map(list, state))


def test_a_text_may_hold_a_line_break():
    texts = NumberedTexts(FakeEncoder(), 2)
    state = TextState(["do this\nand that"], ["here\nand there"], [("go\non",)])
    assert tuple(texts.read(torch.from_numpy(texts.number(state)))) == tuple(map(list, state))


def test_more_actions_than_columns():
    with pytest.raises(UnsupportedArgument, match="max_actions=2: a state has 3"):
        NumberedTexts(FakeEncoder(), 2).number(state_of(["hall"]))
    with pytest.raises(UnsupportedArgument, match="max_actions=0"):
        NumberedTexts(FakeEncoder(), 0)


def test_lane_shows_ends_and_the_rows_after_them():
    lane = TextLane(TableGame(1), NumberedTexts(FakeEncoder(), 3))
    first = lane.reset().observation
    lane.step(np.array([0]))  # to the cellar
    end = lane.step(np.array([0]))  # the box
    assert end.terminated.tolist() == [True]
    assert end.raw_reward == pytest.approx(0.3)
    assert (end.observation[:, 2:] == -1).all()
    after = lane.step(np.array([2]))
    assert after.valid.tolist() == [False]
    assert after.observation.tolist() == first.tolist()


def test_a_seed_decides_the_next_reset_alone():
    starts = ["hall", "tower", "cellar"]

    def first(seed):
        lane = TextLane(TableGame(16, starts=starts), NumberedTexts(FakeEncoder(), 3))
        assert lane.seed(seed) == [seed] * 16
        return lane.reset().observation.tolist(), lane.reset().observation.tolist()

    assert first(1)[0] == first(1)[0]
    assert first(1)[0] != first(2)[0]


def test_describes_a_state():
    lane = TextLane(TableGame(1), NumberedTexts(FakeEncoder(), 3))
    shown = lane.describe_state(lane.reset().observation[0])
    assert "hall" in shown
    assert "go left, go right, wait" in shown


def test_floor_by_hand():
    texts = NumberedTexts(FakeEncoder(), 4)
    rows = texts.number(state_of(["hall", "cellar"]))
    prior = FakePrior(lambda _, action: {"go left": 3.0, "wait": 1.0}.get(action, 0.0) + (action == "go back"))
    # hall: left 3/4, right 0, wait 1/4; cellar: box 0, back 1
    said = query(NumberedPrior(prior, texts, floor=0.1), rows)
    hall = [0.9 * 0.75 + 0.1 / 3, 0.1 / 3, 0.9 * 0.25 + 0.1 / 3, 0]
    assert said.tolist() == [pytest.approx(hall), pytest.approx([0.05, 0.95, 0, 0])]
    bare = query(NumberedPrior(prior, texts, floor=0.0), rows)
    assert bare[0].tolist() == pytest.approx([0.75, 0, 0.25, 0])


def test_floor_bounds_the_divergence():
    texts = NumberedTexts(FakeEncoder(), 3)
    rows = texts.number(state_of(["hall"]))
    prior = FakePrior(lambda _, action: float(action == "wait"))
    said = query(NumberedPrior(prior, texts, floor=0.01), rows)
    assert float(-said.log().min()) == pytest.approx(math.log(3 / 0.01), rel=1e-5)


def test_an_ended_row_is_not_asked_about():
    texts = NumberedTexts(FakeEncoder(), 3)
    prior = FakePrior(lambda *_: 1.0)
    said = query(NumberedPrior(prior, texts), texts.number(state_of(["", "hall"])))
    assert prior.queries == 1
    assert said[0].tolist() == [1, 0, 0]
    said = query(NumberedPrior(prior, texts), texts.number(state_of([""])))
    assert prior.queries == 1
    assert said.tolist() == [[1, 0, 0]]


def test_digest_follows_prior_and_floor():
    texts = NumberedTexts(FakeEncoder(), 3)
    digests = {
        NumberedPrior(FakePrior(lambda *_: 1.0, salt), texts, floor).digest
        for salt in ("a", "b")
        for floor in (0.01, 0.02)
    }
    assert len(digests) == 4


def test_refusals():
    texts = NumberedTexts(FakeEncoder(), 3)
    for floor in (-0.1, 1.0):
        with pytest.raises(UnsupportedArgument, match="prior_floor"):
            NumberedPrior(FakePrior(lambda *_: 1.0), texts, floor)
    with pytest.raises(TrainablePrior):
        NumberedPrior(FakePrior(lambda *_: 1.0, parameters=[torch.nn.Parameter(torch.ones(1))]), texts)
    with pytest.raises(PriorMismatch, match="NumberedTexts"):
        texts.read(torch.tensor([[7, 8, -1, -1]]))
