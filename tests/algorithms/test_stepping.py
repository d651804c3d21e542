"""Groups that step in turn: the same transitions as one group, no action of an older policy, nothing left under way."""

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from lago_fast import FastKLPPO, errors, make_metaworld
from lago_fast.algorithms.lanes import ArrayLane, GroupedLane, lane_of
from lago_fast.algorithms.stage_clock import StageClock
from lago_fast.algorithms.stepping import steps, torch_threads_beside
from lago_fast.envs.vec_env import ArrayStep

SETTINGS = {"n_steps": 12, "batch_size": 48, "n_epochs": 1, "device": "cpu", "seed": 0}


def model(groups, num_envs=8, normalize_reward=True, **changes):
    # episodes of 5 steps: ends and invalid rows are among them
    env = make_metaworld(["reach"], num_envs, groups=groups, max_episode_steps=5, normalize_reward=normalize_reward)
    return FastKLPPO("MlpPolicy", env, **{**SETTINGS, **changes})


class LogOfGroups:
    """An env of two groups with two rows each, which writes down who was sent and received."""

    def __init__(self):
        self.num_envs, self.groups, self.log = 4, [slice(0, 2), slice(2, 4)], []
        self.instruction_id = np.zeros(4, np.int64)

    def send_group(self, g, actions):
        self.log.append(("send", g, actions.tolist()))

    def recv_group(self, g):
        self.log.append(("recv", g))
        ones = np.ones(2, np.float32)
        no = np.zeros(2, bool)
        return ArrayStep(ones[:, None], ones, ones, no, no, ~no, no, np.zeros(2, np.int64))

    def join(self, parts):
        return ArrayStep(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def rollout(env, n_steps):
    def act(t, rows, observation, instruction_id):
        assert len(observation) == len(instruction_id) == 2
        actions = np.full(2, 10 * t + rows.start)
        return actions, actions

    lane = GroupedLane(env)
    return steps(lane, act, n_steps, np.zeros((4, 1)), np.zeros(4, np.int64), StageClock(torch.device("cpu")))


def test_a_group_is_answered_for_while_the_other_steps_and_nothing_is_sent_beyond_the_rollout():
    env = LogOfGroups()
    actions = [a.tolist() for a, _, _ in rollout(env, 2)]
    assert actions == [[0, 0, 2, 2], [10, 10, 12, 12]]
    assert env.log == [
        ("send", 0, [0, 0]),
        ("send", 1, [2, 2]),
        ("recv", 0),
        ("send", 0, [10, 10]),
        ("recv", 1),
        ("send", 1, [12, 12]),
        ("recv", 0),
        ("recv", 1),
    ]


def test_a_rollout_that_is_given_up_waits_for_what_was_sent():
    env = LogOfGroups()
    going = rollout(env, 5)
    next(going)
    going.close()
    sent, received = ([entry[1] for entry in env.log if entry[0] == what] for what in ("send", "recv"))
    assert sorted(sent) == sorted(received)


def test_two_groups_see_what_one_sees_bit_for_bit():
    grouped = model(2)
    grouped.learn(1)
    buffer = grouped.rollout_buffer
    # the actions of that rollout, played again by the plain lane
    plain = make_metaworld(["reach"], 8, max_episode_steps=5, normalize_reward=True).array_lane
    plain.seed(0)
    observation = plain.reset().observation
    for t in range(12):
        np.testing.assert_array_equal(buffer.observations[t].numpy(), observation)
        step = plain.step(buffer.actions[t].numpy().clip(-1, 1))
        np.testing.assert_array_equal(buffer.rewards[t].numpy(), step.reward)
        np.testing.assert_array_equal(buffer.truncated[t].numpy(), step.truncated)
        np.testing.assert_array_equal(buffer.valid[t].numpy(), step.valid)
        observation = step.observation
    np.testing.assert_array_equal(grouped._last_obs, observation)
    assert not buffer.valid.all()


def test_every_stored_figure_is_of_the_present_policy():
    grouped = model(2, learning_rate=0.0)  # after the update the policy is still the one that acted
    grouped.learn(1)
    buffer = grouped.rollout_buffer
    with torch.no_grad():
        values, log_prob, _ = grouped.policy.evaluate_actions(
            buffer.observations.flatten(0, 1), buffer.actions.flatten(0, 1)
        )
    torch.testing.assert_close(buffer.values.flatten(), values.flatten(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(buffer.log_probs.flatten(), log_prob, atol=1e-4, rtol=1e-4)


class StopAfter(BaseCallback):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def _on_step(self):
        return self.n_calls < self.calls


def test_training_goes_on_after_a_callback_stopped_it():
    grouped = model(2)
    grouped.learn(1000, callback=StopAfter(5))
    assert grouped.num_timesteps < 12 * 8
    grouped.learn(12 * 8, reset_num_timesteps=False)
    assert torch.isfinite(grouped.rollout_buffer.rewards).all()


def test_a_noise_of_all_envs_at_once_is_refused():
    with pytest.raises(errors.UnsupportedArgument, match="use_sde"):
        model(2, use_sde=True).learn(1)


def test_torch_leaves_the_cores_to_simulators_with_threads_of_their_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        env = make_metaworld(["reach"], 2)
        with torch_threads_beside(lane_of(env)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        assert type(lane_of(env)) is ArrayLane
        with torch_threads_beside(object()):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_group_that_failed_is_not_waited_for_again():
    env = LogOfGroups()
    received = env.recv_group

    def fail(g):
        if g == 1:
            env.log.append(("recv", 1))
            raise RuntimeError("the simulator died")
        return received(g)

    env.recv_group = fail
    with pytest.raises(RuntimeError, match="died"):
        next(rollout(env, 2))
    assert env.log.count(("recv", 1)) == 1


def test_episodes_under_way_in_steps_that_nobody_learns_from_are_not_forgotten():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls % 8 != 0

    agent = model(groups=2)
    lengths = []
    for _ in range(12):
        agent.learn(10**6, callback=Stop(), reset_num_timesteps=False)
        lengths += [episode["l"] for episode in agent.ep_info_buffer]
    agent.env.close()
    assert max(lengths) == 5
