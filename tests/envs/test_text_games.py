"""The contract of text games, on those that need no other package."""

import numpy as np
import pytest

from lago_fast.envs.frozen_lake import make_frozen_lake
from lago_fast.envs.overcooked import make_overcooked
from lago_fast.errors import UnsupportedArgument

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


def test_a_row_plays_as_a_single_environment_does(make):
    many, rng = make(3), np.random.default_rng(1)
    single = [make(1) for _ in range(3)]
    state = many.reset(40)
    alone = [env.reset(40 + row) for row, env in enumerate(single)]
    for _ in range(80):
        choice = random_choices(state, rng)
        step = many.step(choice)
        for row, env in enumerate(single):
            one = env.step(choice[[row]])
            assert [part[row] for part in step.state] == [part[0] for part in one.state]
            assert [part[row] for part in step[1:]] == [part[0] for part in one[1:]]
        state = step.state
    assert [part[1] for part in many.reset(7)] == [part[0] for part in single[1].reset(8)]
    assert alone[0].observation[0]


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
