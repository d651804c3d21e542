"""What learners of Q over text actions share: the TD target by hand, the optimiser, choosing, and SB3's manners."""

import csv
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.logger import configure

from lago_fast.algorithms import text_learner
from lago_fast.algorithms.dqn_prior import DQNPrior
from lago_fast.algorithms.text_q import q_values
from lago_fast.algorithms.text_replay import TextBatch
from lago_fast.algorithms.text_states import Seen
from lago_fast.errors import NonFiniteLoss, UnsupportedArgument
from tests.algorithms.text_fakes import END, UNIFORM, FakeEncoder, FakePrior, TableGame, state_of


def model(prior=UNIFORM, env=None, **arguments):
    return DQNPrior(env, prior, FakeEncoder(), seed=0, **arguments)


def batch(learner, places, following, reward, choice, terminated):
    rows = np.arange(len(places))
    after = learner.reader.read(state_of(following), rows[~np.array(terminated)])
    now = learner.reader.read(state_of(places), rows)
    return TextBatch(now, torch.tensor(choice), torch.tensor(reward), after, torch.tensor(terminated))


def test_the_target_by_hand():
    """r + gamma max over proposals: the prior excludes the best action of the hall, "wait"."""
    learner = model(FakePrior(lambda _, action: float(action != "wait")), gamma=0.9, k=None)
    rows = batch(
        learner, ["roof", "roof", "tower"], ["hall", END, "hall"], [0.0, 1.0, -0.5], [0, 1, 2], [False, True, False]
    )
    q = torch.tensor([[0.2, 0.7, 5.0], [-math.inf] * 3, [-1.0, -2.0, 5.0]])
    learner._q = lambda network, _: q if network is learner.target else pytest.fail("of the target network")
    assert learner.td_target(rows).tolist() == pytest.approx([0.9 * 0.7, 1.0, -0.5 - 0.9])


def test_the_target_over_one_draw_takes_each_proposal_at_its_frequency():
    learner = model(
        FakePrior(lambda _, action: {"go left": 0.25, "go right": 0.75, "jump": 1.0}.get(action, 0.0)), gamma=1.0, k=1
    )
    n = 4000
    rows = batch(learner, ["roof"] * n, ["hall"] * n, [0.0] * n, [0] * n, [False] * n)
    learner._q = lambda *_: torch.tensor([[1.0, 2.0, 9.0]]).expand(n, -1)
    targets = learner.td_target(rows)
    assert set(targets.tolist()) == {1.0, 2.0}
    assert (targets == 2).float().mean().item() == pytest.approx(0.75, abs=5 * 0.433 / math.sqrt(n))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_gradient_step_is_adamw_with_clipped_gradients(weight_decay):
    learner = model(weight_decay=weight_decay, max_grad_norm=0.01, learning_rate=0.01)
    rows = batch(learner, ["roof", "hall"], ["hall", "tower"], [3.0, -2.0], [0, 1], [False, False])
    network = deepcopy(learner.network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=weight_decay)
    taken = rows.seen.actions.gather(1, rows.choice[:, None])
    learner.td_target = lambda _: torch.tensor([3.0, -2.0])
    for _ in range(3):
        learner.gradient_step(rows)
        optimizer.zero_grad()
        values = q_values(network, learner.encoder, rows.seen.state, taken).squeeze(1)
        (0.5 * (values - torch.tensor([3.0, -2.0])).square().mean()).backward()
        assert torch.nn.utils.clip_grad_norm_(network.parameters(), 0.01) > 0.01
        optimizer.step()
    for found, expected in zip(learner.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert learner.n_updates == 3


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_the_target_moves_by_tau(tau):
    learner = model(tau=tau)
    with torch.no_grad():
        for old, new in zip(learner.target.parameters(), learner.network.parameters(), strict=True):
            old.fill_(0.0)
            new.fill_(2.0)
    learner.update_target()
    assert all(bool((p == 2 * tau).all()) for p in learner.target.parameters())
    assert not any(p.requires_grad for p in learner.target.parameters())


def test_nan_ends_learning_by_name():
    learner = model()
    rows = batch(learner, ["roof"], ["hall"], [0.0], [0], [False])
    with torch.no_grad():
        learner.network.state.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match="learning_rate"):
        learner.gradient_step(rows)


def test_it_chooses_one_admissible_action_per_state():
    learner = model(FakePrior(lambda _, action: float(action in {"climb", "wait", "jump"})), k=None)
    for deterministic in (False, True):
        choice, rest = learner.predict(state_of(["tower", END, "hall", "roof"]), deterministic)
        assert rest is None
        assert choice.dtype == np.int64
        assert choice.tolist() == [1, 0, 2, 0]


def test_without_a_seed_two_models_differ_and_with_one_they_agree():
    first, second = (DQNPrior(None, None, FakeEncoder(), seed=7) for _ in range(2))
    other = DQNPrior(None, None, FakeEncoder())
    assert torch.equal(first.network.state.weight, second.network.state.weight)
    assert not torch.equal(first.network.state.weight, other.network.state.weight)


def test_the_same_seed_learns_the_same():
    learnt = [DQNPrior(TableGame(2), UNIFORM, FakeEncoder(), seed=3, learning_starts=20).learn(60) for _ in range(2)]
    assert learnt[0].n_updates > 30
    for one, other in zip(*(m.network.parameters() for m in learnt), strict=True):
        assert torch.equal(one, other)


class Counting(BaseCallback):
    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.stop_at, self.seen = stop_at, []

    def _on_step(self) -> bool:
        self.seen.append(self.num_timesteps)
        return len(self.seen) < self.stop_at


def test_callbacks_are_told_of_every_step_and_may_end_learning():
    callback = Counting(5)
    learner = model(env=TableGame(3)).learn(1000, callback)
    assert callback.seen[:2] == [3, 6]
    assert len(callback.seen) == 5
    assert learner.num_timesteps == callback.seen[-1]
    assert callback.training_env is learner.get_env()


def test_callbacks_of_stable_baselines3_and_functions_work():
    learner = model(env=TableGame(1, limit=4))
    told = []
    learner.learn(1000, [StopTrainingOnMaxEpisodes(3), lambda local, _: told.append(local["dones"]) is None])
    assert len(learner.ep_info_buffer) == 2  # of the last episode they are told first, as there
    assert len(told) > 3


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_the_bar_of_progress_counts_env_steps(monkeypatch):
    moved = []
    monkeypatch.setattr(text_learner.StepsBar, "_on_training_start", lambda bar: setattr(bar, "pbar", Bar(moved)))
    learner = model(env=TableGame(2, limit=3)).learn(20, progress_bar=True)
    assert sum(moved) == learner.num_timesteps


class Bar:
    def __init__(self, moved):
        self.update = moved.append

    def refresh(self):
        pass

    close = refresh


def test_learning_goes_on_where_it_was_left():
    learner = model(env=TableGame(2)).learn(20)
    first = learner.num_timesteps
    assert first in (20, 21)  # both envs step
    learner.learn(20, reset_num_timesteps=False)
    assert first + 20 <= learner.num_timesteps <= first + 21
    learner.learn(10)
    assert learner.num_timesteps in (10, 11)


def test_the_log_has_stable_baselines3s_names(tmp_path):
    learner = model(FakePrior(lambda *_: 1.0), env=TableGame(2, limit=3), learning_starts=10)
    learner.set_logger(configure(str(tmp_path), ["csv"]))
    learner.learn(200)
    learner.logger.close()
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/success_rate", "train/loss", "train/n_updates"}
    assert names | {"time/fps", "time/episodes", "time/total_timesteps", "prior/queries"} <= set(rows[-1])
    assert float(rows[-1]["rollout/ep_len_mean"]) <= 3
    # every state that is not terminal was asked about once
    assert 200 <= sum(float(row["prior/queries"] or 0) for row in rows) <= 200 * 4 / 3 + 4


def test_there_is_no_logger_before_learning():
    with pytest.raises(UnsupportedArgument, match="logger"):
        _ = model().logger


@pytest.mark.parametrize(
    "argument",
    [
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"k": 0},
        {"gamma": 1.1},
        {"tau": 0.0},
        {"learning_rate": 0.0},
        {"batch_size": 0},
        {"max_grad_norm": 0.0},
        {"weight_decay": -0.1},
        {"target_update_interval": 0},
        {"net_arch": ()},
        {"activation": "gelu"},
    ],
)
def test_an_argument_that_cannot_be_honoured_is_named(argument):
    with pytest.raises(UnsupportedArgument, match=f"{next(iter(argument))}="):
        model(**argument)


def test_seen_states_are_taken_by_rows():
    seen = Seen(torch.arange(6).reshape(3, 2), torch.arange(6).reshape(3, 2), torch.zeros(3, 2))
    assert seen.take(torch.tensor([2])).actions.tolist() == [[4, 5]]
