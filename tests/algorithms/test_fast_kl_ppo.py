"""What the prior does to training, what is refused, and what survives saving."""

import json
import zipfile

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior

SMALL = {"n_steps": 32, "batch_size": 64, "n_epochs": 4, "device": "cpu", "seed": 0, "learning_rate": 3e-3}


def point_env(kind="gaussian", n_envs=8):
    return make_vec_env(PointEnv if kind == "gaussian" else DiscretePointEnv, n_envs=n_envs, seed=0)


def mean_return(model, kind="gaussian", episodes=20):
    env = (PointEnv if kind == "gaussian" else DiscretePointEnv)()
    total = 0.0
    for seed in range(episodes):
        obs, _ = env.reset(seed=1000 + seed)
        truncated = False
        while not truncated:
            obs, reward, _, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
            total += reward
    return total / episodes


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_learns_a_tiny_task_without_a_prior(kind):
    model = FastKLPPO("MlpPolicy", point_env(kind), **SMALL)
    before = mean_return(model, kind)
    model.learn(12_000)
    assert mean_return(model, kind) > before + 3


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_a_good_prior_helps_and_is_asked_once_per_step(kind):
    returns = []
    for prior in (None, ScriptedPrior(kind)):
        model = FastKLPPO("MlpPolicy", point_env(kind), **SMALL, prior=prior, kl_coef=0.5)
        model.learn(5 * 256)
        returns.append(mean_return(model, kind))
    assert returns[1] > returns[0] + 0.5
    assert prior.queried == 5 * 256


@pytest.mark.parametrize("direction", ["policy_prior", "prior_policy"])
@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_the_kl_falls_when_it_weighs_most(kind, direction):
    kls = []
    model = FastKLPPO(
        "MlpPolicy", point_env(kind), **SMALL, prior=ScriptedPrior(kind), kl_coef=10.0, kl_direction=direction
    )
    model.set_logger(configure(None, []))
    for _ in range(6):
        model.learn(256, reset_num_timesteps=False, log_interval=1000)
        kls.append(model.logger.name_to_value["train/prior_kl"])
    assert kls[-1] < 0.8 * kls[0]


def test_kl_as_a_reward_lowers_the_rewards_by_it():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), kl_coef=0.5, kl_placement="reward")
    model.learn(256)
    buffer = model.rollout_buffer
    mean, log_std = (o.flatten(0, 1) for o in buffer.policy_outputs)
    prior_mean, prior_log_std = (o.flatten(0, 1) for o in buffer.prior_outputs)
    policy = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(policy, torch.distributions.Normal(prior_mean, prior_log_std.exp())).sum(-1)
    # the env's reward is minus the distance after the step: the state of the next row of the same env
    distance = buffer.observations[1:15].norm(dim=-1)  # no end within these rows
    expected = -distance - 0.5 * kl.reshape(buffer.rewards.shape)[:14]
    torch.testing.assert_close(buffer.rewards[:14], expected, rtol=1e-3, atol=1e-3)


def test_warm_start_leaves_the_policy_at_the_prior():
    model = FastKLPPO("MlpPolicy", point_env(), **{**SMALL, "n_epochs": 40}, prior=ScriptedPrior(), warm_start=True)
    model.learn(256)
    state = torch.rand(64, 2) * 2 - 1
    with torch.no_grad():
        mean = model.policy.get_distribution(state).distribution.mean
    assert (mean - (-2 * state).clamp(-1, 1)).square().mean() < 0.05


def test_auto_coefficient_moves_towards_its_target():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), kl_coef="auto", target_prior_kl=0.01)
    model.set_logger(configure(None, []))
    coefficients = []
    for _ in range(3):
        model.learn(256, reset_num_timesteps=False, log_interval=1000)
        coefficients.append(model.logger.name_to_value["train/kl_coef"])
    assert coefficients[1] == pytest.approx(1.5 * coefficients[0])
    assert coefficients[2] == pytest.approx(1.5 * coefficients[1])


def test_schedule_is_followed():
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior(), kl_coef=LinearSchedule(0.4, 0.0))
    model.set_logger(configure(None, []))
    model.learn(512, log_interval=1000)
    assert model.logger.name_to_value["train/kl_coef"] == pytest.approx(0.0)


def model_data(path):
    """Return what a saved model holds beside its tensors."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("data"))


def test_save_and_load(tmp_path):
    prior = ScriptedPrior()
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=prior, kl_coef=LinearSchedule(0.4, 0.1))
    model.learn(512)
    model.save(tmp_path / "model.zip")
    assert not {"prior", "_buffer", "rollout_buffer"} & model_data(tmp_path / "model.zip").keys()
    obs = np.random.default_rng(0).uniform(-1, 1, (9, 2)).astype(np.float32)
    loaded = FastKLPPO.load(tmp_path / "model.zip", device="cpu")
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    with pytest.raises(errors.PriorMismatch, match=r"load\(prior="):
        FastKLPPO.load(tmp_path / "model.zip", env=point_env(), device="cpu").learn(256)
    with pytest.raises(errors.PriorMismatch, match="other"):
        FastKLPPO.load(tmp_path / "model.zip", env=point_env(), device="cpu", prior=ScriptedPrior(digest="other"))
    again = FastKLPPO.load(tmp_path / "model.zip", env=point_env(), device="cpu", prior=prior)
    again.learn(256, reset_num_timesteps=False)
    assert again.num_timesteps == 512 + 256


def test_a_trainable_prior_is_refused():
    prior = ScriptedPrior()
    prior.weight.requires_grad_(True)
    with pytest.raises(errors.TrainablePrior, match="prior"):
        FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=prior)


def test_a_prior_for_another_space_is_refused():
    with pytest.raises(errors.PriorMismatch, match="categorical"):
        FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=ScriptedPrior("categorical"))
    wide = ScriptedPrior()
    wide.state_dim = 3
    with pytest.raises(errors.PriorMismatch, match="3 numbers, the env has 2"):
        FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=wide)
    wordy = ScriptedPrior()
    wordy.instructions = ["one", "two"]
    with pytest.raises(errors.PriorMismatch, match="instructions"):
        FastKLPPO("MlpPolicy", point_env(), **SMALL, prior=wordy)


def test_normalised_observations_never_reach_a_prior():
    env = VecNormalize(point_env())
    with pytest.raises(errors.UnsupportedArgument, match="norm_obs"):
        FastKLPPO("MlpPolicy", env, **SMALL, prior=ScriptedPrior())
    model = FastKLPPO("MlpPolicy", VecNormalize(point_env(), norm_obs=False), **SMALL, prior=ScriptedPrior())
    model.learn(256)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"rollout_buffer_kwargs": {"a": 1}}, "rollout_buffer_kwargs"),
        ({"kl_direction": "reverse"}, "kl_direction"),
        ({"kl_placement": "advantage"}, "kl_placement"),
        ({"prior_temperature": 0.0}, "prior_temperature"),
        ({"warm_start": True}, "warm_start"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_coef": "adaptive"}, "kl_coef"),
        ({"kl_coef": "auto"}, "target_prior_kl"),
        ({"target_prior_kl": 1.0}, "target_prior_kl"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(arguments, names):
    with pytest.raises(errors.UnsupportedArgument, match=names):
        FastKLPPO("MlpPolicy", point_env(), **SMALL, **arguments)


def test_impl_is_refused_by_name_or_used():
    with pytest.raises(errors.ImplUnavailable, match="cuda"):
        FastKLPPO("MlpPolicy", point_env(), **SMALL, impl="cuda")
    model = FastKLPPO("MlpPolicy", point_env(), **SMALL, impl="reference")
    assert set(model.impls.values()) == {"reference"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal needs a machine without CUDA")
def test_cuda_asked_for_and_absent():
    with pytest.raises(errors.DeviceUnavailable, match="device='cuda'"):
        FastKLPPO("MlpPolicy", point_env(), **{**SMALL, "device": "cuda"})


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_nan_from_an_env_is_named(what):
    class Broken(PointEnv):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            if self.t == 5:
                obs, reward = (obs * np.nan, reward) if what == "observation" else (obs, float("nan"))
            return obs, reward, terminated, truncated, info

    model = FastKLPPO("MlpPolicy", make_vec_env(Broken, n_envs=2), **SMALL)
    with pytest.raises(errors.NonFiniteError, match=f"{what} of env 0"):
        model.learn(256)
