"""EnvPool as a user of Stable-Baselines3 wraps it plays the episodes that this package's lanes play."""

import numpy as np
import pytest

pytest.importorskip("envpool", reason="Meta-World needs the extra 'envs'")

from bench.gpu_hours.user_env import UserVecEnv, make_user_env, pool_of
from bench.gpu_hours.work import Work
from lago_fast import make_metaworld


def test_it_plays_what_the_lane_plays_over_ends_of_episodes():
    lane = make_metaworld(["push"], 3, seed=0, max_episode_steps=4, phrasings="first")
    user = UserVecEnv(pool_of("push", lane.array_lane.env_seeds, 4))
    np.testing.assert_allclose(user.reset(), lane.reset(), rtol=1e-6)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(10):
        actions = rng.uniform(-1, 1, (3, 4)).astype(np.float32)
        theirs, ours = user.step(actions), lane.step(actions)
        for a, b in zip(theirs[:3], ours[:3], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for done, a, b in zip(theirs[2], theirs[3], ours[3], strict=True):
            assert ("terminal_observation" in a) == ("terminal_observation" in b) == done
            if done:
                ends += 1
                assert a["TimeLimit.truncated"] is b["TimeLimit.truncated"] is True
                np.testing.assert_allclose(a["terminal_observation"], b["terminal_observation"], rtol=1e-6)
    assert ends == 6
    user.close()
    lane.close()


def test_episodes_are_counted_and_rewards_scaled():
    env = make_user_env(Work(num_envs=2, max_episode_steps=3))
    env.reset()
    actions = np.zeros((2, 4), np.float32)
    for _ in range(3):
        _, reward, done, infos = env.step(actions)
    assert done.all()
    assert [info["episode"]["l"] for info in infos] == [3, 3]
    assert not np.allclose(reward, env.get_original_reward())
    env.close()
