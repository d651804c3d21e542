"""EnvPool's Meta-World against the official package (metaworld 3.1.1, mujoco 3.3.0).

EnvPool carries another MuJoCo, so trajectories part ways at the first contact, and only functions of a state
can be compared over an episode. Three comparisons, each on steps recorded through the array lane:

- *Exact*: tasks whose official reward reads nothing but the observation, the goal and constants of the
  reset. The tolerance, 2e-5 on a scale of 0 to 10, is what float32 observations and rewards allow (their
  rounding, 3e-8 m, is amplified by the slope of the reward, at most about 100 per metre).
- *Near*: tasks whose reward also reads the finger tips, which the observation leaves out. They are put where
  they are when the hand hangs straight; the hand tilts by a few millimetres while it accelerates, so the
  error is small where the hand is slow and is bounded on average, not at each step.
- *Replay*: the official simulator steps with the recorded actions from the recorded reset. Before the first
  contact it must see what EnvPool saw, in all terms of the reward. The hand and the goal agree to
  1e-5 m; an object that lies loose on the table is in contact with it, and trembles by 5e-5 m and 2e-3 of
  its quaternion.
  One known difference is set aside: for the reward of grasping, EnvPool keeps the finger pads' positions at
  construction, while the official class holds a live view of them under the name `init_left_pad`.
"""

import mujoco
import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from lago_fast.envs.experts import make_expert
from lago_fast.envs.metaworld import MetaworldArrayEnv

STEPS = 150
HAND_AND_GOAL = [0, 1, 2, 3, 36, 37, 38]
EPISODES = 3


def official(task):
    """The official environment, with its goal visible, after a reset of its own."""
    env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    env._partially_observable = False
    del env.sawyer_observation_space  # cached, with the goal's bounds at zero
    env._freeze_rand_vec = False
    env._set_task_called = True
    env.reset()
    return env


def record(task, *, noise=0.3, steps=STEPS):
    """Reset states [N, 39], and per step states, actions, rewards and successes; experts with noise."""
    env = MetaworldArrayEnv([task], EPISODES, seed=1, max_episode_steps=500)
    expert, rng = make_expert(task), np.random.default_rng(0)
    first = state = env.reset().observation.astype(np.float64)
    rows = []
    for _ in range(steps):
        action = np.clip(expert(state) + noise * rng.standard_normal((EPISODES, 4)), -1, 1).astype(np.float32)
        row = env.step(action)
        state = row.observation.astype(np.float64)
        rows.append((state, action, row.raw_reward, row.success))
    env.close()
    return first, rows


def turn(env, joint, point, observed):
    """Turn a hinge of the official model so that `point()` lies where it was observed; returns the miss."""
    env.data.joint(joint).qpos = 0.0
    mujoco.mj_kinematics(env.model, env.data)
    anchor, axis = env.data.joint(joint).xanchor.copy(), env.data.joint(joint).xaxis.copy()
    from_, to = point() - anchor, observed - anchor
    from_, to = from_ - axis * (from_ @ axis), to - axis * (to @ axis)
    env.data.joint(joint).qpos = np.arctan2(np.cross(from_, to) @ axis, from_ @ to)
    mujoco.mj_kinematics(env.model, env.data)
    return np.abs(point() - observed).max()


def settle_door(env, first):
    env.model.body("door").pos = first[36:39] - [-0.3, -0.45, 0.0]


def follow_door(env, state):
    assert turn(env, "doorjoint", lambda: env.data.geom("handle").xpos.copy(), state[4:7]) < 1e-5


def settle_lever(env, first):
    base = first[36:39] - [0.12, 0.0, 0.25 + env.LEVER_RADIUS]
    env.model.body("lever").pos = base
    env._lever_pos_init = base - [-0.12, env.LEVER_RADIUS, -0.25]


def follow_lever(env, state):
    assert turn(env, "LeverAxis", lambda: env.data.site("leverStart").xpos.copy(), state[4:7]) < 1e-5


def nothing(_env, _numbers):
    """No internal state to set."""


EXACT = {
    "drawer-open": (nothing, nothing),
    "box-close": (nothing, nothing),
    "door-open": (settle_door, follow_door),
    "lever-pull": (settle_lever, follow_lever),
}


@pytest.mark.parametrize("task", EXACT)
def test_reward_and_success_are_the_official_ones(task):
    settle, follow = EXACT[task]
    env, (first, rows) = official(task), record(task)
    rewards, successes = [], []
    for i in range(EPISODES):
        env._target_pos = first[i, 36:39]
        settle(env, first[i])
        for state, action, reward, success in rows:
            follow(env, state[i])
            expected, info = env.evaluate_state(state[i], action[i])
            assert reward[i] == pytest.approx(expected, abs=2e-5)
            assert success[i] == bool(info["success"])
            rewards.append(expected)
            successes.append(info["success"])
    assert max(rewards) - min(rewards) > 3.0  # the comparison saw good states and bad ones
    assert 0.0 < np.mean(successes) < 1.0


def settle_faucet(env, first):
    env.obj_init_pos = first[36:39] - [env._handle_length, 0.0, 0.125]


def settle_button(env, first):
    env._obj_to_target_init = abs(first[38] - first[6])


def settle_object(env, first):
    env.obj_init_pos = first[4:7]


NEAR = {"reach": nothing, "faucet-open": settle_faucet, "button-press-topdown": settle_button}


@pytest.mark.parametrize("task", NEAR)
def test_rewards_that_need_the_finger_tips_are_near(task):
    env, (first, rows) = official(task), record(task)
    hanging = env.tcp_center - env.get_endeff_pos()
    errors, agree, rewards = [], [], []
    for i in range(EPISODES):
        env._target_pos = first[i, 36:39]
        NEAR[task](env, first[i])
        for state, action, reward, success in rows:
            for site in ("rightEndEffector", "leftEndEffector"):
                env.data.site(site).xpos = state[i, :3] + hanging
            expected, info = env.evaluate_state(state[i], action[i])
            errors.append(abs(expected - reward[i]))
            agree.append(bool(info["success"]) == success[i])
            rewards.append(expected)
    assert np.mean(errors) < 0.05
    assert np.median(errors) < 0.02
    assert np.mean(agree) > 0.97
    assert max(rewards) - min(rewards) > 3.0


@pytest.mark.parametrize("task", ["push", "pick-place", "coffee-button", "window-open", "plate-slide"])
def test_success_alone_is_the_official_one(task):
    env, (first, rows) = official(task), record(task, steps=200)
    compared = []
    for i in range(EPISODES):
        env._target_pos = first[i, 36:39]
        settle_object(env, first[i])
        for state, action, _, success in rows:
            env._get_pos_objects = lambda position=state[i, 4:7]: position
            assert success[i] == bool(env.evaluate_state(state[i], action[i])[1]["success"])
            compared.append(success[i])
    assert 0.0 < np.mean(compared) < 1.0


RESETS = {
    "push": lambda first: np.concatenate([first[4:6], [0.02], first[36:38], [0.02]]),
    "pick-place": lambda first: np.concatenate([first[4:6], [0.02], first[36:39]]),
    "reach": lambda first: np.concatenate([first[4:7], first[36:39]]),
    "drawer-open": lambda first: first[36:39] - [0.0, -0.36, 0.09],
    "dial-turn": lambda first: first[36:39] - [0.0, 0.03, 0.03],
    "faucet-open": lambda first: first[36:39] - [0.175, 0.0, 0.125],
}


@pytest.mark.parametrize("task", RESETS)
def test_official_simulator_sees_the_same_before_contact(task):
    first, rows = record(task, noise=0.0, steps=15)
    constructed = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    pads = constructed.init_left_pad.copy(), constructed.init_right_pad.copy()
    env = official(task)
    env._freeze_rand_vec = True
    for i in range(EPISODES):
        env._last_rand_vec = RESETS[task](first[i])
        env.reset()
        env.init_left_pad, env.init_right_pad = pads
        for state, action, reward, _ in rows:
            seen, expected, _, truncated, _ = env.step(action[i])
            np.testing.assert_allclose(state[i, HAND_AND_GOAL], seen[HAND_AND_GOAL], atol=1e-5)
            np.testing.assert_allclose(state[i, 4:7], seen[4:7], atol=2e-4)
            np.testing.assert_allclose(state[i], seen, atol=4e-3)
            assert reward[i] == pytest.approx(expected, abs=4e-3)
            assert not truncated
