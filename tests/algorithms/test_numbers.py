"""NaN and infinity are named with env and step within the iteration, kept for inspection, and undone."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.checkpoint import read_tensors
from lago_fast.algorithms.guard import GuardSettings
from lago_fast.envs.sb3_adapter import SB3VecEnv
from tests.algorithms.array_points import ArrayPoints
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior

OPTIONS = {"n_steps": 20, "batch_size": 20, "n_epochs": 2, "device": "cpu", "seed": 0}
ROWS = 20 * 3


class Broken(PointEnv):
    """Env 1 of three: at the 30th step of its life an observation or a reward is bad, once."""

    made = 0

    def __init__(self, what=None, value=np.nan):
        self.rank, Broken.made = Broken.made % 3, Broken.made + 1
        self.what, self.value, self.life = what, value, 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.life += 1
        if self.rank == 1 and self.life == 30:
            if self.what == "observation":
                obs = np.array([0.0, self.value], np.float32)
            elif self.what == "reward":
                reward = self.value
        return obs, reward, terminated, truncated, info


class BrokenDiscrete(Broken, DiscretePointEnv):
    action_space = DiscretePointEnv.action_space


def model_of(tmp_path, what, value=np.nan, env=Broken, wrap=lambda env: env, **options):
    Broken.made = 0
    vec_env = wrap(make_vec_env(lambda: env(what, value), n_envs=3, seed=0))
    model = FastKLPPO("MlpPolicy", vec_env, **{**OPTIONS, **options})
    model.set_logger(configure(str(tmp_path), []))
    return model


def saved_at(message):
    return read_tensors(Path(re.search(r"saved to (\S+\.safetensors)", message)[1]))


class Doubling(VecEnvWrapper):
    """Every reward of an episode from step 5 on is as bad as the worst: their sum overflows."""

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observation, reward, done, infos = self.venv.step_wait()
        self.worst = np.maximum(getattr(self, "worst", reward), reward)
        return observation, np.where(self.worst > 1e38, self.worst, reward).astype(np.float32), done, infos


CASES = {
    # the observation after the 30th step is the one acted on at step 10 of the second rollout
    "observation": ("observation", np.nan, {}, "observation of env 1 at step 10"),
    "infinite observation": ("observation", np.inf, {}, "observation of env 1 at step 10"),
    "reward": ("reward", -np.inf, {}, "reward of env 1 at step 9"),
    "reward that overflows": ("reward", 3e38, {"gae_lambda": 1.0, "wrap": Doubling}, "(advantage|return) of env 1 at"),
    # sampling from what such a policy says fails at once
    "discrete": ("observation", np.nan, {"env": BrokenDiscrete}, "observation of env 1 at step 10"),
    # which would spread to every env
    "VecNormalize": ("observation", np.nan, {"wrap": VecNormalize}, "observation of env 1 after step 9"),
    "VecNormalize reward": ("reward", np.nan, {"wrap": VecNormalize}, "reward of env 1 after step 9"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_number_of_an_env_is_named_and_its_rows_saved(case, tmp_path):
    what, value, options, says = CASES[case]
    model = model_of(tmp_path, what, value, **options)
    with pytest.raises(errors.NonFiniteError, match=f"env: {says}") as raised:
        model.learn(10 * ROWS)
    assert model.iterations == 1
    tensors, figures = saved_at(str(raised.value))
    assert figures["iteration"] == 1
    column = tensors["rewards" if what == "reward" else "observation"]
    assert column.shape[:2] >= (10, 3)
    for parameter in model.policy.parameters():
        assert torch.isfinite(parameter).all()
    if case.startswith("VecNormalize"):  # its statistics are what they were before the rollout
        assert np.isfinite(model.get_env().obs_rms.mean).all()
        assert np.isfinite(model.get_env().ret_rms.var)
    if case != "reward that overflows":  # the others are bad once
        updates = model._n_updates
        model.learn(ROWS, reset_num_timesteps=False)
        assert model._n_updates > updates


@pytest.mark.parametrize("case", CASES)
def test_skipping_goes_on_without_the_bad_rollout(case, tmp_path, caplog):
    what, value, options, says = CASES[case]
    model = model_of(tmp_path, what, value, on_nan="skip", **options)
    with caplog.at_level(logging.WARNING):
        model.learn(4 * ROWS)
    skipped = [r.message for r in caplog.records if "is skipped" in r.message]
    assert (len(skipped) == 1) == (case != "reward that overflows")  # which goes on and on
    assert re.search(f"iteration 1 is skipped: env: {says}", skipped[0])
    assert model._n_updates == OPTIONS["n_epochs"] * (model.iterations - len(skipped))
    assert model.iterations >= 4
    for parameter in model.policy.parameters():
        assert torch.isfinite(parameter).all()


def test_ten_bad_rollouts_in_a_row_end_it(tmp_path):
    class Hopeless(PointEnv):
        def step(self, _action):
            return np.full(2, np.nan, np.float32), 0.0, False, False, {}

    model = FastKLPPO("MlpPolicy", make_vec_env(Hopeless, n_envs=3), **OPTIONS, on_nan="skip")
    model.set_logger(configure(str(tmp_path), []))
    with pytest.raises(errors.NonFiniteError, match="10 iterations before were skipped"):
        model.learn(100 * ROWS)
    assert model.iterations == 10


@pytest.mark.parametrize(("kind", "value"), [("gaussian", np.nan), ("gaussian", np.inf), ("categorical", np.nan)])
def test_a_bad_answer_of_the_prior_is_named(kind, value, tmp_path):
    class Bad(ScriptedPrior):
        def query(self, state, instruction_id):
            answer = super().query(state, instruction_id)
            column = answer.log_probs if kind == "categorical" else answer.log_std
            column[7 * 3 + 2] = value  # step 7 of env 2
            return answer

    env = PointEnv if kind == "gaussian" else DiscretePointEnv
    model = FastKLPPO("MlpPolicy", make_vec_env(env, n_envs=3), **OPTIONS, prior=Bad(kind))
    model.set_logger(configure(str(tmp_path), []))
    with pytest.raises(errors.NonFiniteError, match=r"prior in the state of env 2 at step 7 .*lago info") as raised:
        model.learn(ROWS)
    assert "prior.0" in saved_at(str(raised.value)).tensors


class BadWhenItPlays(ScriptedPrior):
    """Says NaN of env 1 at the third step of its own episodes; a rollout's rows are asked for all at once."""

    plays = 0

    def query(self, state, instruction_id):
        answer = super().query(state, instruction_id)
        if len(state) == 3:
            self.plays += 1
            if self.plays == 3:
                answer.mean[1] = np.nan
        return answer


@pytest.mark.parametrize("on_nan", ["raise", "skip"])
def test_a_bad_answer_of_a_prior_that_plays_is_named_before_the_env_steps(on_nan, tmp_path, caplog):
    steps = []

    class Seen(PointEnv):
        def step(self, action):
            assert np.isfinite(action).all()
            steps.append(action)
            return super().step(action)

    env = make_vec_env(Seen, n_envs=3)
    guard = GuardSettings(episodes=2, most_episodes=2, probe_share=1.0)
    model = FastKLPPO("MlpPolicy", env, **OPTIONS, prior=BadWhenItPlays("gaussian"), guard=guard, on_nan=on_nan)
    model.set_logger(configure(str(tmp_path), []))
    said = r"prior\.0 of the prior in the state of env 1 at step 2 of the prior's own episodes .*lago info"
    if on_nan == "raise":
        with pytest.raises(errors.NonFiniteError, match=said) as raised:
            model.learn(20 * ROWS)
        kept = saved_at(str(raised.value)).tensors
        assert kept["prior.0"][1].isnan().any()
        assert kept["observation"].isfinite().all()
        assert model.num_timesteps == len(steps)
    else:
        with caplog.at_level("WARNING"):
            model.learn(20 * ROWS)
        assert re.search(said, caplog.text)
        assert model.guard_state["heard"] == [1.0]


def policy_of(model):
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def test_a_loss_that_becomes_nan_is_undone_and_its_minibatch_saved(tmp_path):
    model = model_of(tmp_path, None)
    model.learn(2 * ROWS)
    before, updates = policy_of(model), model._n_updates
    buffer = model.rollout_buffer
    kept = buffer.log_probs[4, 2].clone()
    buffer.log_probs[4, 2] = -1e30  # an exploding ratio
    with pytest.raises(
        errors.NonFiniteError, match=r"loss: .*most extreme row is env 2 at step 4\); .*undone"
    ) as raised:
        model.train()
    after = policy_of(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model._n_updates == updates
    tensors, _ = saved_at(str(raised.value))
    place = ((tensors["env"] == 2) & (tensors["step"] == 4)).nonzero()
    assert len(place) == 1
    assert tensors["log_probs"][place.item()] == torch.tensor(-1e30)
    assert torch.equal(tensors["policy.log_std"], before["log_std"])
    # and what was put back can be trained further
    buffer.log_probs[4, 2] = kept
    model.train()
    assert not torch.equal(policy_of(model)["log_std"], before["log_std"])


def test_gradients_of_the_last_minibatch_are_checked_too(tmp_path):
    model = model_of(tmp_path, None)
    model.learn(ROWS)
    before = policy_of(model)
    step, steps = model._optimize, []

    def poisoned(parameters):
        steps.append(1)
        if len(steps) == 6:  # the last of two epochs of three
            parameters[0].grad.fill_(torch.inf)
        step(parameters)

    model._optimize = poisoned
    with pytest.raises(errors.NonFiniteError, match=r"gradients: .*gradient step 5"):
        model.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy_of(model).items())
    model.on_nan = model._numbers.on_nan = "skip"
    steps.clear()
    model.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy_of(model).items())


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam, torch.optim.SGD])
def test_a_bias_that_forbids_an_action_trains_on(optimizer):
    kwargs = {} if optimizer is None else {"optimizer_class": optimizer}
    model = FastKLPPO("MlpPolicy", make_vec_env(DiscretePointEnv, n_envs=3), **OPTIONS, policy_kwargs=kwargs)
    model.policy.action_net.bias.data[2] = -torch.inf
    before = policy_of(model)
    model.learn(2 * ROWS)
    assert not (model.rollout_buffer.actions == 2).any()
    after = policy_of(model)
    assert after["action_net.bias"][2] == -torch.inf
    assert not torch.equal(after["action_net.weight"], before["action_net.weight"])
    assert all(tensor[tensor != -torch.inf].isfinite().all() for tensor in after.values())


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("max_grad_norm", [0.5, np.inf])
def test_an_infinite_gradient_is_found_whatever_the_optimiser(optimizer, max_grad_norm, tmp_path):
    kwargs = {} if optimizer is None else {"optimizer_class": optimizer}
    model = model_of(tmp_path, None, policy_kwargs=kwargs, max_grad_norm=max_grad_norm)
    model.learn(ROWS)
    step, steps = model._optimize, []

    def poisoned(parameters):
        steps.append(1)
        if len(steps) == 6:  # the last of two epochs of three
            parameters[-1].grad[-1] = -torch.inf
        step(parameters)

    model._optimize = poisoned
    with pytest.raises(errors.NonFiniteError, match="gradients: "):
        model.train()


def test_divergence_is_reported_before_it_is_nan_and_once(tmp_path, caplog):
    model = model_of(tmp_path, None, learning_rate=1.0)
    with caplog.at_level(logging.WARNING, logger="lago_fast"):
        model.learn(ROWS)
    assert re.search(r"train/approx_kl diverges: [\d.e+]+ nats, where 1 are much; lower learning_rate", caplog.text)
    caplog.clear()
    numbers = model._numbers
    for prior_kl, warned in ((50.0, 0), (500.0, 1), (900.0, 0), (3.0, 0), (200.0, 1)):
        numbers.passed({"train/approx_kl": 0.01, "train/prior_kl": prior_kl})
        assert caplog.text.count("prior_kl diverges") == warned
        caplog.clear()


def test_a_policy_that_follows_its_prior_does_not_diverge(tmp_path, caplog):
    numbers = model_of(tmp_path, None)._numbers
    # nats from the old policy, nats from the prior
    for approx_kl, prior_kl, warned in ((0.01, 6.0, 0), (3.0, 2.0, 0), (3.0, 0.5, 1), (0.01, 0.5, 0), (3.0, 0.4, 1)):
        numbers.passed({"train/approx_kl": approx_kl, "train/prior_kl": prior_kl})
        assert caplog.text.count("approx_kl diverges") == warned
        caplog.clear()
    for logged in ({"train/approx_kl": 3.0}, {"train/approx_kl": 3.0, "train/prior_kl": 1.0}):  # how far before?
        model_of(tmp_path, None)._numbers.passed(logged)
        assert caplog.text.count("approx_kl diverges") == 1
        caplog.clear()


def test_without_a_folder_it_says_that_nothing_was_saved(tmp_path):
    model = model_of(tmp_path, "reward")
    model.set_logger(Logger(folder=None, output_formats=[]))
    with pytest.raises(errors.NonFiniteError, match="nothing was saved"):
        model.learn(3 * ROWS)
    model = model_of(tmp_path / "file", "reward")
    model.logger.dir = str(tmp_path / "occupied" / "deeper")
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(errors.NonFiniteError, match="could not be saved"):
        model.learn(3 * ROWS)


def test_another_word_is_refused():
    with pytest.raises(errors.UnsupportedArgument, match="on_nan='ignore'"):
        FastKLPPO("MlpPolicy", make_vec_env(PointEnv), **OPTIONS, on_nan="ignore")


@pytest.mark.parametrize(("life", "steps"), [(16, "step 15"), (20, "step 19")], ids=["of an episode", "of the rollout"])
def test_a_bad_last_observation_is_named_as_such(life, steps, tmp_path):
    class BadAtTheEnd(PointEnv):
        life = 0

        def step(self, action):
            observation, *rest = super().step(action)
            self.life += 1
            return observation * (np.nan if self.life == life else 1), *rest

    model = FastKLPPO("MlpPolicy", make_vec_env(BadAtTheEnd, n_envs=3), **OPTIONS)
    model.set_logger(configure(str(tmp_path), []))
    with pytest.raises(errors.NonFiniteError, match=f"the last observation of env 0, after {steps} of this rollout"):
        model.learn(ROWS)


@pytest.mark.parametrize("overlap", ["none", "update"])
def test_an_update_that_is_skipped_leaves_no_half_rollout(overlap, tmp_path, caplog):
    class Spoil(BaseCallback):
        rollouts = 0

        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.rollouts += 1
            if self.rollouts == 2:
                self.model.rollout_buffer.advantages[0, 0] = np.nan

    options = {"n_steps": 16, "batch_size": 32, "n_epochs": 1, "device": "cpu", "seed": 3, "on_nan": "skip"}
    model = FastKLPPO("MlpPolicy", SB3VecEnv(ArrayPoints(8)), **options, overlap=overlap)
    model.set_logger(configure(str(tmp_path), []))
    model.learn(16 * 8 * 5, callback=Spoil())
    assert model.num_timesteps >= 16 * 8 * 5
    assert caplog.text.count("is skipped") == 1
