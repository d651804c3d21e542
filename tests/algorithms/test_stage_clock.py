"""The clock of stages: nothing is counted twice, nothing is left out, and it costs next to nothing."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from lago_fast import FastKLPPO
from lago_fast.algorithms import stage_clock
from lago_fast.algorithms.stage_clock import STAGES, StageClock, shares
from tests.algorithms.point_env import PointEnv, ScriptedPrior

CPU = torch.device("cpu")


def test_a_lap_goes_to_the_stage_that_ended(monkeypatch):
    readings = iter([0.0, 1.0, 3.0, 3.5, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    clock = StageClock(CPU)
    clock.lap("env")
    clock.lap("policy")
    clock.lap("env")
    seconds = clock.close()
    assert {name: s for name, s in seconds.items() if s} == {"env": 1.5, "policy": 2.0}
    assert clock.total == seconds
    assert clock.iterations == 1


def test_an_iteration_starts_from_zero_and_the_total_goes_on(monkeypatch):
    readings = iter([0.0, 1.0, 1.0, 5.0, 5.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    clock = StageClock(CPU)
    clock.lap("env")
    clock.close()
    clock.lap("env")
    assert clock.close()["env"] == 4.0
    assert clock.total["env"] == 5.0


def test_shares_and_the_ceiling_of_each_stage():
    found = shares({"env": 3.0, "loss": 1.0, "prior": 0.0})
    assert list(found) == ["env", "loss"]
    assert found["env"] == (3.0, 0.75, 4.0)
    assert found["loss"] == (1.0, 0.25, pytest.approx(4 / 3))
    assert shares({"env": 2.0})["env"].speed_up is None
    assert shares(dict.fromkeys(STAGES, 0.0)) == {}


@pytest.mark.parametrize("prior", [None, ScriptedPrior()])
def test_the_stages_sum_to_the_iterations(prior, monkeypatch):
    model = FastKLPPO(
        "MlpPolicy", make_vec_env(PointEnv, n_envs=8), n_steps=32, batch_size=64, device="cpu", prior=prior
    )
    model.set_logger(configure(None, []))
    ticks = itertools.count()
    monkeypatch.setattr(stage_clock, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    model.learn(3 * 256, log_interval=1000)
    assert model.stage_clock.iterations == 3
    # every reading is a second after the one before: of all but the first each belongs to a stage, or begins one of
    # the next three iterations
    assert sum(model.stage_clock.total.values()) == next(ticks) - 1 - 3
    spent = {name for name, seconds in model.stage_clock.total.items() if seconds > 0}
    assert {"env", "policy", "transfer", "advantage", "logging"} <= spent
    assert ("prior" in spent) == (prior is not None)
    logged = model.logger.name_to_value
    assert {f"time/{name}_s" for name in spent} <= logged.keys()


def test_time_between_two_learns_belongs_to_no_stage(monkeypatch):
    model = FastKLPPO("MlpPolicy", make_vec_env(PointEnv, n_envs=2), n_steps=32, batch_size=64, device="cpu")
    seconds = [0.0]
    monkeypatch.setattr(stage_clock, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    model.learn(64)
    seconds[0] = 3600.0
    model.learn(64, reset_num_timesteps=False)
    assert model.stage_clock.iterations == 2
    assert sum(model.stage_clock.total.values()) == 0.0


@pytest.mark.gpu
def test_on_cuda_the_stages_are_measured_by_events():
    device = torch.device("cuda")
    clock = StageClock(device)
    a = torch.randn(4096, 4096, device=device)
    for _ in range(5):
        a = a @ a / 4096
    clock.lap("policy")
    clock.lap("env")
    seconds = clock.close()
    assert seconds["policy"] > seconds["env"] >= 0
    assert tuple(clock.total) == STAGES
