"""A policy is fitted to its prior on given rows once, where the guard lets it, and learns from rewards afterwards."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stable_baselines3.common.logger import configure

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.guard import Guard, GuardSettings
from lago_fast.envs.sb3_adapter import SB3VecEnv
from tests.algorithms.array_points import ArrayPoints
from tests.algorithms.point_env import ScriptedPrior
from tests.algorithms.test_fast_kl_ppo import SMALL, point_env
from tests.algorithms.test_resume import LAST, STEPS, STOPPED, Kill, Killed, Restart, assert_equal
from tests.algorithms.test_resume import point_env as four_points

ROWS = 2001  # no multiple of the 8 envs
FEW = GuardSettings(episodes=8, window=8, probe_share=1.0)


def states(n=ROWS, seed=0):
    return np.random.default_rng(seed).uniform(-2, 2, (n, 2)).astype(np.float32)


def model_of(kind="gaussian", sign=1.0, **options):
    prior = ScriptedPrior(kind, sign=sign)
    return FastKLPPO("MlpPolicy", point_env(kind), **{**SMALL, "kl_coef": 0.0, **options}, prior=prior)


def kl(model):
    """The KL to the prior in states that were not among the rows."""
    seen = torch.from_numpy(states(256, seed=1))
    said = model.prior.query(seen, torch.zeros(256, dtype=torch.int64))
    model.prior.queried -= 256
    with torch.no_grad():
        outputs, _ = model._head.forward(seen)
        return model._head.prior_kl(outputs, model._head.prior_outputs(said)).mean().item()


def given(model, n=ROWS, passes=100):
    model.set_logger(configure(None, []))
    model.imitate_on(states(n), np.zeros(n, np.int64), passes=passes)
    return model


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_without_a_guard_the_first_update_is_the_fit(kind, direction):
    model = given(model_of(kind, kl_direction=direction))
    before = kl(model)
    model.learn(256, log_interval=1000)
    assert kl(model) < 0.05 * before
    assert model.logger.name_to_value["train/prior_kl"] < 0.05 * before
    assert model.num_timesteps == 256  # no env steps beyond the rollout
    assert model.prior.queried == 256 + 2008  # each row once, but for the seven that fill up
    model.learn(256, reset_num_timesteps=False)
    assert model.prior.queried == 2 * 256 + 2008  # and not again
    assert kl(model) < 0.3 * before


def test_with_a_guard_a_prior_that_is_better_is_imitated_and_no_other():
    for sign, imitated in ((1.0, True), (-1.0, False)):
        model = given(model_of(sign=sign, guard=FEW))
        before = kl(model)
        model.learn(256, log_interval=1000)
        assert (kl(model) < 0.05 * before) == imitated
        assert model.prior.queried == 256 + 128 + (2008 if imitated else 0)
        assert ("prior/imitation_kl" in model.logger.name_to_value) == imitated
        assert model.num_timesteps == 256 + 128


def test_a_prior_that_is_better_where_no_row_was_given_is_not_imitated_and_no_kl_is_logged():
    model = given(model_of(guard=FEW))
    model._given = model._given._replace(
        instruction_id=model._given.instruction_id + 1, task_id=model._given.task_id + 1
    )
    model.learn(256, log_interval=1000)
    assert model.prior.queried == 256 + 128
    assert "prior/imitation_kl" not in model.logger.name_to_value


def test_adam_and_the_learning_rate_are_as_if_nothing_had_been():
    model = given(model_of(learning_rate=1e-4))
    model.learn(256)
    assert model.policy.optimizer.param_groups[0]["lr"] == 1e-4
    assert all(not state["exp_avg"].any() for state in model.policy.optimizer.state_dict()["state"].values())
    model.learn(256, reset_num_timesteps=False)
    steps = {float(state["step"]) for state in model.policy.optimizer.state_dict()["state"].values()}
    assert steps == {SMALL["n_epochs"] * math.ceil(256 / SMALL["batch_size"])}


def test_an_optimiser_of_the_users_is_used():
    model = given(model_of(policy_kwargs={"optimizer_class": torch.optim.AdamW}))
    before = kl(model)
    model.learn(256)
    assert kl(model) < 0.05 * before


def test_more_passes_come_nearer():
    found = []
    for passes in (1, 50):
        model = given(model_of(), passes=passes)
        model.learn(256)
        found.append(kl(model))
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize("by_task", [True, False])
def test_rows_of_all_groups_whose_prior_counts_are_taken_again_when_one_is_added(by_task, monkeypatch):
    model = given(model_of(guard=FEW))
    one, other = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])
    task_id, instruction_id = (one, other) if by_task else (other, one)
    model._guard = Guard(FEW, ["a", "b", "c"], np.array([0] * 4 + [1] * 4) if by_task else None)
    model._given = model._given._replace(task_id=task_id, instruction_id=instruction_id)
    taken = []
    monkeypatch.setattr(model, "_fit_to_given", lambda *about: taken.append(about[1].tolist()))
    assert not model._imitates()
    for counted in ([0.0, 1.0, 0.0], [0.0, 1.0, 1.0]):
        model._guard.counted = counted
        assert model._imitates()
        model._imitate_prior([])
        assert model._imitates()  # an update that is undone was none
        model._note_imitated()
        assert not model._imitates()
        assert model.guard_state["imitated"] == counted
    assert taken == [[False, True, False], [False, True, True]]


def test_a_guard_saved_before_rows_could_be_given_has_nothing_left_to_imitate():
    state = Guard(FEW, ["a"], None).state | {"counted": [1.0]}
    del state["imitated"]
    assert Guard(FEW, ["a"], None, state).to_imitate() == []


@pytest.mark.parametrize("guard", [None, FEW])
def test_a_prior_that_is_not_finite_on_a_given_row_undoes_the_update_and_is_asked_again(guard, tmp_path):
    model = given(model_of(guard=guard, on_nan="skip"))
    model.set_logger(configure(str(tmp_path), []))
    answer, bad = model.prior.query, True

    def query(state, instruction_id):
        said = answer(state, instruction_id)
        return said._replace(mean=said.mean * math.nan) if bad and len(state) == 2008 else said

    model.prior.query = query
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(256)
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    saved = load_file(next(tmp_path.glob("non_finite_*")))
    assert len(saved["observations"]) == 2008
    bad, far = False, kl(model)
    model.learn(256, reset_num_timesteps=False)
    assert kl(model) < 0.3 * far
    model = given(model_of(guard=guard))
    bad, model.prior.query = True, query
    with pytest.raises(errors.NonFiniteError, match="given row"):
        model.learn(256)


def test_rows_are_imitated_beside_a_rollout_that_is_collected_ahead():
    env = SB3VecEnv(ArrayPoints(8))
    model = FastKLPPO("MlpPolicy", env, **SMALL, prior=ScriptedPrior(), kl_coef=0.0, overlap="update")
    given(model)
    before = kl(model)
    model.learn(3 * 256)
    assert kl(model) < 0.3 * before


def test_a_prior_that_comes_to_count_later_is_imitated_then(monkeypatch):
    # the first returns of a policy may be its luckiest: where a success ends an episode, successes are the first to end
    model = given(model_of(guard=FEW))
    monkeypatch.setattr(model, "_note_returns", lambda _: None)
    before = kl(model)
    model.learn(512)
    guard = model._guard
    assert kl(model) > 0.5 * before
    for _ in range(8):
        guard.policy.add(0, -5.0 + 0.1 * np.random.default_rng(0).random())
    guard.policy.variance = [0.01]
    monkeypatch.undo()
    model.learn(256, reset_num_timesteps=False)
    assert max(model.guard_state["counted"]) > 0
    assert kl(model) < 0.3 * before


def test_a_warm_start_comes_after_the_rows():
    model = given(model_of(warm_start=True))
    before = kl(model)
    model.learn(256)
    assert kl(model) < 0.05 * before


@pytest.mark.parametrize(
    ("options", "rows", "match"),
    [
        ({}, {"observations": states(3)[:, :1]}, "observations"),
        ({}, {"observations": states(4)}, "observations"),
        ({}, {"observations": states(0), "instruction_id": np.zeros(0, np.int64)}, "at least one row"),
        ({}, {"instruction_id": np.array([0, 0, 1])}, "instruction_id: from 0 to 1"),
        ({}, {"instruction_id": np.array([-1, 0, 0])}, "instruction_id: from -1"),
        ({}, {"task_id": np.array([0, 0, 1])}, "task_id"),
        ({}, {"passes": 0}, "passes"),
        ({"guard": GuardSettings(imitate=False)}, {}, "imitate=True"),
    ],
)
def test_bad_input_is_refused(options, rows, match):
    model = model_of(**options)
    with pytest.raises(errors.UnsupportedArgument, match=match):
        model.imitate_on(**{"observations": states(3), "instruction_id": np.zeros(3, np.int64), **rows})


def test_nan_and_no_prior_and_too_late_are_refused():
    model = model_of()
    with pytest.raises(errors.NonFiniteError, match="observations"):
        model.imitate_on(np.array([[math.nan, 0.0]], np.float32), np.zeros(1, np.int64))
    with pytest.raises(errors.UnsupportedArgument, match="no prior"):
        FastKLPPO("MlpPolicy", point_env(), **SMALL).imitate_on(states(1), np.zeros(1, np.int64))
    model = model_of()
    model.learn(256)
    with pytest.raises(errors.UnsupportedArgument, match="the first update is over"):
        given(model)
    without_env = model_of()
    without_env.env = None
    with pytest.raises(errors.UnsupportedArgument, match="set_env"):
        given(without_env)


def test_with_a_guard_rows_may_come_late():
    model = model_of(guard=FEW)
    model.learn(256)
    before = kl(model)
    given(model).learn(256, reset_num_timesteps=False)
    assert kl(model) < 0.3 * before


def test_rows_of_several_tasks_say_whose_they_are():
    model = model_of(guard=FEW)
    model.env.tasks, model.env.task_id = ["a", "b"], np.array([0] * 4 + [1] * 4)
    with pytest.raises(errors.UnsupportedArgument, match="task_id: the guard judges 2 tasks"):
        model.imitate_on(states(3), np.zeros(3, np.int64))
    with pytest.raises(errors.UnsupportedArgument, match="task_id: no rows of a"):
        model.imitate_on(states(3), np.zeros(3, np.int64), np.array([1, 1, 1]))
    model.imitate_on(states(3), np.zeros(3, np.int64), np.array([0, 1, 1]))


@pytest.mark.parametrize("guard", [None, GuardSettings(episodes=4, probe_share=0.5)])
def test_a_run_resumed_before_or_after_the_fit_is_one_that_was_not_stopped(guard, tmp_path):
    def make():
        options = {"n_steps": 24, "batch_size": 32, "n_epochs": 2, "device": "cpu", "seed": 3, "guard": guard}
        model = FastKLPPO("MlpPolicy", four_points(), **options, prior=ScriptedPrior())
        model.imitate_on(states(100), np.zeros(100, np.int64), passes=2)
        return model

    for at in (0, STOPPED):
        reference = make().learn(LAST * STEPS, callback=Restart(at, four_points))
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            make().learn(LAST * STEPS, callback=[CheckpointEvery(folder, STOPPED), Kill(at + 1)])
        resumed = make()
        resumed.restore(folder)
        assert resumed.iterations == at
        resumed.learn(LAST * STEPS - resumed.num_timesteps, reset_num_timesteps=False)
        assert_equal(resumed, reference)
