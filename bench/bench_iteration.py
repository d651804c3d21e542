"""One iteration of FastKLPPO on Meta-World push, whole and stage by stage, with shares and ceilings.

64 envs, 128 steps, 10 epochs, MLP 64x64, no prior. Run: pytest bench/bench_iteration.py --benchmark-only
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lago_fast import FastKLPPO, make_metaworld, runs
from lago_fast.algorithms.stage_clock import shares

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_ENVS, N_STEPS, N_EPOCHS, ROUNDS = 64, 128, 10, 5
BATCHES = [256, 2048]


@cache
def trained(batch_size: int) -> FastKLPPO:
    """Return a model that has run one iteration."""
    env = make_metaworld(["push"], NUM_ENVS, groups=2, normalize_reward=True)
    settings = {"n_steps": N_STEPS, "batch_size": batch_size, "n_epochs": N_EPOCHS, "device": DEVICE, "seed": 0}
    model = FastKLPPO("MlpPolicy", env, **settings)
    model.learn(1, log_interval=1000)
    return model


def say(benchmark: Any, **facts: Any) -> None:
    """Record what decides the times."""
    about = {"num_envs": NUM_ENVS, "n_steps": N_STEPS, "n_epochs": N_EPOCHS, **runs.provenance()}
    benchmark.extra_info.update(facts, **about)


@pytest.mark.parametrize("batch_size", BATCHES)
def test_iteration(benchmark, batch_size):
    model = trained(batch_size)
    before, steps = dict(model.stage_clock.total), model.num_timesteps
    call = {"log_interval": 1000, "reset_num_timesteps": False}
    benchmark.pedantic(model.learn, (1,), call, rounds=ROUNDS)
    spent = {stage: seconds - before[stage] for stage, seconds in model.stage_clock.total.items()}
    found = {stage: share._asdict() for stage, share in shares(spent).items()}
    # the clock and the benchmark see the same iterations
    assert sum(spent.values()) == pytest.approx(benchmark.stats.stats.total, rel=0.05)
    rate = (model.num_timesteps - steps) / benchmark.stats.stats.total
    say(benchmark, batch_size=batch_size, env_steps_per_s=rate, stages=found)


@pytest.mark.parametrize("batch_size", BATCHES)
def test_update(benchmark, batch_size):
    model = trained(batch_size)
    benchmark.pedantic(model.train, rounds=ROUNDS)
    say(benchmark, batch_size=batch_size)


def test_advantage(benchmark):
    model = trained(2048)
    buffer = model.rollout_buffer
    benchmark(buffer.compute_returns_and_advantage, model.gamma, model.gae_lambda, model.impls["gae"])
    say(benchmark)


def test_policy_answers_one_step(benchmark):
    model = trained(2048)
    observation = torch.zeros(NUM_ENVS, *model.observation_space.shape, device=DEVICE)
    with torch.no_grad():
        benchmark(model._head.act, observation)
    say(benchmark, rows=NUM_ENVS)


@pytest.mark.parametrize("groups", [1, 2])
def test_env_step(benchmark, groups):
    lane = make_metaworld(["push"], NUM_ENVS, groups=groups, normalize_reward=True).array_lane
    lane.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (NUM_ENVS, 4)).astype(np.float32)
    benchmark.pedantic(lane.step, (actions,), rounds=N_STEPS)
    say(benchmark, groups=groups)
    lane.close()
