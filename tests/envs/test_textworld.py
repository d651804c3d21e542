"""TextWorld's games: made here, played by their interpreter."""

import shutil

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lago_fast.envs  # noqa: F401 - registers the environments
from lago_fast.envs.text_recording import make_text_expert, record_text_episodes
from lago_fast.envs.textworld import TextWorldEngine, make_textworld
from lago_fast.envs.textworld_games import LEVELS, generate
from lago_fast.errors import UnknownTask, UnsupportedArgument

pytest.importorskip("textworld", reason="textworld is not installed: pip install 'lago_fast[text]'")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("games")


def engine_walks(path, answers, walks, steps, seed):
    """Texts, commands and scores of random walks, by the interpreter alone."""
    engine, rng, seen = TextWorldEngine(path, answers), np.random.default_rng(seed), []
    for _ in range(walks):
        turn = engine.reset()
        for _ in range(steps):
            choice = int(rng.integers(len(turn.admissible)))
            before, turn = turn, engine.step(turn.admissible[choice])
            seen.append((before.observation, before.admissible, turn.observation, turn.score - before.score))
            if turn.won or turn.lost:
                break
    engine.close()
    return seen


@pytest.mark.parametrize("answers", [False, True])
def test_it_plays_as_the_interpreter_does(cache, answers):
    path = generate("easy", 0, cache)
    expected = engine_walks(path, answers, walks=8, steps=12, seed=1)
    env, rng = make_textworld(1, [path], answers=answers, horizon=12), np.random.default_rng(1)
    state, seen = env.reset(0), []
    while len(seen) < len(expected):
        choice = rng.integers(len(state.admissible[0]), size=1)
        step = env.step(choice)
        seen.append((state.observation[0], state.admissible[0], step.state.observation[0], float(step.reward[0])))
        state = step.state
        if step.terminated[0] or step.truncated[0]:
            state = env.step(choice).state
    env.close()
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == theirs


def test_what_is_known_costs_no_command(cache):
    env = make_textworld(2, "easy", cache=cache)
    for _ in range(3):
        played = record_text_episodes(env, make_text_expert(env), 2, seed=0)
    assert played.success.all()
    assert played.reward.sum() == 2
    assert set(played.instruction) == {played.instruction[0]}
    assert env.engine_steps <= 2 * 3  # three commands, in at most two engines
    env.close()


def test_a_noisy_expert_finds_its_way_back(cache):
    env = make_textworld(2, "easy", cache=cache, horizon=40)
    played = record_text_episodes(env, make_text_expert(env, 0.4), 6, seed=0)
    assert played.success.all()
    assert len(played.choice) > 6 * 3
    env.close()


def test_a_game_is_made_once_and_stays_the_same(cache, tmp_path):
    path = generate("easy", 0, cache)
    written = path.stat().st_mtime_ns
    assert generate("easy", 0, cache) == path
    assert path.stat().st_mtime_ns == written
    again = generate("easy", 0, tmp_path)
    first, second = (engine_walks(p, True, walks=1, steps=6, seed=0) for p in (path, again))
    assert first == second
    assert [p.name for p in tmp_path.iterdir()] == [again.parent.name]  # nothing else is left behind


def test_held_out_games_are_others(cache):
    train, test = (make_textworld(1, "easy", split=split, cache=cache) for split in ("train", "test"))
    assert train.files != test.files
    assert train.reset(0).instruction != test.reset(0).instruction
    train.close()
    test.close()


def test_without_a_cache_nothing_stays():
    env = make_textworld(1, "easy")
    assert env.files[0].is_file()
    env.close()
    assert not env.files[0].exists()


def test_other_games_are_not_shared(cache):
    train, test, answers = (
        make_textworld(1, "easy", split=split, cache=cache, answers=told)
        for split, told in (("train", False), ("test", False), ("train", True))
    )
    for other in (test, answers):
        with pytest.raises(UnsupportedArgument, match="its game 0 is not this one's"):
            other.share(train)
        other.close()
    train.close()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_shared_games_stay_until_the_last_is_closed(first):
    envs = [make_textworld(1, "easy") for _ in range(3)]
    envs[1].share(envs[0])
    envs[2].share(envs[1])
    files = [env.files[0] for env in envs]
    envs.insert(0, envs.pop(first))
    while envs:
        envs.pop(0).close()
        for env in envs:
            state = env.reset(1)
            for _ in range(len(envs)):  # further than before
                state = env.step(np.array([len(state.admissible[0]) - 1])).state
    assert not any(file.exists() for file in files)


def test_an_answer_is_what_the_game_says(cache):
    path = generate("easy", 0, cache)
    env = make_textworld(1, [path])
    state = env.reset(0)
    scene = state.observation[0]
    assert scene.startswith("-= ")
    told = env.step(np.array([state.admissible[0].index("look")])).state.observation[0]
    assert told.endswith(scene)
    assert told.count("-= ") == 2  # once in the answer
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(("level", "score"), [("medium", 2), ("hard", 3), ("cooking", 5)])
def test_the_walkthrough_wins_every_level(level, score, cache):
    env = make_textworld(2, level, cache=cache)
    assert env.horizon == LEVELS[level].horizon
    played = record_text_episodes(env, make_text_expert(env), 2, seed=0)
    assert played.success.all()
    assert np.bincount(played.episode_id, played.reward).tolist() == [score] * 2
    assert any("You take" in text for text in played.observation) == (level == "cooking")  # whose answers are read
    env.close()


def test_check_env_has_nothing_to_say(cache):
    env = gym.make("lago_fast/TextWorld-v0", games="easy", cache=cache, render_mode="ansi")
    check_env(env.unwrapped)
    env.close()


def test_refusals(cache, tmp_path):
    path = generate("easy", 0, cache)
    alone = shutil.copy(path, tmp_path / "alone.z8")
    with pytest.raises(UnknownTask, match="games='eazy': give one of the levels easy"):
        make_textworld(1, "eazy")
    for games, message in (
        ([tmp_path / "missing.z8"], "is no game file"),
        ([path.with_suffix(".json")], "is no game file"),
        ([alone], "has no .json file beside it"),
        ([], "at least one game file"),
    ):
        with pytest.raises(UnsupportedArgument, match=message):
            make_textworld(1, games)
    with pytest.raises(UnsupportedArgument, match="num_games=0"):
        make_textworld(1, "easy", num_games=0)
    with pytest.raises(UnsupportedArgument, match="split='valid'"):
        make_textworld(1, "easy", split="valid")
