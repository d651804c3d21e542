"""States as numbers, and what is wrong with a prior's answer."""

import math

import pytest
import torch
from torch import nn

from lago_fast.algorithms import text_states
from lago_fast.algorithms.text_states import PADDING, StateReader, prior_answer, rows_of
from lago_fast.envs.text_env import TextState
from lago_fast.errors import NonFiniteError, PriorMismatch, TrainablePrior, UnsupportedArgument
from tests.algorithms.text_fakes import END, RULES, FakeEncoder, FakePrior, state_of


def test_states_are_read_in_their_rows_and_padded():
    encoder = FakeEncoder()
    prior = FakePrior(lambda seen, action: float(len(seen)) if action.startswith("go") else 0.0)
    seen = StateReader(encoder, prior).read(state_of(["cellar", END, "hall"]), [0, 2])
    instruction = "find the treasure"
    assert seen.state[0].tolist() == encoder.ids([instruction, "cellar"]).tolist()
    assert seen.state[2].tolist() == encoder.ids([instruction, "hall"]).tolist()
    assert seen.actions[0].tolist() == [*encoder.ids(list(RULES["cellar"])).tolist(), PADDING]
    assert seen.actions[1].tolist() == [PADDING] * 3
    assert seen.actions[2].tolist() == encoder.ids(list(RULES["hall"])).tolist()
    half = math.log(0.5)
    assert seen.log_prior.tolist()[0] == [-math.inf, 0.0, -math.inf]
    assert seen.log_prior.tolist()[1] == [-math.inf] * 3
    assert seen.log_prior.tolist()[2] == pytest.approx([half, half, -math.inf])


def test_without_a_prior_all_are_equally_likely():
    said = prior_answer(None, rows_of(state_of(["cellar", "hall"]), [0, 1])).exp()
    assert said[0].tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert said[1].tolist() == pytest.approx([1 / 3] * 3)


def test_a_long_query_is_asked_in_parts(monkeypatch):
    prior = FakePrior(lambda seen, action: float(len(seen + action)))
    states = rows_of(state_of(["cellar", "roof", "hall", "tower", "cellar"]), range(5))
    whole = prior_answer(prior, states)
    monkeypatch.setattr(text_states, "ROWS_AT_ONCE", 2)
    assert torch.equal(prior_answer(prior, states), whole)


def test_a_state_without_actions_is_refused_by_its_row():
    with pytest.raises(UnsupportedArgument, match="admissible: row 1 has no action"):
        StateReader(FakeEncoder(), None).read(state_of(["hall", END]), [0, 1])


@pytest.mark.parametrize("answer", [[math.nan, 0.0, 0.0], [-math.inf] * 3])
def test_an_answer_that_cannot_be_used_names_the_observation(answer):
    prior = FakePrior(lambda *_: 1.0)
    prior.query = lambda *_: torch.tensor([answer])
    with pytest.raises(NonFiniteError, match="'hall' is NaN, or excludes every"):
        StateReader(FakeEncoder(), prior).read(state_of(["hall"]), [0])


def test_an_answer_of_another_shape_is_refused():
    prior = FakePrior(lambda *_: 1.0)
    prior.query = lambda *_: torch.zeros(1, 7)
    with pytest.raises(PriorMismatch, match=r"\(1, 7\) about 1 states of at most 3"):
        StateReader(FakeEncoder(), prior).read(state_of(["hall"]), [0])


def test_what_a_prior_says_of_padding_is_not_taken():
    prior = FakePrior(lambda *_: 1.0)
    prior.query = lambda *_: torch.full((2, 3), 1 / 3).log()
    said = prior_answer(prior, rows_of(TextState(["", ""], ["one", "two"], [("a", "b", "c"), ("a",)]), [0, 1]))
    assert said[1].tolist() == [pytest.approx(math.log(1 / 3)), -math.inf, -math.inf]


def test_a_trainable_prior_is_refused():
    with pytest.raises(TrainablePrior, match="requires_grad_"):
        StateReader(FakeEncoder(), FakePrior(lambda *_: 1.0, parameters=[nn.Parameter(torch.zeros(1))]))
