"""Experts, noisy experts, and the recording of whole episodes."""

import numpy as np
import pytest

from lago_fast.envs.frozen_lake import make_frozen_lake
from lago_fast.envs.overcooked import make_overcooked
from lago_fast.envs.text_env import TextVecEnv
from lago_fast.envs.text_recording import make_text_expert, record_text_episodes
from lago_fast.envs.text_transitions import check_transitions
from lago_fast.errors import UnsupportedArgument


def test_the_expert_on_the_lake_by_hand():
    env = make_frozen_lake(2)
    played = record_text_episodes(env, make_text_expert(env), 3, seed=0)
    assert played.episode_id.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert played.success.all()
    chosen = [actions[choice] for actions, choice in zip(played.admissible, played.choice, strict=True)]
    assert chosen == ["go down", "go down", "go right", "go down", "go right", "go right"] * 3
    assert played.reward.tolist() == [0, 0, 0, 0, 0, 1] * 3
    assert played.observation[1:6] == played.next_observation[:5]
    assert played.next_observation[5].startswith("You reached the goal")
    assert played.next_admissible[5] == ()


def test_rows_after_an_end_are_not_recorded():
    env = make_overcooked(3, horizon=5)
    played = record_text_episodes(env, make_text_expert(env, 1.0), 7, seed=0)
    check_transitions(played)
    assert np.bincount(played.episode_id).tolist() == [5] * 7
    assert played.truncated.sum() == 7
    assert all(played.next_admissible)
    assert not played.success.any()


def test_noise_lies_between_expert_and_random():
    def success(epsilon):
        env = make_overcooked(50)
        return record_text_episodes(env, make_text_expert(env, epsilon), 100, seed=1).success.mean()

    assert success(0.0) == 1
    assert success(0.5) > 0.5
    assert success(1.0) < 0.1


def test_a_seed_decides_what_is_recorded():
    def record(seed):
        env = make_overcooked(4)
        return record_text_episodes(env, make_text_expert(env, 0.3, seed=5), 6, seed)

    assert record(2).observation == record(2).observation
    assert record(2).observation != record(3).observation


def test_refusals():
    env = make_frozen_lake(1)
    for epsilon in (-0.1, 1.1, float("nan")):
        with pytest.raises(UnsupportedArgument, match="epsilon"):
            make_text_expert(env, epsilon)
    with pytest.raises(UnsupportedArgument, match="episodes=0"):
        record_text_episodes(env, make_text_expert(env), 0, seed=0)
    with pytest.raises(UnsupportedArgument, match="admissible"):
        record_text_episodes(env, lambda state: np.full(len(state.observation), 9), 1, seed=0)

    class Others(TextVecEnv):
        def reset(self, seed=None): ...
        def step(self, choice): ...
        def close(self): ...

    with pytest.raises(UnsupportedArgument, match="Others has no expert"):
        make_text_expert(Others())
