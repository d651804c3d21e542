"""DQNPrior against value iteration, its behaviours, and when it learns."""

from collections import Counter

import numpy as np
import pytest
import torch

from lago_fast.algorithms.dqn_prior import DQNPrior
from lago_fast.errors import NonFiniteError, UnsupportedArgument
from tests.algorithms.text_fakes import (
    GAMMA,
    RULES,
    UNIFORM,
    FakeEncoder,
    FakePrior,
    TableGame,
    action_values,
    state_of,
)

PLACES = list(RULES)
FAST = {"gamma": GAMMA, "learning_rate": 5e-3, "tau": 0.05, "batch_size": 32, "net_arch": (32,), "learning_starts": 100}


def learnt(prior, steps: int = 1500, **arguments) -> DQNPrior:
    env = TableGame(4, limit=6, starts=PLACES)
    return DQNPrior(env, prior, FakeEncoder(), seed=0, **{**FAST, **arguments}).learn(steps)


def values(model) -> dict[str, dict[str, float]]:
    q = model.q_values(state_of(PLACES)).tolist()
    return {p: dict(zip(RULES[p], row, strict=False)) for p, row in zip(PLACES, q, strict=True)}


@pytest.mark.parametrize("prior", [None, UNIFORM], ids=["dqn", "dqn_prior"])
def test_over_all_actions_it_is_value_iteration(prior):
    found, true = values(learnt(prior, k=None, alpha=0.3)), action_values()
    for place, q in true.items():
        assert found[place] == pytest.approx(q, abs=0.12), place
        assert max(found[place], key=found[place].get) == max(q, key=q.get)


def test_what_the_prior_excludes_is_neither_taken_nor_counted_on():
    """Without the way to the tower the box is the best there is."""

    def allowed(_, action):
        return action != "go right"

    model = learnt(FakePrior(lambda *a: float(allowed(*a))), k=None, alpha=0.3)
    assert "go right" not in {action for _, action in model.env.taken}
    true, found = action_values(allowed), values(model)
    # the roof's "jump" shows that the maximum in the hall leaves "go right" out
    assert true["roof"]["jump"] < action_values()["roof"]["jump"] - 0.3
    for place, action in (("hall", "go left"), ("cellar", "open the box"), ("roof", "jump")):
        assert found[place][action] == pytest.approx(true[place][action], abs=0.12)
    for deterministic in (True, False):
        assert 1 not in model.predict(state_of(["hall"] * 50), deterministic)[0]


def test_a_few_proposals_suffice_to_find_the_treasure():
    model = learnt(UNIFORM, k=2, alpha=0.1)
    assert [
        list(RULES[p])[c] for p, c in zip(PLACES, model.predict(state_of(PLACES), deterministic=True)[0], strict=True)
    ][3] == "take the treasure"


def test_before_learning_starts_the_prior_acts():
    weight = {"go left": 0.7, "go right": 0.2, "wait": 0.1}
    model = DQNPrior(
        TableGame(8, limit=1), FakePrior(lambda _, a: weight.get(a, 1.0)), FakeEncoder(), seed=0, learning_starts=10_000
    ).learn(1000)
    taken = Counter(action for _, action in model.env.taken)
    assert model.n_updates == 0
    for action, share in weight.items():
        assert taken[action] / 1000 == pytest.approx(share, abs=5 * 0.5 / np.sqrt(1000))


def test_epsilon_greedy_explores_inside_the_proposals():
    model = DQNPrior(
        None, FakePrior(lambda _, a: float(a != "wait")), FakeEncoder(), k=None, behaviour="epsilon_greedy", seed=0
    )
    n = 4000
    best = int(model.predict(state_of(["hall"]), deterministic=True)[0][0])
    model.exploration_rate = 0.4
    taken = np.bincount(model.predict(state_of(["hall"] * n))[0], minlength=3) / n
    assert taken[best] == pytest.approx(0.8, abs=5 * 0.4 / np.sqrt(n))
    assert taken[2] == 0


def test_the_exploration_rate_falls_as_in_stable_baselines3():
    model = DQNPrior(
        TableGame(1),
        None,
        FakeEncoder(),
        seed=0,
        exploration_fraction=0.5,
        exploration_final_eps=0.1,
        learning_starts=500,
    )
    rates = {}
    model.learn(100, lambda *_: rates.update({model.num_timesteps: model.exploration_rate}) is None)
    assert rates[25] == pytest.approx(1 - 0.5 * 0.9)
    assert rates[50] == rates[100] == pytest.approx(0.1)


def test_a_truncated_episode_is_bootstrapped():
    """Waiting for ever, cut after 2 steps: with gamma = 1 and reward 1 a step the value has no bound."""

    class Waiting(TableGame):
        def step(self, choice):
            step = super().step(choice)
            return step._replace(reward=step.valid.astype(np.float32))

    prior = FakePrior(lambda place, action: float(place != "hall" or action == "wait"))
    model = DQNPrior(Waiting(2, limit=2), prior, FakeEncoder(), seed=0, **{**FAST, "gamma": 1.0, "tau": 0.2}).learn(
        1000
    )
    assert values(model)["hall"]["wait"] > 4


@pytest.mark.parametrize(
    ("arguments", "updates"),
    [
        ({"gradient_steps": -1}, 60),
        ({"gradient_steps": 3, "train_freq": 5}, 3 * 60 / 2 / 5),
        ({"gradient_steps": 1, "train_freq": (2, "step")}, 60 / 2 / 2),
        ({"gradient_steps": 0}, 0),
    ],
)
def test_updates_come_as_often_as_asked(arguments, updates):
    env = TableGame(2, limit=10_000, starts=["hall"])
    waiting = FakePrior(lambda _, action: float(action == "wait"))
    model = DQNPrior(env, waiting, FakeEncoder(), seed=0, learning_starts=0, **arguments).learn(60)
    assert model.n_updates == updates


def test_updates_may_wait_for_episodes():
    env = TableGame(1, limit=3)
    waiting = FakePrior(lambda _, action: float(action == "wait"))
    model = DQNPrior(
        env, waiting, FakeEncoder(), seed=0, learning_starts=0, train_freq=(2, "episode"), gradient_steps=1
    )
    assert model.learn(18).n_updates == 3


def test_the_target_is_updated_by_gradient_steps():
    env = TableGame(2, limit=10_000)
    waiting = FakePrior(lambda _, action: float(action == "wait"))
    model = DQNPrior(env, waiting, FakeEncoder(), seed=0, tau=1.0, target_update_interval=10, learning_starts=0)
    updated = []
    model.update_target = lambda: updated.append(model.n_updates)
    model.learn(30)
    assert updated == [10, 20, 30]


def test_a_reward_that_is_no_number_is_refused():
    class Broken(TableGame):
        def step(self, choice):
            return super().step(choice)._replace(reward=np.full(self.num_envs, np.nan, dtype=np.float32))

    with pytest.raises(NonFiniteError, match="reward"):
        DQNPrior(Broken(1), None, FakeEncoder()).learn(10)


def test_without_a_width_rows_grow():
    model = DQNPrior(TableGame(2, known_width=False), UNIFORM, FakeEncoder(), seed=0, learning_starts=5).learn(40)
    assert model.n_updates > 0
    assert torch.isfinite(model.q_values(state_of(["hall"]))).all()


@pytest.mark.parametrize(
    "argument",
    [
        {"behaviour": "greedy"},
        {"exploration_fraction": 0.0},
        {"exploration_initial_eps": 1.5},
        {"exploration_final_eps": -0.1},
        {"gradient_steps": -2},
        {"learning_starts": -1},
        {"train_freq": 0},
        {"train_freq": (1, "day")},
        {"buffer_size": 1},
        {"stats_window_size": 0},
        {"seed": -1},
        {"seed": 2.5},
    ],
)
def test_an_argument_that_cannot_be_honoured_is_named(argument):
    with pytest.raises(UnsupportedArgument, match=f"{next(iter(argument))}="):
        DQNPrior(TableGame(2), UNIFORM, FakeEncoder(), **argument)


def test_there_is_nothing_to_learn_from_without_an_env():
    with pytest.raises(UnsupportedArgument, match="env: there is none"):
        DQNPrior(None, None, FakeEncoder()).learn(1)


def test_no_rows_of_a_log_are_written_where_none_are_wanted(monkeypatch):
    dumped = []
    monkeypatch.setattr("stable_baselines3.common.logger.Logger.dump", lambda *_, **__: dumped.append(True))
    model = DQNPrior(TableGame(4, limit=6, starts=PLACES), None, FakeEncoder(), seed=0, **FAST)
    model.learn(60, log_interval=None)
    assert not dumped
    model.learn(60, log_interval=1)
    assert dumped
