"""Cached answers over texts: hit equals miss bit for bit, each question once, any number of actions, in a file."""

import pytest
import torch
from torch import nn

from lago_fast.errors import CacheMismatch, TrainablePrior, UnsupportedArgument
from lago_fast.priors.cache import CacheConfig
from lago_fast.priors.cached_text_prior import CachedTextPrior
from lago_fast.priors.text_base import TextActionPrior, padding_mask

EXACT = CacheConfig(budget_bytes=1 << 20, row_format="float32")


class Counting:
    """A prior whose answers are another draw each time, so that a second asking shows."""

    def __init__(self, digest="a"):
        self.digest, self.asked, self.trainable = digest, [], False
        self.generator = torch.Generator().manual_seed(0)

    def query(self, instruction, observation, admissible):
        assert len(instruction) == len(observation)
        self.asked.append(len(instruction))
        mask = padding_mask(admissible)
        scores = torch.randn(mask.shape, generator=self.generator).masked_fill(~mask, -torch.inf)
        scores[:, 1:2] = -torch.inf  # excluded, not padded
        return scores.log_softmax(dim=1)

    def telemetry(self):
        return {"prior/lm_queries": float(sum(self.asked))}

    def parameters(self):
        return [nn.Parameter(torch.zeros(1), requires_grad=self.trainable)]


def questions(*sizes):
    """Return states with so many actions."""
    actions = [tuple(f"take {i}" for i in range(size)) for size in sizes]
    return ["win"] * len(sizes), [f"room {size}" for size in sizes], actions


def test_it_keeps_the_contract():
    prior = CachedTextPrior(Counting(), EXACT)
    assert isinstance(prior, TextActionPrior)
    assert prior.digest == "a"
    assert not any(p.requires_grad for p in prior.parameters())


def test_a_hit_is_the_miss_bit_for_bit():
    inner = Counting()
    prior = CachedTextPrior(inner, EXACT)
    asked = questions(3, 1, 16, 17, 40)
    first = prior.query(*asked)
    assert first.shape == (5, 40)
    torch.testing.assert_close(first.exp().sum(dim=1), torch.ones(5))
    assert torch.equal(first.isneginf()[:, 0], torch.zeros(5, dtype=torch.bool))
    assert torch.equal(prior.query(*asked), first)
    back = prior.query(*(column[::-1] for column in asked))
    assert torch.equal(back, first.flip(0))
    for row in range(5):
        alone = prior.query(*(column[row : row + 1] for column in asked))
        assert torch.equal(alone[0], first[row, : len(asked[2][row])])
    assert inner.asked == [5]


def test_of_questions_alike_one_is_asked():
    inner = Counting()
    prior = CachedTextPrior(inner, EXACT)
    prior.query(*questions(20))
    found = prior.query(*questions(20, 33, 4, 33, 20, 4))
    assert inner.asked == [1, 2]
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[2], found[5])
    assert torch.equal(found[0], found[4])
    log = prior.telemetry()
    assert (log["prior/queries"], log["prior/first_sightings"], log["prior/cache_hits"]) == (7, 3, 4)
    assert log["prior/lm_queries"] == 3
    assert log["prior/cache_hit_rate"] == pytest.approx(4 / 7)
    assert log["prior/cache_rows"] == 2 + 3 + 1
    assert "prior/cache_hit_rate" not in prior.telemetry()


def test_every_text_of_a_question_counts_and_so_does_the_digest():
    inner = Counting()
    prior = CachedTextPrior(inner, EXACT)
    row = ["win"], ["room"], [("go", "stay", "look")]
    others = (
        (["lose"], *row[1:]),
        (row[0], ["hall"], row[2]),
        (*row[:2], [("go", "look", "stay")]),
        (*row[:2], [("go", "stay")]),
        (["winr"], ["oom"], row[2]),
    )
    for asked in (row, *others):
        prior.query(*asked)
    assert len(inner.asked) == 6


def test_a_file_answers_the_next_process(tmp_path):
    config = CacheConfig(budget_bytes=1 << 20, row_format="float32", path=tmp_path / "answers")
    asked = questions(3, 40)
    first = CachedTextPrior(Counting(), config)
    expected = first.query(*asked)
    first.close()
    inner = Counting()
    again = CachedTextPrior(inner, config)
    assert torch.equal(again.query(*asked), expected)
    assert inner.asked == []
    again.close()
    with pytest.raises(CacheMismatch, match="salt"):
        CachedTextPrior(Counting("b"), config)


def test_no_rows_are_answered_with_none():
    assert CachedTextPrior(Counting(), EXACT).query([], [], []).shape == (0, 0)


def test_what_cannot_be_kept_exactly_is_refused():
    for config in (CacheConfig(), CacheConfig(row_format="float32", resolution=0.1)):
        with pytest.raises(UnsupportedArgument, match="kept exactly"):
            CachedTextPrior(Counting(), config)
    inner = Counting()
    inner.trainable = True
    with pytest.raises(TrainablePrior, match="inner"):
        CachedTextPrior(inner, EXACT)
    with pytest.raises(UnsupportedArgument, match="row 0 has no action"):
        CachedTextPrior(Counting(), EXACT).query(["win"], ["room"], [()])
