"""A student that is taken back answers, is audited and learns as the one that was not stopped."""

import copy
import json

import pytest
import torch

from lago_fast.errors import PriorMismatch
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.base import LearningPrior
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.memory import Memory
from lago_fast.priors.student import StudentConfig

SMALL = StudentConfig(
    hidden=16, instruction_width=8, audit_rows=64, audit_window=1024, refresh_rows=64, refresh_steps=5, live_rows=200
)


@pytest.fixture(scope="module")
def exact(encoder, clones, texts):
    return fit_prior(*clones, texts, backbone=encoder, epochs=1, batch_size=64)


@pytest.fixture(scope="module")
def fitted(exact, clones):
    return AmortisedPrior(exact, SMALL).fit(clones.states, clones.instruction_id, epochs=1, noisy_copies=1)


def far_off(clones, i):
    rows = slice(100 * i, 100 * i + 100)
    return clones.states[rows] + 4.0, clones.instruction_id[rows]


def test_it_goes_on_bit_for_bit(exact, fitted, clones):
    student = copy.deepcopy(fitted)
    assert isinstance(student, LearningPrior)
    for i in range(3):
        student.query(*far_off(clones, i))
    tensors, figures = student.learnt()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again = AmortisedPrior(exact, SMALL)
    again.take_back(tensors, json.loads(json.dumps(figures)))
    for i in (3, 4, 5, 0):
        expected, got = (prior.query(*far_off(clones, i)) for prior in (student, again))
        assert torch.equal(got.mean, expected.mean)
        assert torch.equal(got.log_std, expected.log_std)
        assert again.telemetry() == student.telemetry()
    assert again.live.rows == student.live.rows == 200
    assert student.audit_kl_nats == again.audit_kl_nats > 0


def test_one_that_has_not_learnt_yet_is_taken_back_too(exact, fitted, clones):
    tensors, figures = fitted.learnt()
    again = AmortisedPrior(exact, SMALL)
    again.take_back(tensors, figures)
    assert again._optimiser is None
    assert torch.equal(copy.deepcopy(fitted).query(*far_off(clones, 0)).mean, again.query(*far_off(clones, 0)).mean)


def test_another_students_state_is_refused(exact, fitted):
    other = AmortisedPrior(exact, StudentConfig(hidden=8))
    with pytest.raises(PriorMismatch, match="digest"):
        other.take_back(*fitted.learnt())
    tensors, figures = fitted.learnt()
    with pytest.raises(PriorMismatch, match="another shape"):
        AmortisedPrior(exact, SMALL).take_back({**tensors, "student.instruction.bias": torch.zeros(3)}, figures)


def test_a_memory_comes_back_as_it_lay():
    memory = Memory(3)
    answers = torch.arange(5.0)[:, None]
    from lago_fast.priors.base import PriorOutput

    memory.add(answers[:4], torch.arange(4), PriorOutput(mean=answers[:4], log_std=answers[:4]))
    memory.add(answers[4:], torch.tensor([4]), PriorOutput(mean=answers[4:], log_std=answers[4:]))
    again = Memory.from_raw("m", memory.raw("m"), 3, memory.place, torch.device("cpu"))
    assert torch.equal(again.state, memory.state)
    assert (again.rows, again.place) == (memory.rows, memory.place)
    empty = Memory.from_raw("m", Memory(3).raw("m"), 3, 0, torch.device("cpu"))
    assert (empty.rows, empty.capacity) == (0, 3)
