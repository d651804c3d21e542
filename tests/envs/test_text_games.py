"""The contract of text games, on those that need no other package."""

import inspect

import numpy as np
import pytest

from lago_fast.envs.alfworld import make_alfworld
from lago_fast.envs.frozen_lake import make_frozen_lake
from lago_fast.envs.overcooked import make_overcooked
from lago_fast.envs.textworld import make_textworld
from lago_fast.errors import UnsupportedArgument
from lago_fast.text_training import EVALUATION_SEED, evaluate_text

MAKERS = {
    "lake": make_frozen_lake,
    "slippery lake": lambda n, **settings: make_frozen_lake(n, slippery=True, **settings),
    "kitchen": make_overcooked,
    "kitchen with memory": lambda n, **settings: make_overcooked(n, "tomato-lettuce-salad", memory=True, **settings),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def random_choices(state, rng):
    return np.array([rng.integers(max(len(actions), 1)) for actions in state.admissible])


def test_the_contract_holds(make):
    env, rng = make(5, horizon=7), np.random.default_rng(0)
    state, over, turns, ends = env.reset(0), np.zeros(5, bool), np.zeros(5, int), 0
    assert all(state.admissible)
    for _ in range(60):
        kept = [list(part) for part in state]
        step = env.step(random_choices(state, rng))
        assert [list(part) for part in state] == kept  # what was given stays as it was
        np.testing.assert_array_equal(step.valid, ~over)
        turns = np.where(over, 0, turns + 1)
        np.testing.assert_array_equal(step.truncated, step.valid & ~step.terminated & (turns == 7))
        for row in range(5):
            assert bool(step.state.admissible[row]) != step.terminated[row]
            assert len(step.state.admissible[row]) <= env.max_actions
        assert not step.reward[~step.valid].any()
        assert not step.success[~step.terminated].any()
        assert step.reward.dtype == np.float32
        over, state = step.terminated | step.truncated, step.state
        ends += over.sum()
    assert ends > 20


def test_a_row_plays_the_same_whatever_the_number_of_rows(make):
    many, few, single, rng = make(5), make(3), make(1), np.random.default_rng(1)
    state = many.reset(40)
    assert few.reset(40).observation == state.observation[:3]
    single.reset(40)
    for _ in range(80):
        choice = random_choices(state, rng)
        step = many.step(choice)
        for env in (few, single):
            part, n = env.step(choice[: env.num_envs]), env.num_envs
            assert [column[:n] for column in step.state] == list(part.state)
            for column, own in zip(step[1:], part[1:], strict=True):
                np.testing.assert_array_equal(column[:n], own)
        state = step.state
    assert [column[:1] for column in many.reset(7)] == list(single.reset(7))


def test_no_row_plays_what_a_row_of_another_seed_plays():
    def starts(seed):
        env = make_overcooked(8, horizon=1)
        env.reset(seed)
        tiles = []
        for _ in range(30):
            tiles.append(env.tile.copy())
            env.step(np.zeros(8, int))  # ends
            env.step(np.zeros(8, int))
        return [np.stack(tiles)[:, row].tobytes() for row in range(8)]

    rows = [row for seed in (0, 1, 2, 8, 2**40, EVALUATION_SEED) for row in starts(seed)]
    assert len(set(rows)) == len(rows)


def test_an_evaluation_is_not_seeded_as_the_games_are():
    defaults = inspect.signature(evaluate_text).parameters["seed"].default
    makers = (make_frozen_lake, make_overcooked, make_textworld, make_alfworld)
    assert defaults == EVALUATION_SEED
    assert defaults not in {inspect.signature(maker).parameters["seed"].default for maker in makers}


def test_a_seed_decides_all_episodes(make):
    def play(seed):
        env, rng = make(4), np.random.default_rng(2)
        env.reset(9)
        state, seen = env.reset(seed), []
        for _ in range(50):
            step = env.step(random_choices(state, rng))
            seen.append(step.state.observation)
            state = step.state
        return seen

    assert play(3) == play(3)
    # without a seed the draws go on
    env = make_overcooked(20)
    assert env.reset(0).observation != env.reset().observation


def test_choices_are_checked(make):
    env = make(2)
    env.reset(0)
    for wrong in ([0, 8], [-1, 0]):
        with pytest.raises(UnsupportedArgument, match="give an index into the row's `admissible`"):
            env.step(np.array(wrong))
    with pytest.raises(UnsupportedArgument, match="one index per environment"):
        env.step(np.zeros(3, int))


def test_before_a_reset_every_row_starts():
    step = make_frozen_lake(2).step(np.array([77, 77]))
    assert not step.valid.any()
    assert all(step.state.admissible)


def test_the_choice_of_an_ended_row_is_ignored():
    env = make_frozen_lake(1, horizon=1)
    env.reset(0)
    assert env.step(np.array([2])).truncated[0]
    step = env.step(np.array([99]))
    assert not step.valid[0]
    assert "row 1, column 1" in step.state.observation[0]
    assert env.step(np.array([2])).valid[0]


@pytest.mark.parametrize(("name", "value"), [("num_envs", 0), ("horizon", 0), ("seed", -1)])
def test_numbers_out_of_range(name, value):
    with pytest.raises(UnsupportedArgument, match=f"{name}={value}"):
        make_frozen_lake(**{"num_envs": 1, name: value})
    with pytest.raises(UnsupportedArgument, match="seed=-1"):
        make_frozen_lake(1).reset(-1)


def test_draws_are_even():
    env = make_overcooked(1000, seed=3)
    counts = np.bincount(np.concatenate([env._draw(np.arange(1000), 5) for _ in range(50)]), minlength=5)
    assert np.abs(counts / 50_000 - 0.2).max() < 0.01  # five standard deviations


@pytest.mark.parametrize(
    ("part", "wrong"), [(0, "find"), (1, ["dark"]), (2, ["wait"] * 4)], ids=["instruction", "observation", "admissible"]
)
def test_a_game_that_forgets_a_list_is_told_so(part, wrong, monkeypatch):
    env = make_frozen_lake(4)
    seen = list(env._see())
    seen[part] = wrong
    monkeypatch.setattr(env, "_see", lambda: tuple(seen))
    with pytest.raises(UnsupportedArgument, match=r"_see: .* return a list"):
        env.reset(0)
