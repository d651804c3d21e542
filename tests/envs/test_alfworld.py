"""ALFWorld's loader and games, on a room of our own in its format."""

import importlib.util
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lago_fast.envs  # noqa: F401 - registers the environments
from lago_fast.envs.alfworld import make_alfworld
from lago_fast.envs.text_recording import make_text_expert, record_text_episodes
from lago_fast.errors import CorruptFile, MissingExtra, UnknownTask, UnsupportedArgument

spec = importlib.util.spec_from_file_location("alfworld_room", Path(__file__).with_name("alfworld_room.py"))
alfworld_room = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alfworld_room)

needs_alfworld = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None,
    reason="alfworld is not installed: pip install 'lago_fast[alfworld]'",
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))  # which the package makes when it is imported
    return tmp_path


@needs_alfworld
def test_the_walkthrough_by_hand(data):
    alfworld_room.write_room(data)
    env = make_alfworld(2, data)
    state = env.reset(0)
    assert state.instruction == ["put a mug in drawer."] * 2
    assert state.observation[0].endswith("you see a desk 1, and a drawer 1.")
    for number, command in enumerate(alfworld_room.WALKTHROUGH):
        step = env.step(np.array([actions.index(command) for actions in state.admissible]))
        last = number == len(alfworld_room.WALKTHROUGH) - 1
        assert step.success.all() == last
        assert step.reward.tolist() == [float(last)] * 2
        state = step.state
        if command.startswith("go to desk"):
            assert state.observation[0] == "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 1."
    assert state.admissible == [(), ()]
    env.close()


@needs_alfworld
def test_the_planner_is_the_expert(data):
    alfworld_room.write_room(data)
    env = make_alfworld(2, plan=True)  # the data are where the package looks for them
    played = record_text_episodes(env, make_text_expert(env, 0.3), 4, seed=0)
    assert played.success.all()
    assert len(played.choice) > 4 * 5
    env.close()
    with pytest.raises(UnsupportedArgument, match="plan=True"):
        make_alfworld(1, data).expert()


@needs_alfworld
def test_kinds_of_tasks_and_numbers_of_games(data):
    files = [alfworld_room.write_room(data, name=f"trial_{k}") for k in (2, 1)]
    other = alfworld_room.write_room(data, kind="look_at_obj_in_light")
    alfworld_room.write_room(data, name="movable_1")  # not supported by the package
    assert make_alfworld(1, data).files == sorted(files)
    assert make_alfworld(1, data, num_games=1).files == [files[1]]
    assert make_alfworld(1, data, tasks=["examine"]).files == [other]
    assert len(make_alfworld(1, data, tasks=["examine", "pick-place"]).files) == 3
    with pytest.raises(UnsupportedArgument, match="no solvable"):
        make_alfworld(1, data, tasks=["heat"])


@needs_alfworld
def test_an_unreadable_game(data):
    path = alfworld_room.write_room(data)
    path.write_text("{")
    with pytest.raises(CorruptFile, match="download it again"):
        make_alfworld(1, data)


@needs_alfworld
def test_check_env_has_nothing_to_say(data):
    alfworld_room.write_room(data)
    env = gym.make("lago_fast/ALFWorld-v0", data=data, render_mode="ansi")
    check_env(env.unwrapped)
    env.close()


def test_absent_data_are_not_fetched_but_explained(data):
    with pytest.raises(UnsupportedArgument, match=r"alfworld-download.*\.cache/alfworld or \$ALFWORLD_DATA"):
        make_alfworld(1)
    with pytest.raises(UnsupportedArgument, match="alfworld-download"):
        make_alfworld(1, data / "elsewhere", split="valid_unseen")


def test_refusals(data):
    for tasks in (["juggle"], []):
        with pytest.raises(UnknownTask, match="give some of pick-place"):
            make_alfworld(1, data, tasks=tasks)
    with pytest.raises(UnsupportedArgument, match="split='test'"):
        make_alfworld(1, data, split="test")
    with pytest.raises(UnsupportedArgument, match="num_games=0"):
        make_alfworld(1, data, num_games=0)


@needs_alfworld
def test_without_the_package(data, monkeypatch):
    alfworld_room.write_room(data)
    env = make_alfworld(1, data)
    monkeypatch.setitem(sys.modules, "alfworld.agents.environment.alfred_tw_env", None)
    with pytest.raises(MissingExtra, match=r"lago_fast\[alfworld\]"):
        env.reset(0)
