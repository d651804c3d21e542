"""CLEVR-Robot under bad arguments, bad numbers and calls out of order."""

import numpy as np
import pytest
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError, ResetNeeded

from lago_fast.envs import ClevrRobotArrayEnv, make_clevr_robot
from lago_fast.errors import NonFiniteError, SceneUnsampled, UnknownTask, UnsupportedArgument

STILL = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"families": ["rael"]}, UnknownTask, "nearest names: real"),
        ({"families": "real"}, UnsupportedArgument, "list of names"),
        ({"num_envs": 0}, UnsupportedArgument, "num_envs=0"),
        ({"num_envs": 3, "families": ["real", "easy"]}, UnsupportedArgument, "num_envs=3"),
        ({"max_episode_steps": 0}, UnsupportedArgument, "max_episode_steps=0"),
        ({"max_episode_steps": 2.5}, UnsupportedArgument, r"max_episode_steps=2\.5"),
        ({"num_threads": 1.5}, UnsupportedArgument, r"num_threads=1\.5"),
        ({"ball_gap": float("nan")}, UnsupportedArgument, "ball_gap=nan"),
        ({"seed": -1}, UnsupportedArgument, "seed=-1"),
        ({"gamma": 2.0, "normalize_reward": True}, UnsupportedArgument, r"gamma=2\.0"),
        ({"action_type": "prefect"}, UnsupportedArgument, "action_type='prefect'.*nearest names: perfect"),
        ({"observation": "position"}, UnsupportedArgument, "observation='position'.*positions"),
        ({"reward": "progres"}, UnsupportedArgument, "nearest names: progress"),
        ({"judge": "calm"}, UnsupportedArgument, "nearest names: kalm"),
        ({"easy_judge": "push"}, UnsupportedArgument, "easy_judge='push'"),
        ({"phrasings": "some"}, UnsupportedArgument, "phrasings='some'"),
        ({"quirks": ["lag"]}, UnsupportedArgument, "quirks='lag'"),
        ({"renderer": "vulkan"}, UnsupportedArgument, "renderer='vulkan'"),
        ({"engine": "bullet"}, UnsupportedArgument, "engine='bullet'"),
        ({"num_threads": 0}, UnsupportedArgument, "num_threads=0"),
        ({"families": ["easy"], "action_type": "discrete"}, UnsupportedArgument, "easy_judge='shift'"),
        ({"families": ["real", "line"], "reward": "kalm", "num_envs": 4}, UnsupportedArgument, "not for 'line'"),
        ({"quirks": ["lagged-reward"]}, UnsupportedArgument, "reward='imagine'"),
        ({"quirks": ["stale-first-push"], "action_type": "discrete"}, UnsupportedArgument, "'perfect'"),
        ({"instruction_table": np.zeros((3, 2))}, UnsupportedArgument, r"shape \(3, 2\); expected \[4320, Z\]"),
        ({"instruction_table": np.full((4320, 2), np.nan)}, NonFiniteError, "instruction_table"),
    ],
)
def test_refusals_name_the_argument(settings, error, message):
    with pytest.raises(error, match=message):
        ClevrRobotArrayEnv(**{"families": ["real"], "num_envs": 4, **settings})


def test_unknown_split():
    with pytest.raises(UnknownTask, match=r"split='hrad'.*nearest names: hard"):
        make_clevr_robot(4, "hrad")


def test_a_scene_that_cannot_be_sampled_is_refused_at_the_reset():
    env = ClevrRobotArrayEnv(["real"], 4, ball_gap=0.7)
    with pytest.raises(SceneUnsampled, match=r"ball_gap=0.7.*smaller gap"):
        env.reset()


def test_bad_actions_are_refused_and_nothing_is_lost():
    env = ClevrRobotArrayEnv(["real"], 4)
    env.reset()
    with pytest.raises(UnsupportedArgument, match="40 in environment 2; give 0 to 39"):
        env.step(np.array([0, 1, 40, 3]))
    with pytest.raises(UnsupportedArgument, match="actions has shape"):
        env.step(np.zeros((4, 1), np.int64))
    assert env.step(STILL).valid.all()


def test_bad_states_are_refused_and_nothing_is_lost():
    env = ClevrRobotArrayEnv(["real"], 4)
    env.reset()
    kept = env.ball_xy
    qpos, qvel = env.physics_state
    bad = qpos.copy()
    bad[3, 8] = np.nan
    with pytest.raises(NonFiniteError, match=r"qpos.*environment 3"):
        env.set_state(np.arange(4), bad, qvel)
    with pytest.raises(NonFiniteError, match=r"qvel.*environment 2"):
        env.set_state(np.array([2]), qpos[:1], np.full((1, 32), np.inf))
    with pytest.raises(UnsupportedArgument, match=r"qvel has shape \(4, 31\)"):
        env.set_state(np.arange(4), qpos, qvel[:, :31])
    np.testing.assert_array_equal(env.ball_xy, kept)


def test_calls_out_of_order_are_refused():
    env = ClevrRobotArrayEnv(["real"], 4)
    with pytest.raises(ResetNeeded):
        env.send(STILL)
    env.reset()
    with pytest.raises(NoAsyncCallError):
        env.recv()
    env.send(STILL)
    with pytest.raises(AlreadyPendingCallError):
        env.send(STILL)
    env.reset()  # drops the step under way
    env.send(STILL)
    env.close()
    env.close()
    with pytest.raises(ClosedEnvironmentError):
        env.reset()
    with pytest.raises(ClosedEnvironmentError):
        env.send(STILL)
