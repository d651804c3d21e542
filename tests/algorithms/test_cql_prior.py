"""CQLPrior: its loss by hand, what it finds in random data, and what data it refuses."""

import math

import numpy as np
import pytest
import torch

from lago_fast.algorithms.cql_prior import CQLPrior
from lago_fast.envs.text_transitions import TextTransitions
from lago_fast.errors import DemonstrationError, UnsupportedArgument
from tests.algorithms.text_fakes import (
    END,
    GAMMA,
    INSTRUCTION,
    RULES,
    UNIFORM,
    FakeEncoder,
    FakePrior,
    action_values,
    state_of,
)

PLACES = list(RULES)
FAST = {"gamma": GAMMA, "learning_rate": 5e-3, "tau": 0.05, "batch_size": 64, "net_arch": (32,), "cql_coef": 0.05}


def transitions(rows: list[tuple[str, str]]) -> TextTransitions:
    """Return (place, action) pairs as transitions, each an episode of its own."""
    after = [RULES[place][action] for place, action in rows]
    terminated = np.array([following == END for following, _ in after])
    return TextTransitions(
        [INSTRUCTION] * len(rows),
        [place for place, _ in rows],
        [tuple(RULES[place]) for place, _ in rows],
        np.array([list(RULES[place]).index(action) for place, action in rows]),
        np.array([reward for _, reward in after], dtype=np.float32),
        [following for following, _ in after],
        [tuple(RULES[following]) if following != END else () for following, _ in after],
        terminated,
        ~terminated,
        np.arange(len(rows)),
        terminated,
    )


EVERYTHING = transitions([(place, action) for place in PLACES for action in RULES[place]])


def by_hand(prior, choice: int, **arguments) -> float:
    """Return the loss of the tower's "go back" or another choice, with Q and Q_target given."""
    model = CQLPrior(EVERYTHING, prior, FakeEncoder(), gamma=0.5, cql_coef=2.0, k=None, **arguments)
    batch = model.data.sample(1)
    place = model.reader.read(state_of(["tower"]), [0])
    batch = batch._replace(
        seen=place,
        choice=torch.tensor([choice]),
        reward=torch.tensor([0.1]),
        following=model.reader.read(state_of(["hall"]), [0]),
        terminated=torch.tensor([False]),
    )
    q, target = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.4, 0.8, 5.0]])
    model._q = lambda network, _: q if network is model.network else target
    return float(model.loss(batch))


def test_the_loss_by_hand_over_all_actions():
    # the target is 0.1 and half of 5, the TD error 2.6
    expected = 0.5 * 2.6**2 + 2.0 * (math.log(math.e + 1 + math.e**2) - 0)
    assert by_hand(None, 1) == pytest.approx(expected, rel=1e-5)
    assert by_hand(UNIFORM, 1) == pytest.approx(expected, rel=1e-5)


def test_the_loss_by_hand_over_proposals_and_the_action_of_the_data():
    """The prior proposes "climb" in the tower, "go left" and "go right" in the hall."""
    prior = FakePrior(lambda place, a: float(place in {"cellar", "roof"} or a in {"climb", "go left", "go right"}))
    # the data's action is the one that is proposed: nothing to be conservative about
    assert by_hand(prior, 1) == pytest.approx(0.5 * 0.5**2, rel=1e-5)
    # it is not proposed, and joins the sum
    expected = 0.5 * 0.5**2 + 2.0 * (math.log(math.e + 1) - 1)
    assert by_hand(prior, 0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prior", [None, UNIFORM], ids=["cql", "cql_prior"])
def test_random_data_suffice_for_the_optimal_policy(prior):
    rng, rows = np.random.default_rng(0), []
    for place in rng.choice(PLACES, 400):
        rows.append((str(place), str(rng.choice(list(RULES[place])))))
    model = CQLPrior(transitions(rows), prior, FakeEncoder(), k=None, seed=0, **FAST).learn(1200)
    choice, _ = model.predict(state_of(PLACES), deterministic=True)
    found = {p: list(RULES[p])[c] for p, c in zip(PLACES, choice, strict=True)}
    assert found == {p: max(q, key=q.get) for p, q in action_values().items()}
    assert model.num_timesteps == model.n_updates == 1200


def test_the_conservative_term_holds_to_what_the_data_do():
    rows = [("roof", "jump")] * 3 + [("hall", "wait")] * 3
    model = CQLPrior(transitions(rows), None, FakeEncoder(), seed=0, **{**FAST, "cql_coef": 5.0}).learn(300)
    choice, _ = model.predict(state_of(["roof", "hall"]), deterministic=True)
    assert choice.tolist() == [0, 2]


def test_the_prior_is_asked_once_about_each_state():
    prior = FakePrior(lambda *_: 1.0)
    model = CQLPrior(transitions([("hall", "wait")] * 50 + [("tower", "climb")]), prior, FakeEncoder(), seed=0)
    assert prior.queries == 3  # hall, tower and, after it, roof
    model.learn(5)
    assert prior.queries == 3


def test_callbacks_count_gradient_steps():
    steps = []
    model = CQLPrior(EVERYTHING, None, FakeEncoder(), seed=0)
    model.learn(100, lambda *_: steps.append(model.num_timesteps) or len(steps) < 7)
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert model.num_timesteps == model.n_updates == 7


@pytest.mark.parametrize("choice", [3, -1])
def test_an_action_that_is_not_admissible_names_its_row(choice):
    wrong = EVERYTHING._replace(choice=np.where(np.arange(len(EVERYTHING.choice)) == 2, choice, EVERYTHING.choice))
    with pytest.raises(DemonstrationError, match=f"row 2, number {choice}, is not among its 3 admissible"):
        CQLPrior(wrong, None, FakeEncoder())


def test_what_else_is_refused():
    nothing = TextTransitions(*([[]] * 3), *(np.zeros(0) for _ in range(2)), *([[]] * 2), *(np.zeros(0),) * 4)
    with pytest.raises(DemonstrationError, match="empty"):
        CQLPrior(nothing, None, FakeEncoder())
    with pytest.raises(UnsupportedArgument, match="cql_coef="):
        CQLPrior(EVERYTHING, None, FakeEncoder(), cql_coef=-1.0)
    with pytest.raises(UnsupportedArgument, match="transitions: there are none"):
        CQLPrior(None, None, FakeEncoder()).learn(1)
    with pytest.raises(UnsupportedArgument, match="alpha="):
        CQLPrior(None, None, FakeEncoder(), alpha=0.0)


def test_columns_of_unlike_lengths_and_rewards_that_are_none_are_refused():
    for wrong, message in (
        ({"reward": EVERYTHING.reward[:1]}, "reward: 1 rows beside"),
        ({"terminated": EVERYTHING.terminated[:-1]}, "terminated: "),
        ({"reward": np.full_like(EVERYTHING.reward, np.nan)}, "reward: NaN"),
    ):
        with pytest.raises(DemonstrationError, match=message):
            CQLPrior(EVERYTHING._replace(**wrong), None, FakeEncoder())


def test_integers_of_any_width_will_do():
    given = EVERYTHING._replace(choice=EVERYTHING.choice.astype(np.int32), terminated=EVERYTHING.terminated.astype(int))
    ours, theirs = (CQLPrior(data, None, FakeEncoder()).data.sample(8) for data in (given, EVERYTHING))
    assert (ours.choice.dtype, ours.terminated.dtype) == (theirs.choice.dtype, theirs.terminated.dtype)


def test_a_model_with_numpys_scalars_is_saved(tmp_path):
    settings = {"batch_size": np.int64(8), "alpha": np.float32(0.5), "net_arch": np.array([8, 8]), "seed": np.int64(3)}
    model = CQLPrior(EVERYTHING, None, FakeEncoder(), **settings)
    assert model.arguments["net_arch"] == [8, 8]
    model.save(tmp_path / "model")
