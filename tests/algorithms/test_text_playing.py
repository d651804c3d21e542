"""Transitions and episodes of vectorised text games, at and around an episode's end."""

import torch

from lago_fast.algorithms.text_playing import TextPlay
from lago_fast.algorithms.text_states import PADDING, StateReader
from tests.algorithms.text_fakes import RULES, FakeEncoder, TableGame, state_of


def choosing(*actions):
    """Return a choice for rows that all are in the hall or on the way that `actions` tells of."""
    script = iter(actions)

    def choose(seen):
        action = next(script)
        place = next(p for p, there in RULES.items() if action in there and len(there) == (seen.actions[0] >= 0).sum())
        return torch.full((len(seen.state),), list(RULES[place]).index(action))

    return choose


def test_an_ended_episode_leaves_one_transition_and_a_row_that_is_none():
    encoder = FakeEncoder()
    play = TextPlay(TableGame(2), StateReader(encoder, None), seed=0)
    choose = choosing("go left", "open the box", "unused", "wait")
    first = play.step(choose)
    assert first.batch.following.state.tolist() == [encoder.ids(["find the treasure", "cellar"]).tolist()] * 2
    assert first.infos == [{}, {}]

    ended = play.step(choose)
    assert ended.batch.terminated.all()
    assert (ended.batch.following.actions == PADDING).all()
    assert [info["episode"]["r"] for info in ended.infos] == [torch.tensor(0.3).item()] * 2
    assert [info["episode"]["l"] for info in ended.infos] == [2, 2]
    assert [info["is_success"] for info in ended.infos] == [False, False]
    assert not play.playing.any()

    reset = play.step(None)
    assert len(reset.batch.choice) == 0
    assert reset.infos == [{}, {}]
    assert play.playing.all()
    hall = StateReader(encoder, None).read(state_of(["hall"] * 2), [0, 1])
    assert torch.equal(play.seen.state, hall.state)


def test_a_truncated_episode_ends_in_a_state_with_actions():
    encoder = FakeEncoder()
    play = TextPlay(TableGame(1, limit=2), StateReader(encoder, None), seed=0)
    choose = choosing("go right", "go back")
    play.step(choose)
    last = play.step(choose)
    assert not last.batch.terminated.any()
    assert last.step.truncated.all()
    # the true last state, with its own actions
    assert last.batch.following.state.tolist() == [encoder.ids(["find the treasure", "hall"]).tolist()]
    assert (last.batch.following.actions != PADDING).sum() == 3
    assert last.infos[0]["episode"]["l"] == 2


def test_a_success_counts_for_its_episode_alone():
    play = TextPlay(TableGame(1), StateReader(FakeEncoder(), None), seed=0)
    ends = []
    choose = choosing("go right", "climb", "take the treasure", "go left", "open the box")
    for step in range(7):
        played = play.step(
            choose if step not in (3, 6) else lambda seen: torch.zeros(len(seen.state), dtype=torch.int64)
        )
        ends += [info["is_success"] for info in played.infos if info]
    assert ends == [True, False]
