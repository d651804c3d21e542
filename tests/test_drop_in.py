"""What a user of stable-baselines3 types keeps its meaning."""

import argparse
import copy
import inspect
import json

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from lago_fast import FastKLPPO, make_metaworld

OURS = {
    "prior",
    "kl_coef",
    "target_prior_kl",
    "kl_direction",
    "kl_placement",
    "prior_temperature",
    "warm_start",
    "guard",
    "impl",
}


def test_the_signature_is_sb3s_and_then_keyword_only():
    theirs = inspect.signature(PPO.__init__).parameters
    ours = inspect.signature(FastKLPPO.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
    added = {name: p for name, p in ours.items() if name not in theirs}
    assert set(added) == OURS
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added.values())


def test_one_changed_import_trains_on_metaworld_with_callbacks(tmp_path):
    env = make_metaworld(["reach"], 2, max_episode_steps=20, normalize_reward=True)
    evaluation = make_metaworld(["reach"], 1, max_episode_steps=20, seed=9)
    model = FastKLPPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, device="cpu", seed=0)
    callbacks = [
        CheckpointCallback(save_freq=32, save_path=str(tmp_path), name_prefix="model"),
        EvalCallback(evaluation, n_eval_episodes=2, eval_freq=32, verbose=0),
    ]
    model.learn(128, callback=callbacks)
    assert list(tmp_path.glob("model_*_steps.zip"))
    assert callbacks[1].best_mean_reward > -np.inf
    # episodes of 20 steps and one reset row each: every third block of the 32 rows holds an end
    assert model.ep_info_buffer[0]["l"] == 20
    assert model.num_timesteps < 2 * 32 * 3
    env.close()
    evaluation.close()


def test_a_model_of_sb3_loads_here_and_ours_there(tmp_path):
    env = make_vec_env("CartPole-v1", n_envs=1)
    observation = env.reset()
    for writer, reader in ((PPO, FastKLPPO), (FastKLPPO, PPO)):
        model = writer("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu", seed=0).learn(16)
        model.save(tmp_path / "model.zip")
        loaded = reader.load(tmp_path / "model.zip", env=env, device="cpu")
        np.testing.assert_array_equal(
            loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
        )


def small_model(**options):
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    return FastKLPPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0, **options)


def test_learning_goes_on_where_it_stopped_or_starts_anew():
    model = small_model().learn(32)
    assert model.num_timesteps == 32
    assert model.learn(32, reset_num_timesteps=False).num_timesteps == 64
    assert model.learn(32).num_timesteps == 32


def test_every_log_format_gets_sb3s_keys(tmp_path):
    records = {}
    for algorithm in (PPO, FastKLPPO):
        env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
        model = algorithm("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, device="cpu", seed=0)
        folder = tmp_path / algorithm.__name__
        model.set_logger(configure(str(folder), ["stdout", "log", "csv", "json", "tensorboard"]))
        model.learn(256)
        model.logger.close()
        records[algorithm] = set(json.loads((folder / "progress.json").read_text().splitlines()[-1]))
        assert (folder / "progress.csv").stat().st_size
        assert list(folder.glob("events.out.tfevents.*"))
    assert records[FastKLPPO] == records[PPO]


def test_parameters_are_read_and_set_as_there():
    first, second = small_model(), small_model()
    first.learn(64)
    assert set(first.get_parameters()) == {"policy", "policy.optimizer"}
    second.set_parameters(copy.deepcopy(first.get_parameters()))  # which are tensors, not copies
    observation = first.get_env().reset()
    np.testing.assert_array_equal(
        second.predict(observation, deterministic=True)[0], first.predict(observation, deterministic=True)[0]
    )
    # and both go on alike: the optimiser's state came along
    for model in (first, second):
        model.set_random_seed(5)
        model.set_env(make_vec_env("CartPole-v1", n_envs=2, seed=3))
        model.learn(64)
    for ours, theirs in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_predict_takes_one_observation_or_many():
    model = small_model()
    one, state = model.predict(np.zeros(4, np.float32), deterministic=True)
    many, _ = model.predict(np.zeros((5, 4), np.float32), deterministic=True)
    assert one.shape == ()
    assert many.shape == (5,)
    assert (many == one).all()
    assert state is None


class ReadsLocals(BaseCallback):
    """What callbacks in the wild read from `self.locals` and the model."""

    def __init__(self):
        super().__init__()
        self.calls = dict.fromkeys(("training_start", "rollout_start", "step", "rollout_end", "training_end"), 0)

    def _on_training_start(self):
        self.calls["training_start"] += 1
        assert self.locals["total_timesteps"] == 64

    def _on_rollout_start(self):
        self.calls["rollout_start"] += 1

    def _on_step(self):
        self.calls["step"] += 1
        assert len(self.locals["infos"]) == self.training_env.num_envs == 2
        assert self.locals["dones"].shape == self.locals["rewards"].shape == (2,)
        assert self.locals["actions"].shape == (2,)
        assert self.locals["self"] is self.model
        assert self.locals["env"] is self.training_env
        return True

    def _on_rollout_end(self):
        self.calls["rollout_end"] += 1
        assert np.isfinite(np.asarray(self.model.rollout_buffer.advantages)).all()

    def _on_training_end(self):
        self.calls["training_end"] += 1


@pytest.mark.filterwarnings("ignore:rich is experimental")  # tqdm's own, through ProgressBarCallback
def test_callbacks_are_called_and_read_what_they_read_there(tmp_path):
    reads = ReadsLocals()
    every = EveryNTimesteps(32, CheckpointCallback(1, str(tmp_path), "every"))
    small_model().learn(64, callback=CallbackList([reads, every, ProgressBarCallback()]))
    assert reads.calls == {"training_start": 1, "rollout_start": 2, "step": 32, "rollout_end": 2, "training_end": 1}
    assert len(list(tmp_path.glob("every_*"))) == 2
    seen = []
    small_model().learn(32, callback=lambda variables, _: seen.append(variables["n_rollout_steps"]) is None)
    assert len(seen) == 16


def test_a_callback_stops_learning():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 20

    assert small_model().learn(1000, callback=Stop()).num_timesteps == 20
    evaluation = make_vec_env("CartPole-v1", n_envs=1, seed=1)
    stopped = small_model().learn(
        1000,
        callback=EvalCallback(
            evaluation,
            eval_freq=8,
            n_eval_episodes=1,
            callback_on_new_best=StopTrainingOnRewardThreshold(1, 0),
            verbose=0,
        ),
    )
    assert stopped.num_timesteps == 16


def test_sb3s_own_warning_of_a_truncated_minibatch_is_given():
    with pytest.warns(UserWarning, match="truncated mini-batch"):
        FastKLPPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=16, batch_size=20, device="cpu")


def test_the_zoo_trains_with_it(tmp_path, monkeypatch):
    zoo = pytest.importorskip("rl_zoo3", reason="rl_zoo3 is not installed: pip install rl_zoo3")
    manager = pytest.importorskip("rl_zoo3.exp_manager")
    monkeypatch.setitem(zoo.ALGOS, "ppo", FastKLPPO)
    arguments = argparse.Namespace(algo="ppo", env="CartPole-v1", vec_env="dummy")
    config = tmp_path / "ppo.yml"
    config.write_text(
        "CartPole-v1: {n_envs: 2, n_timesteps: 64, policy: MlpPolicy, n_steps: 16, batch_size: 16, n_epochs: 1}\n"
    )
    experiment = manager.ExperimentManager(
        arguments,
        "ppo",
        "CartPole-v1",
        str(tmp_path),
        n_timesteps=64,
        config=str(config),
        device="cpu",
        verbose=0,
        log_interval=1,
    )
    model, _ = experiment.setup_experiment()
    experiment.learn(model)
    assert type(model) is FastKLPPO
    assert model.num_timesteps == 64
