"""What a user of stable-baselines3 types keeps its meaning.

What is promised, and the test that holds it; here where no file is named, else below tests/algorithms:

    spaces of actions and observations, policies, extractors,   test_every_space.py test_same_seed_same_training
      net_arch, shared or separate, gSDE
    a prior where there is no form for one                      test_every_space.py test_a_prior_without_a_closed_kl...
    VecNormalize (also with the array lane), VecFrameStack,     test_every_space.py test_same_seed_same_training_...
      VecMonitor
    callback classes, lists, early stop                         test_every_callback_class_..., test_a_callback_stops...
    self.locals                                                 test_self_locals_are_those_of_stable_baselines3
    logger formats and keys                                     test_every_log_format_gets_sb3s_keys
    set_env                                                     test_another_env_is_taken
    set_parameters, get_parameters                              test_parameters_are_read_and_set_as_there
    predict                                                     test_predict_takes_one_observation_or_many
      of every space                                            test_every_space.py test_models_are_read_by_both...
    reset_num_timesteps=False                                   test_learning_goes_on_where_it_stopped_or_starts_anew
    rollout_buffer.advantages, .returns                         test_every_space.py test_the_buffer_reads_as_arrays
    target_kl                                                   test_sb3_parity.py test_target_kl_stops_where_sb3_stops
    warnings                                                    test_the_warnings_are_those_of_stable_baselines3
    models of SB3 load here, ours there                         test_every_space.py test_models_are_read_by_both...
      guided and guarded ones too                               test_every_space.py test_a_guided_guarded_model...
    rl_zoo3                                                     test_the_zoo_trains_with_it, where it is installed
    the same weights after several iterations                   test_sb3_parity.py test_same_seed_same_training:
      (impl="reference" and "auto", kl_coef=0, DummyVecEnv)       rtol 1e-3, atol 1e-4
    gymnasium vector envs                                       test_gymnasium_vector.py
"""

import argparse
import copy
import inspect
import json
import re
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecMonitor, VecNormalize

from lago_fast import FastKLPPO, make_metaworld
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.stage_clock import STAGES
from lago_fast.envs.sb3_adapter import SB3VecEnv
from tests.algorithms.array_points import ArrayPoints

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
    "on_nan",
    "step_timeout_s",
    "overlap",
    "cuda_graph",
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
    assert records[PPO] < records[FastKLPPO]
    # our own are the seconds of the stages
    assert records[FastKLPPO] - records[PPO] <= {f"time/{stage}_s" for stage in STAGES}


def test_parameters_are_read_and_set_as_there(tmp_path):
    first, second = small_model(), small_model()
    first.learn(64)
    assert set(first.get_parameters()) == {"policy", "policy.optimizer"}
    second.set_parameters(copy.deepcopy(first.get_parameters()))  # which are tensors, not copies
    first.save(tmp_path / "model.zip")
    third = small_model()
    third.set_parameters(str(tmp_path / "model.zip"))
    observation = first.get_env().reset()
    np.testing.assert_array_equal(
        third.predict(observation, deterministic=True)[0], first.predict(observation, deterministic=True)[0]
    )
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


def test_a_saved_policy_is_read_where_this_package_is_not(tmp_path):
    model = small_model().learn(64)
    model.policy.save(tmp_path / "policy.zip")
    observation = model.get_env().reset()
    reads = f"""
import sys
sys.modules["lago_fast"] = None
from stable_baselines3.common.policies import ActorCriticPolicy
policy = ActorCriticPolicy.load({str(tmp_path / "policy.zip")!r})
print(policy.predict({observation.tolist()}, deterministic=True)[0].tolist(), policy.optimizer.defaults["eps"])
"""
    told = subprocess.run([sys.executable, "-c", reads], capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"{model.predict(observation, deterministic=True)[0].tolist()} 1e-05"


def test_an_env_that_cannot_be_asked_for_more_than_it_has(tmp_path):
    class Wrapper(VecEnvWrapper):
        def __getattr__(self, name):
            return getattr(self, name + "_")

        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            return self.venv.step_wait()

    model = FastKLPPO("MlpPolicy", Wrapper(make_vec_env("CartPole-v1", n_envs=2)), n_steps=16, batch_size=32)
    model.learn(32, callback=CheckpointEvery(tmp_path / "checkpoints", 1))
    assert model.num_timesteps == 32


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


LOCALS_OF_A_STEP = (
    *("self", "env", "callback", "rollout_buffer", "n_rollout_steps", "n_steps", "obs_tensor", "actions", "values"),
    *("log_probs", "clipped_actions", "new_obs", "rewards", "dones", "infos"),
)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_self_locals_are_those_of_stable_baselines3(env_id):
    class Record(BaseCallback):
        def __init__(self):
            super().__init__()
            self.steps = []

        def _on_step(self):
            seen = {name: self.locals[name] for name in LOCALS_OF_A_STEP}
            self.steps.append({name: copy.deepcopy(seen[name]) for name in seen if name not in LOCALS_OF_A_STEP[:4]})
            return True

    records = []
    for algorithm in (PPO, FastKLPPO):
        record = Record()
        env = make_vec_env(env_id, n_envs=2, seed=0)
        algorithm("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu", seed=0).learn(32, callback=record)
        records.append(record.steps)
    for theirs, ours in zip(*records, strict=True):
        for name in ("obs_tensor", "actions", "values", "log_probs", "clipped_actions", "new_obs", "rewards", "dones"):
            assert np.shape(ours[name]) == np.shape(theirs[name]), name
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert [set(info) for info in ours["infos"]] == [set(info) for info in theirs["infos"]]
        assert ours["n_steps"] == theirs["n_steps"]


def test_self_locals_are_there_on_the_array_lane():
    seen = []

    def record(variables, _):
        seen.append({name: variables[name] for name in LOCALS_OF_A_STEP})
        return True

    env = SB3VecEnv(ArrayPoints(4))
    model = FastKLPPO("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu", seed=0).learn(128, callback=record)
    assert len(seen) >= 32
    for step in seen:
        assert step["self"] is model
        assert step["env"] is env
        assert len(step["infos"]) == 4
        assert np.shape(step["rewards"]) == np.shape(step["dones"]) == np.shape(step["log_probs"]) == (4,)
        assert np.shape(step["new_obs"]) == np.shape(step["obs_tensor"]) == (4, *env.observation_space.shape)
        assert np.shape(step["actions"]) == np.shape(step["clipped_actions"]) == (4, *env.action_space.shape)
        for done, info in zip(step["dones"], step["infos"], strict=True):
            assert ("episode" in info) == ("terminal_observation" in info) == done
    ended = [info for step in seen for info in step["infos"] if "episode" in info]
    assert [info["episode"]["r"] for info in ended] == [episode["r"] for episode in model.ep_info_buffer]
    assert len(ended) > 0


def test_every_callback_class_does_what_it_does_there(tmp_path):
    calls = {}
    for algorithm in (PPO, FastKLPPO):
        env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
        evaluation = make_vec_env("CartPole-v1", n_envs=1, seed=1)
        folder, seen = tmp_path / algorithm.__name__, []
        callbacks = CallbackList(
            [
                CheckpointCallback(32, str(folder), save_replay_buffer=True, save_vecnormalize=True),
                EveryNTimesteps(64, ConvertCallback(lambda _variables, _, seen=seen: seen.append(1) is None)),
                LogEveryNTimesteps(50),
                StopTrainingOnMaxEpisodes(max_episodes=9),
                EvalCallback(
                    evaluation,
                    callback_after_eval=StopTrainingOnNoModelImprovement(100, verbose=0),
                    eval_freq=40,
                    n_eval_episodes=1,
                    log_path=str(folder / "evaluations"),
                    best_model_save_path=str(folder),
                    verbose=0,
                ),
            ]
        )
        model = algorithm("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, device="cpu", seed=0)
        model.set_logger(configure(str(folder), ["csv"]))
        model.learn(2000, callback=callbacks)
        model.logger.close()
        files = sorted(path.name for path in folder.iterdir())
        calls[algorithm] = (model.num_timesteps, len(seen), files)
    assert calls[FastKLPPO] == calls[PPO]
    assert calls[PPO][0] < 2000  # the ninth episode ended it


def test_another_env_is_taken():
    model = small_model().learn(32)
    other = make_vec_env("CartPole-v1", n_envs=2, seed=5)
    model.set_env(other)
    assert model.get_env() is other
    assert model.learn(32, reset_num_timesteps=False).num_timesteps == 64
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env("CartPole-v1", n_envs=3))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(make_vec_env("Pendulum-v1", n_envs=2))


def warnings_of(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return [re.sub(r"0x[0-9a-f]+", "at", text) for text in texts]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", ["truncated minibatch", "no monitor", "other type of env"])
def test_the_warnings_are_those_of_stable_baselines3(case):
    def act(algorithm):
        size = 20 if case == "truncated minibatch" else 16
        env = make_vec_env("CartPole-v1", n_envs=2)
        model = algorithm("MlpPolicy", env, n_steps=16, batch_size=size, n_epochs=1, device="cpu", seed=0)
        if case == "no monitor":
            evaluate_policy(model, DummyVecEnv([lambda: gym.make("CartPole-v1")]), n_eval_episodes=1)
        if case == "other type of env":
            evaluation = VecNormalize(make_vec_env("CartPole-v1", n_envs=1), training=False)
            model.learn(32, callback=EvalCallback(VecMonitor(evaluation), eval_freq=1000, verbose=0))

    theirs, ours = (warnings_of(lambda algorithm=algorithm: act(algorithm)) for algorithm in (PPO, FastKLPPO))
    assert ours == theirs
    assert theirs


def test_a_small_network_on_a_gpu_is_warned_of_as_there():
    def act(algorithm):
        model = algorithm("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=16, batch_size=16, device="cpu")
        model.device = torch.device("cuda")  # which is all that is looked at
        model._maybe_recommend_cpu()

    theirs, ours = (warnings_of(lambda algorithm=algorithm: act(algorithm)) for algorithm in (PPO, FastKLPPO))
    assert theirs
    assert "primarily intended to run on the CPU" in ours[0]
    assert len(ours) == len(theirs)


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
