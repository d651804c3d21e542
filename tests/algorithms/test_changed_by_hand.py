"""Whoever holds a model may change it between updates, as with Stable-Baselines3's PPO; what it is then learns."""

import copy

import cloudpickle
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from lago_fast import FastKLPPO
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from lago_fast.errors import UnsupportedArgument
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior

SETTINGS = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu", "learning_rate": 1e-3}


def cloudpickle_copy(model):
    return cloudpickle.loads(cloudpickle.dumps(model))


def model_of(cls=FastKLPPO, env=None, **options):
    return cls("MlpPolicy", PointEnv() if env is None else env, **{**SETTINGS, **options})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def assert_learns_like_sb3(change, **options):
    """Change a model of each class, train both, and compare what became of them."""
    ends = []
    for cls in (PPO, FastKLPPO):
        model = model_of(cls, **options).learn(64)
        change(model)
        before = weights(model)
        model.learn(128, reset_num_timesteps=False)
        assert not torch.equal(weights(model), before)
        ends.append(weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)


def test_a_replaced_policy_learns():
    other = model_of(PPO, seed=1).policy

    def replace(model):
        model.policy = copy.deepcopy(other)

    assert_learns_like_sb3(replace)


def frozen(which):
    def freeze(model):
        policy = model.policy
        parts = {
            "log_std": [policy.log_std],
            "critic": [*policy.mlp_extractor.value_net.parameters(), *policy.value_net.parameters()],
            "actor": [policy.log_std, *policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()],
            "layer": list(policy.mlp_extractor.policy_net[0].parameters()),
        }[which]
        for parameter in parts:
            parameter.requires_grad_(False)

    return freeze


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU])
@pytest.mark.parametrize("which", ["log_std", "critic", "actor", "layer"])
def test_frozen_parameters_stay_and_the_others_learn(which, activation):
    assert_learns_like_sb3(frozen(which), policy_kwargs={"activation_fn": activation})


def test_a_model_that_was_trained_with_frozen_parameters_is_loaded_and_learns(tmp_path):
    ends = []
    model = model_of(PPO)
    frozen("log_std")(model)
    model.learn(64).save(tmp_path / "model")
    for cls in (PPO, FastKLPPO):
        ends.append(weights(cls.load(tmp_path / "model", env=PointEnv(), device="cpu").learn(64)))
    assert ends[0].shape == ends[1].shape
    assert torch.isfinite(ends[1]).all()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU])
def test_gradients_of_somebody_elses_backward_pass_do_not_count(activation):
    def pollute(model):
        for parameter in model.policy.parameters():
            parameter.grad = None  # as any optimiser's zero_grad does
        states = torch.ones(4, 2)
        mean = model.policy.get_distribution(states).distribution.mean
        (1e3 * model.policy.predict_values(states).sum() + 1e3 * mean.sum()).backward()

    assert_learns_like_sb3(pollute, policy_kwargs={"activation_fn": activation})


def test_other_betas_are_followed():
    def rush(model):
        model.policy.optimizer.param_groups[0]["betas"] = (0.5, 0.9)

    assert_learns_like_sb3(rush)


def test_settings_that_this_adam_has_not_are_refused():
    model = model_of()
    model.policy.optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(UnsupportedArgument, match=r"policy\.optimizer: .* weight_decay"):
        model.learn(64)


def test_a_weight_of_the_kl_that_is_set_later_counts():
    model = model_of(prior=ScriptedPrior(), kl_coef=0.5).learn(64)
    model.kl_coef = 0.0
    model.learn(64, reset_num_timesteps=False, log_interval=1000)
    assert model.logger.name_to_value["train/kl_coef"] == 0.0
    model.kl_coef = -1.0
    with pytest.raises(UnsupportedArgument, match="kl_coef=-1"):
        model.learn(64, reset_num_timesteps=False)


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf"), lambda _: -1.0, lambda _: float("nan")])
def test_weights_of_the_kl_that_are_no_numbers_are_refused(coefficient):
    with pytest.raises(UnsupportedArgument, match="kl_coef="):
        model_of(prior=ScriptedPrior(), kl_coef=coefficient).learn(64)


def test_the_kl_in_the_reward_weighs_as_much_as_the_one_in_the_loss(monkeypatch):
    in_reward, in_loss = [], []
    query, coefficients = FastKLPPO._query_prior, FastKLPPO._coefficients

    def querying(self, prior):
        before = self._buffer.rewards.clone()
        query(self, prior)
        outputs, said = (
            [o.flatten(0, 1) for o in rows] for rows in (self._buffer.policy_outputs, self._buffer.prior_outputs)
        )
        kl = self._prior_kl(tuple(outputs), tuple(said), None)
        in_reward.append(float(((before - self._buffer.rewards).flatten() / kl).mean()))

    def noting(self):
        found = coefficients(self)
        in_loss.append(found["kl_coef"])
        return found

    monkeypatch.setattr(FastKLPPO, "_query_prior", querying)
    monkeypatch.setattr(FastKLPPO, "_coefficients", noting)
    model = model_of(prior=ScriptedPrior(), kl_coef=LinearSchedule(1.0, 0.0), kl_placement="both")
    for _ in range(2):  # a second call starts anew
        model.learn(256)
        assert in_loss == [0.75, 0.5, 0.25, 0.0]
        np.testing.assert_allclose(in_reward, in_loss, atol=1e-5)
        in_reward.clear()
        in_loss.clear()


class Counting(PointEnv):
    taken = 0

    def step(self, action):
        self.taken += 1
        return super().step(action)


def test_an_env_that_was_set_without_a_reset_is_the_one_that_is_stepped(tmp_path):
    first, second, third = Counting(), Counting(), Counting()
    model = model_of(env=DummyVecEnv([lambda: first])).learn(64)
    other = DummyVecEnv([lambda: second])
    other.reset()
    model.set_env(other, force_reset=False)
    model.learn(64, reset_num_timesteps=False)
    assert (first.taken, second.taken) == (64, 64)
    model.save(tmp_path / "model")
    last = DummyVecEnv([lambda: third])
    last.reset()
    FastKLPPO.load(tmp_path / "model", env=last, force_reset=False, device="cpu").learn(64, reset_num_timesteps=False)
    assert third.taken == 64


@pytest.mark.parametrize(
    "options",
    [
        {"kl_direction": "typo"},
        {"kl_placement": "typo"},
        {"overlap": "typo"},
        {"prior_temperature": 0.0},
        {"prior_temperature": float("nan")},
        {"guard": True, "kl_placement": "reward"},
        {"cuda_graph": True},
        {"kl_coef": float("nan")},
    ],
)
def test_what_load_is_given_is_checked_as_the_constructor_checks_it(tmp_path, options):
    model_of(prior=ScriptedPrior()).save(tmp_path / "model")
    with pytest.raises(UnsupportedArgument, match="|".join(options)):
        FastKLPPO.load(tmp_path / "model", env=PointEnv(), prior=ScriptedPrior(), device="cpu", **options)


def test_a_guard_that_load_is_given_guards(tmp_path):
    model_of(prior=ScriptedPrior()).save(tmp_path / "model")
    model = FastKLPPO.load(tmp_path / "model", env=PointEnv(), prior=ScriptedPrior(), device="cpu", guard=True)
    assert model.guard["floor"] >= 0
    model.save(tmp_path / "guarded")
    assert FastKLPPO.load(tmp_path / "guarded", device="cpu").guard == model.guard


def test_a_prior_needs_states_of_a_box():
    class Numbered(DiscretePointEnv):
        observation_space = PointEnv.action_space.__class__(-2, 2, (2,), np.int64)

        def reset(self, **options):
            return super().reset(**options)[0].astype(np.int64), {}

        def step(self, action):
            state, *rest = super().step(action)
            return state.astype(np.int64), *rest

    class Seeing(ScriptedPrior):
        def query(self, state, instruction_id):
            assert state.dtype == torch.float32
            return super().query(state, instruction_id)

    prior = Seeing("categorical")
    model_of(env=Numbered(), prior=prior).learn(64)
    assert prior.queried == 64


@pytest.mark.parametrize("copied", [cloudpickle_copy, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_of_a_trained_model_learns_as_the_model_does(copied):
    model = model_of(env=DummyVecEnv([PointEnv]), prior=ScriptedPrior()).learn(128)
    other = copied(model)
    for one in (model, other):
        one.set_env(DummyVecEnv([PointEnv]))
        one.set_random_seed(7)
        one.learn(128, reset_num_timesteps=False)
    assert torch.equal(weights(model), weights(other))


@pytest.mark.parametrize("options", [{"n_epochs": 0}, {"batch_size": 2.5}, {"ent_coef": "auto"}])
def test_numbers_that_no_update_can_be_made_with_are_refused(options):
    with pytest.raises(UnsupportedArgument, match=next(iter(options))):
        model_of(**options)
