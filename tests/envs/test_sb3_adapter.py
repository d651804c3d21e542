"""The SB3 lane: same-step autoreset, SB3's info keys, and the array lane's transitions."""

import warnings

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from lago_fast.envs import MetaworldArrayEnv, make_metaworld
from lago_fast.envs.experts import make_expert
from lago_fast.errors import UnsupportedArgument

HORIZON = 5


@pytest.fixture
def make():
    """A factory of SB3 environments that are closed at the end."""
    opened = []

    def factory(tasks=("drawer-open", "push"), num_envs=4, **settings):
        opened.append(make_metaworld(list(tasks), num_envs, **{"max_episode_steps": HORIZON, **settings}))
        return opened[-1]

    yield factory
    for env in opened:
        env.close()


def wave(states):
    """Actions that depend on the state alone, so that both lanes take the same ones."""
    return np.sin(40.0 * states[:, [0, 1, 2, 18]]).astype(np.float32)


def array_lane_transitions(env, steps, policy):
    """Per environment its valid transitions: state, reward, next state, two flags, instruction."""
    out = [[] for _ in range(env.num_envs)]
    state, instruction_id = env.reset()
    for _ in range(steps):
        row = env.step(policy(state))
        for i in np.flatnonzero(row.valid):
            flags = (bool(row.terminated[i]), bool(row.truncated[i]))
            out[i].append((state[i], row.reward[i], row.observation[i], *flags, int(instruction_id[i])))
        state, instruction_id = row.observation, row.instruction_id
    env.close()
    return out


def sb3_lane_transitions(env, steps, policy):
    """The same from the SB3 lane, where an end's next state is the terminal observation."""
    out = [[] for _ in range(env.num_envs)]
    state = env.reset()
    instruction_id = [info["instruction_id"] for info in env.reset_infos]
    for _ in range(steps):
        observation, reward, done, infos = env.step(policy(state))
        for i, info in enumerate(infos):
            after = info["terminal_observation"] if done[i] else observation[i]
            truncated = info["TimeLimit.truncated"]
            out[i].append((state[i], reward[i], after, bool(done[i]) and not truncated, truncated, instruction_id[i]))
        state = observation
        instruction_id = [info["instruction_id"] for info in infos]
    env.close()
    return out


def reach_expert(states):
    return make_expert("reach")(states[:, :39])


@pytest.mark.parametrize(
    ("settings", "steps", "policy"),
    [
        ({"tasks": ["drawer-open", "push"], "num_envs": 4, "max_episode_steps": HORIZON}, 14, wave),
        # ends at different times in one pool, so that some environments restart amid others' episodes
        ({"tasks": ["reach"], "num_envs": 3, "terminate_on_success": True}, 120, reach_expert),
        # successes and the horizon in one pool
        (
            {"tasks": ["reach"], "num_envs": 6, "terminate_on_success": True, "max_episode_steps": 30},
            130,
            reach_expert,
        ),
        ({"tasks": ["hammer", "push"], "num_envs": 4, "max_episode_steps": HORIZON}, 14, wave),
        (
            {"tasks": ["reach"], "num_envs": 2, "terminate_on_success": True, "success_reward": 5.0},
            80,
            reach_expert,
        ),
    ],
    ids=["horizon", "success-truncates", "mixed", "fresh-simulators", "success-terminates"],
)
def test_both_lanes_carry_the_same_transitions(settings, steps, policy):
    ours = array_lane_transitions(MetaworldArrayEnv(**settings, seed=5), steps, policy)
    theirs = sb3_lane_transitions(make_metaworld(**settings, seed=5), steps, policy)
    for mine, other in zip(ours, theirs, strict=True):
        common = min(len(mine), len(other))
        assert common == len(mine) < len(other)  # the array lane spends a row on each restart
        assert sum(transition[3] or transition[4] for transition in mine) >= 1
        for a, b in zip(mine, other, strict=False):
            for left, right in zip(a, b, strict=True):
                np.testing.assert_array_equal(left, right)


def test_an_end_carries_what_sb3_reads(make):
    env = make()
    env.reset()
    total, lengths = np.zeros(4), 0
    for _ in range(HORIZON):
        before = env.array_lane.instruction_id.copy()
        observation, reward, done, infos = env.step(np.full((4, 4), 0.5))
        total += reward
        lengths += 1
    assert done.all()
    for i, info in enumerate(infos):
        assert info["TimeLimit.truncated"] is True
        assert info["is_success"] is False
        assert info["terminal_instruction_id"] == before[i]
        assert info["instruction_id"] == env.array_lane.instruction_id[i]
        assert info["episode"]["r"] == pytest.approx(total[i], rel=1e-6)
        assert info["episode"]["l"] == lengths
        assert info["episode"]["t"] > 0
        # frame stacking: the returned observation starts an episode, the terminal one does not
        np.testing.assert_array_equal(observation[i, 18:36], observation[i, :18])
        assert (info["terminal_observation"][18:36] != info["terminal_observation"][:18]).any()
    observation, _, done, infos = env.step(np.zeros((4, 4)))
    assert not done.any()
    assert all(set(info) == {"success", "instruction_id", "TimeLimit.truncated"} for info in infos)


def test_terminal_observation_is_a_copy(make):
    env = make()
    env.reset()
    for _ in range(HORIZON):
        observation, _, _, infos = env.step(np.zeros((4, 4)))
    kept = infos[0]["terminal_observation"].copy()
    assert not np.shares_memory(infos[0]["terminal_observation"], observation)
    observation[:] = 7.0
    for _ in range(2):
        env.step(np.ones((4, 4)))
    np.testing.assert_array_equal(infos[0]["terminal_observation"], kept)


def test_episode_record_keeps_raw_rewards_and_success(make):
    expert = make_expert("reach")
    env = make(["reach"], 2, max_episode_steps=60, normalize_reward=True)
    plain = make(["reach"], 2, max_episode_steps=60)
    ends = []
    for each in (env, plain):
        state = each.reset()
        for _ in range(60):
            state, _, done, infos = each.step(expert(state))
        assert done.all()
        ends.append(infos)
    for scaled, raw in zip(*ends, strict=True):
        assert scaled["episode"]["r"] == raw["episode"]["r"] > 60.0
        assert scaled["is_success"] is raw["is_success"] is True


def test_seed_follows_sb3s_rule_on_both_lanes(make):
    env, seven = make(seed=0), make(seed=7)
    original = env.reset()
    assert env.seed(7) == seven.array_lane.env_seeds
    np.testing.assert_array_equal(env.reset(), seven.reset())
    env.seed(7)
    np.testing.assert_array_equal(env.array_lane.reset().observation, make(seed=7).reset())
    assert len(set(env.seed(None)) | set(env.seed(None))) == 8
    assert (env.reset() != original).any()


def test_sb3s_attribute_interface(make):
    env = make()
    assert env.get_attr("max_episode_steps") == [HORIZON] * 4
    assert env.get_attr("tasks", indices=[0, 2]) == [["drawer-open", "push"]] * 2
    assert env.get_attr("num_envs", indices=1) == [4]
    assert env.has_attr("instructions")
    assert not env.has_attr("no_such_thing")
    assert env.render_mode is None
    assert env.env_is_wrapped(Monitor) == [True] * 4
    assert env.env_is_wrapped(TimeLimit, indices=[1]) == [False]
    assert len(env.env_method("seed", 3)[0]) == 4
    env.set_attr("render_mode", "none")
    assert env.get_attr("render_mode") == ["none"] * 4
    with pytest.raises(AttributeError):
        env.set_attr("no_such_thing", 1)
    with pytest.raises(UnsupportedArgument, match="indices"):
        env.set_attr("tasks", [], indices=[0])
    with pytest.raises(UnsupportedArgument, match="indices"):
        env.env_method("reset", indices=[0])
    env.set_options({"a": 1})
    with pytest.raises(UnsupportedArgument, match="options"):
        env.reset()


def test_reset_and_close_twice(make):
    env = make()
    assert env.reset().shape == env.reset().shape == (4, 39)
    env.close()
    env.close()


def test_a_reset_starts_the_records_anew(make):
    env = make()
    env.reset()
    env.step(np.zeros((4, 4)))
    env.reset()
    for _ in range(HORIZON):
        _, _, _, infos = env.step(np.zeros((4, 4)))
    assert [info["episode"]["l"] for info in infos] == [HORIZON] * 4


def test_sb3s_ppo_trains_and_evaluates_on_it(make):
    env = make(max_episode_steps=8)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=5, device="cpu")
    before = model.policy.state_dict()["action_net.weight"].clone()
    model.learn(64)
    assert model.num_timesteps == 64
    assert (model.policy.state_dict()["action_net.weight"] != before).any()
    assert [episode["l"] for episode in model.ep_info_buffer] == [8] * 8
    assert len(model.ep_success_buffer) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SB3 warns where episode records are missing
        returns, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [8] * 4
    assert all(value > 0 for value in returns)


def test_vecnormalize_around_it_equals_the_builtin_scale(make):
    inner = make(["push"], normalize_reward=True, gamma=0.95)
    outer = VecNormalize(make(["push"]), norm_obs=False, gamma=0.95)
    inner.reset()
    outer.reset()
    for _ in range(2 * HORIZON):
        actions = np.full((4, 4), 0.3)
        np.testing.assert_allclose(inner.step(actions)[1], outer.step(actions)[1], rtol=1e-6)
