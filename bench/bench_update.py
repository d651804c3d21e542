"""Milliseconds of an update per minibatch on drawn rollouts: what bench/update.py times, without a simulator.

An update sees the rows of a rollout and no env, so that numbers drawn in Meta-World's shape cost what Meta-World's do;
EnvPool is not needed. The arms are those of bench/update.py, and do not take turns.
Run: pytest bench/bench_update.py --benchmark-only
"""

from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box

from bench import cases
from bench.update import ARMS, EPOCHS, N_STEPS, NUM_ENVS, ROWS
from lago_fast import FastKLPPO, runs
from lago_fast.envs.metaworld import ACTION_DIM, STATE_DIM
from lago_fast.envs.sb3_adapter import SB3VecEnv
from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv

ROUNDS = 20


class Drawn(ArrayVecEnv):
    """Observations and rewards drawn anew at each step, in the shape of Meta-World; no episode ends."""

    instructions, tasks, state_dim = ["wait"], ["drawn"], STATE_DIM
    observation_space = Box(-np.inf, np.inf, (STATE_DIM,), np.float32)
    action_space = Box(-1, 1, (ACTION_DIM,), np.float32)

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.normalizer = num_envs, None
        self.task_id = self.instruction_id = np.zeros(num_envs, np.int64)
        self.seed(0)

    def seed(self, seed: int) -> list[int]:
        """Seed the generator that all envs draw from."""
        self.rng = np.random.default_rng(seed)
        return [seed] * self.num_envs

    def reset(self) -> ArrayReset:
        """Draw the first observations."""
        return ArrayReset(self._draw(STATE_DIM), self.instruction_id.copy())

    def reset_envs(self, ids: np.ndarray) -> ArrayReset:
        """Draw other observations for some envs."""
        return ArrayReset(self._draw(STATE_DIM)[ids], self.instruction_id[ids])

    def send(self, actions: np.ndarray) -> None:
        """Take actions, which change nothing."""
        del actions

    def recv(self) -> ArrayStep:
        """Draw what a step returns."""
        reward, never = self._draw(), np.zeros(self.num_envs, bool)
        columns = (never.copy(), never.copy(), ~never, never.copy(), self.instruction_id.copy())
        return ArrayStep(self._draw(STATE_DIM), reward, reward.copy(), *columns)

    def close(self) -> None:
        """Hold nothing."""

    def _draw(self, *width: int) -> np.ndarray:
        return self.rng.standard_normal((self.num_envs, *width), np.float32)


def model_of(rows: int, arm: str, device: str) -> FastKLPPO:
    """Return an arm's model, which has collected a rollout and learnt from it once."""
    settings: Any = {"n_steps": N_STEPS, "batch_size": rows, "n_epochs": EPOCHS, "device": device, "seed": 0}
    model = FastKLPPO("MlpPolicy", SB3VecEnv(Drawn(NUM_ENVS)), **settings, **ARMS[device][arm])
    if arm == "autograd":
        assert model._head.networks is not None
        model._head.networks.impl = "reference"
    model.learn(1, log_interval=1000)
    assert model.impls["mlp"] == ("cpp" if arm == "native" else "reference"), arm
    return model


@pytest.mark.parametrize("arm", list(ARMS[cases.DEVICE.type]))
@pytest.mark.parametrize("rows", ROWS)
def test_update(benchmark, rows, arm):
    model = model_of(rows, arm, cases.DEVICE.type)
    benchmark.pedantic(cases.synchronised(model.train), rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(op="update", impl=arm, rows=rows, rollout="drawn", **runs.provenance())
    if benchmark.stats is not None:  # --benchmark-disable
        minibatches = EPOCHS * NUM_ENVS * N_STEPS // rows
        benchmark.extra_info["ms_per_minibatch"] = benchmark.stats.stats.median / minibatches * 1e3
