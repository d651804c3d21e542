"""What a user of stable-baselines3 types keeps its meaning."""

import inspect

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from lago_fast import FastKLPPO, make_metaworld

OURS = {
    "prior",
    "kl_coef",
    "target_prior_kl",
    "kl_direction",
    "kl_placement",
    "prior_temperature",
    "warm_start",
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
