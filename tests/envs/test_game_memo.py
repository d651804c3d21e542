"""The memo of a game answers as its engine does, and asks it once."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lago_fast.envs.game_memo import GameMemo, Play, Turn
from lago_fast.errors import EnvironmentFailed

spec = importlib.util.spec_from_file_location("story_engines", Path(__file__).with_name("story_engines.py"))
story_engines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(story_engines)
Corridor = story_engines.Corridor


def test_random_plays_are_those_of_the_engine():
    memo, rng = GameMemo(Corridor), np.random.default_rng(0)
    for _ in range(50):
        engine, play = Corridor(), Play(memo)
        turn = engine.reset()
        assert play.node.turn == turn
        while not (turn.won or turn.lost):
            command = turn.admissible[rng.integers(len(turn.admissible))]
            turn = engine.step(command)
            assert play.step(command).turn == turn
        play.end()
    assert len(memo._nodes) <= 9


def test_what_is_known_is_not_asked_again():
    memo = GameMemo(Corridor)
    for _ in range(3):
        play = Play(memo)
        play.step("on")
        play.step("on")
        play.end()
    assert memo.engine_steps == 2
    play = Play(memo)
    play.step("on")
    play.step("wait")  # new: the engine is told the way there
    assert memo.engine_steps == 4
    play.step("wait")  # a wait in the same state is known
    assert memo.engine_steps == 4
    play.step("light")  # new: the engine catches up
    assert memo.engine_steps == 6


def test_engines_are_shared_and_closed():
    Corridor.started = 0
    memo = GameMemo(Corridor)
    plays = [Play(memo) for _ in range(3)]
    assert Corridor.started == 1
    for play, command in zip(plays, ("on", "light", "wait"), strict=True):
        play.step(command)
    assert Corridor.started == 3  # all three play at a time
    for play in plays:
        play.end()
        play.end()
    assert len(memo._idle) == 3
    engines = list(memo._idle)
    memo.close()
    memo.close()
    assert [engine.closed for engine in engines] == [1, 1, 1]


def test_a_state_without_a_command_is_refused():
    turn = Turn("key", "", "", (), 0.0, False, False, None)
    with pytest.raises(EnvironmentFailed, match="no admissible command left"):
        GameMemo(Corridor).node(turn)
