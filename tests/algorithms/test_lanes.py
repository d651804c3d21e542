"""Both lanes tell the trainer the same story of the same env."""

import numpy as np
from stable_baselines3.common.vec_env import VecNormalize

from lago_fast.algorithms.lanes import ArrayLane, Sb3Lane, array_lane_of
from lago_fast.envs import make_metaworld

STEPS, HORIZON = 14, 5


def rollout(lane_of):
    env = make_metaworld(["reach"], 2, seed=3, max_episode_steps=HORIZON)
    env.reset()
    lane = lane_of(env)
    lane.begin()
    rng = np.random.default_rng(0)
    rows = []
    while len(rows) < STEPS:
        step = lane.step(np.tile(rng.uniform(-1, 1, 4), (2, 1)).astype(np.float32))
        if not step.valid.all():
            rng = np.random.default_rng(len(rows))  # the row after an end took an action that nobody executed
            continue
        rows.append(step)
        if step.truncated.all():
            rng = np.random.default_rng(len(rows))
    env.close()
    return rows


def test_both_lanes_carry_the_same_transitions():
    array, sb3 = rollout(lambda env: ArrayLane(env.array_lane)), rollout(Sb3Lane)
    ends = 0
    for a, b in zip(array, sb3, strict=True):
        np.testing.assert_array_equal(a.truncated, b.truncated)
        np.testing.assert_array_equal(a.terminated, b.terminated)
        np.testing.assert_allclose(a.reward, b.reward)
        if a.truncated.any():
            ends += 1
            np.testing.assert_array_equal(b.replaced, [0, 1])
            np.testing.assert_array_equal(a.observation, b.last_observation)
            assert [e.length for e in a.episodes] == [e.length for e in b.episodes] == [HORIZON, HORIZON]
            np.testing.assert_allclose(
                [e.total_reward for e in a.episodes], [e.total_reward for e in b.episodes], rtol=1e-5
            )
        else:
            np.testing.assert_array_equal(a.observation, b.observation)
    assert ends == STEPS // HORIZON


def test_a_wrapper_hides_the_array_lane():
    env = make_metaworld(["reach"], 2, max_episode_steps=HORIZON)
    assert array_lane_of(env) is env.array_lane
    assert array_lane_of(VecNormalize(env)) is None
    env.close()
