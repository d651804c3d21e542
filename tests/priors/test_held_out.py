"""What one fit held out is never taught by a later one, and what was taught is never held out."""

import pytest
import torch

from lago_fast.errors import DemonstrationError
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.held_out import HeldOut
from lago_fast.priors.student import StudentConfig

SMALL = StudentConfig(hidden=16, instruction_width=4, live_rows=64, audit_rows=32, audit_window=64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def choose(split, unit, fraction, draw):
    return split.split(unit, len(unit), fraction, draw)


@pytest.mark.parametrize("seed", range(5))
def test_later_fits_keep_to_the_choice_and_draw_from_what_is_new_alone(seed):
    split, draw = HeldOut(), generator(seed)
    first = torch.arange(20).repeat_interleave(3)
    out = choose(split, first, 0.1, draw)
    assert out.sum() == 6
    assert torch.equal(choose(split, first, 0.1, draw), out), "with nothing new, nothing changes"
    more = torch.cat([first, torch.arange(20, 50)])
    again = choose(split, more, 0.1, draw)
    assert torch.equal(again[:60], out)
    assert again[60:].sum() == 3


def test_a_first_choice_is_the_share_of_units_that_was_asked_for():
    for units, fraction, expected in ((2, 0.1, 1), (9, 0.1, 1), (40, 0.25, 10), (2, 0.99, 1)):
        out = HeldOut().split(None, units, fraction, generator())
        assert out.sum() == expected


def test_nothing_left_to_hold_out_or_to_teach_is_an_error():
    split = HeldOut()
    out = choose(split, torch.arange(10), 0.2, generator())
    with pytest.raises(DemonstrationError, match="taught all 8 of these units, which leaves none to hold out"):
        choose(split, torch.arange(10)[~out], 0.2, generator())
    with pytest.raises(DemonstrationError, match="held out all 2 of these units, which leaves none to teach"):
        choose(split, torch.arange(10)[out], 0.2, generator())
    # one that is new can be held out, or taught
    assert choose(split, torch.cat([torch.arange(10)[~out], torch.tensor([10])]), 0.2, generator())[-1]
    assert not choose(split, torch.cat([torch.arange(10)[out], torch.tensor([11])]), 0.2, generator())[-1]


def rows_of(memory):
    return {tuple(row) for row in memory.state.tolist()}


def test_a_student_that_is_fitted_again_was_never_taught_what_it_is_measured_on(encoder, clones, texts, tmp_path):
    exact = fit_prior(*clones, texts, backbone=encoder, epochs=1)
    student, given = AmortisedPrior(exact, SMALL), {"epochs": 1, "noisy_copies": 0}
    student.fit(clones.states, clones.instruction_id, episode_id=clones.episode_id, **given)
    taught = rows_of(student.taught)
    more = clones.states + 0.5, clones.instruction_id, clones.episode_id + 40
    states, ids, episodes = (
        torch.cat(both) for both in zip((clones.states, clones.instruction_id, clones.episode_id), more, strict=True)
    )
    student = AmortisedPrior.load(student.save(tmp_path / "student"))
    student.fit(states, ids, episode_id=episodes, **given)
    held_out = {tuple(row) for row in states.tolist()} - rows_of(student.taught)
    assert len(held_out) == student.metrics["rows_heldout"] == 2 * 80
    assert not held_out & taught
