"""The array-lane contract's own parts: the return normaliser, the defaults, the lazy exports."""

import subprocess
import sys

import numpy as np
import pytest
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv, ReturnNormalizer
from lago_fast.errors import UnsupportedArgument


class Tape(VecEnv):
    """Plays rewards and ends [T, N] that were written beforehand, as SB3's normaliser wants them."""

    def __init__(self, rewards: np.ndarray, ends: np.ndarray) -> None:
        self.rewards, self.ends, self.t = rewards, ends, 0
        self.zeros = np.zeros((rewards.shape[1], 1), np.float32)
        super().__init__(rewards.shape[1], Box(-1, 1, (1,)), Box(-1, 1, (1,)))

    def reset(self):
        return self.zeros

    def step_async(self, actions):
        del actions

    def step_wait(self):
        self.t += 1
        return self.zeros, self.rewards[self.t - 1], self.ends[self.t - 1], [{} for _ in self.zeros]

    def close(self):
        """Nothing to free."""

    def get_attr(self, attr_name, indices=None):
        del attr_name, indices
        return [None] * len(self.zeros)

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        raise NotImplementedError


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_envs=st.integers(1, 7),
    gamma=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_normaliser_gives_the_numbers_of_vecnormalize(seed, num_envs, gamma, scale):
    rng = np.random.default_rng(seed)
    rewards = (rng.normal(1.0, 1.0, (40, num_envs)) * scale).astype(np.float32)
    ends = rng.random((40, num_envs)) < 0.1
    theirs = VecNormalize(Tape(rewards, ends), norm_obs=False, clip_reward=10.0, gamma=gamma)
    theirs.reset()
    ours = ReturnNormalizer(num_envs, gamma)
    for reward, end in zip(rewards, ends, strict=True):
        expected = theirs.step(np.zeros((num_envs, 1)))[1]
        got = ours(reward, np.ones(num_envs, bool), end)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0)
    np.testing.assert_allclose(ours.var, theirs.ret_rms.var, rtol=1e-12)


def test_normaliser_does_not_see_invalid_rows():
    rng = np.random.default_rng(0)
    plain, holed = ReturnNormalizer(2), ReturnNormalizer(3)
    for _ in range(20):
        reward = rng.normal(size=2).astype(np.float32)
        valid = np.array([True, False, True])
        poisoned = np.array([reward[0], 1e6, reward[1]], np.float32)
        scaled = holed(poisoned, valid, np.zeros(3, bool))
        expected = plain(reward, np.ones(2, bool), np.zeros(2, bool))
        np.testing.assert_array_equal(scaled[[0, 2]], expected)
        assert scaled[1] == 0.0
    assert holed.returns[1] == 0.0


def test_normaliser_gives_each_group_a_std_of_its_own():
    rng = np.random.default_rng(2)
    grouped = ReturnNormalizer(4, 0.9, group=np.array([0, 1, 0, 1]))
    alone = [ReturnNormalizer(2, 0.9), ReturnNormalizer(2, 0.9)]
    for _ in range(20):
        reward = rng.normal(size=4) * [1.0, 100.0, 1.0, 100.0]
        ended = rng.random(4) < 0.1
        scaled = grouped(reward, np.ones(4, bool), ended)
        for g, one in enumerate(alone):
            np.testing.assert_array_equal(scaled[g::2], one(reward[g::2], np.ones(2, bool), ended[g::2]))
    assert grouped.var[1] > 1000 * grouped.var[0]


def test_normaliser_survives_a_step_without_a_valid_row():
    normaliser = ReturnNormalizer(2)
    before = normaliser.state_dict()
    np.testing.assert_array_equal(normaliser(np.ones(2), np.zeros(2, bool), np.zeros(2, bool)), 0.0)
    assert normaliser.state_dict() == before


def test_normaliser_state_moves_to_another():
    first, second = ReturnNormalizer(4), ReturnNormalizer(4)
    rng = np.random.default_rng(1)
    for _ in range(10):
        first(rng.normal(size=4), np.ones(4, bool), np.zeros(4, bool))
    second.load_state_dict(first.state_dict())
    first.start_episodes()
    reward = rng.normal(size=4)
    args = (reward, np.ones(4, bool), np.zeros(4, bool))
    np.testing.assert_array_equal(first(*args), second(*args))


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [0, 0, 1, 2]])
def test_normaliser_state_of_other_groups_is_refused(groups):
    first, second = (ReturnNormalizer(4, group=np.array(group)) for group in ([0, 0, 1, 1], groups))
    first(np.arange(4.0), np.ones(4, bool), np.zeros(4, bool))
    before = second.state_dict()
    with pytest.raises(UnsupportedArgument, match=r"'mean' has shape \(2,\).*tasks"):
        second.load_state_dict(first.state_dict())
    assert second.state_dict() == before


class Minimal(ArrayVecEnv):
    """Only what the contract demands."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def reset(self):
        return ArrayReset(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))

    def send(self, actions):
        self.log.append(f"send {actions}")

    def recv(self):
        self.log.append("recv")
        return ArrayStep(*np.zeros((8, 1)))

    def close(self):
        """Nothing to free."""


def test_step_is_send_then_receive_and_the_rest_is_refused():
    env = Minimal()
    assert isinstance(env.step(np.int64(3)), ArrayStep)
    assert env.log == ["send 3", "recv"]
    with pytest.raises(NotImplementedError, match="array lane"):
        env.reset_envs(np.array([0]))
    with pytest.raises(NotImplementedError, match="construction"):
        env.seed(1)


def test_importing_the_room_loads_no_simulator_and_no_learner():
    code = (
        "import sys, lago_fast.envs as room\n"
        "from lago_fast.envs import ArrayStep, ClevrRobotArrayEnv, MetaworldArrayEnv\n"
        "from lago_fast.envs import make_clevr_robot, make_metaworld\n"
        "heavy = {'envpool', 'metaworld', 'mujoco', 'stable_baselines3', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'make_metaworld' in dir(room)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_unknown_export_is_an_attribute_error():
    import lago_fast.envs

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lago_fast.envs.nothing  # noqa: B018
