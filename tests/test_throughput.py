"""The speed table's arithmetic and its arms, on a tiny env."""

import numpy as np
import pytest
import torch

from lago_fast import cli, runs, throughput
from lago_fast.envs.metaworld_tasks import task_phrasings
from lago_fast.presets import EnvSettings, Experiment, TrainSettings
from lago_fast.priors.base import PriorOutput
from lago_fast.training import groups_of
from tests.algorithms.point_env import ScriptedPrior

TINY = ("--num-envs", "2", "--n-steps", "8", "--batch-size", "8", "--n-epochs", "1", "--rounds", "2",
        "--max-episode-steps", "10")  # fmt: skip


def test_the_median_is_over_the_windows_of_one_arm():
    rates = throughput.Rates({"raw": [1.0, 9.0, 4.0], "ppo": [2.0]}, {})
    assert rates.median("raw") == 4.0


def test_the_plainest_wording_of_a_task_is_the_first_of_its_rows():
    counts = [len(task_phrasings()[task]) for task in ("push", "reach")]
    table = np.arange(sum(counts), dtype=np.float32)[:, None]
    rows = throughput.plainest_rows(("push", "reach"), table)
    assert {task: float(row[0]) for task, row in rows.items()} == {"push": 0.0, "reach": float(counts[0])}
    assert throughput.plainest_rows(("push",), None) is None


def test_every_arm_takes_its_turn_and_only_ours_have_stages():
    experiment = Experiment(
        env=EnvSettings(tasks=("reach",), num_envs=2, max_episode_steps=5),
        train=TrainSettings(n_steps=8, batch_size=8, n_epochs=1),
    )
    rates = throughput.interleaved(experiment, None, {"ppo": None}, rounds=2)
    assert {name: len(windows) for name, windows in rates.windows.items()} == {"raw": 2, "ppo": 2, "sb3_envpool": 2}
    assert all(rate > 0 for windows in rates.windows.values() for rate in windows)
    assert set(rates.stages) == {"ppo"}
    assert sum(stage["share"] for stage in rates.stages["ppo"].values()) == pytest.approx(1)


class Still(ScriptedPrior):
    """A prior of reach that stays where it is."""

    state_dim, instructions = 39, task_phrasings()["reach"]

    def __init__(self):
        super().__init__()
        self.action_dim = 4

    def query(self, state, instruction_id):
        assert len(instruction_id) == len(state)
        self.queried += len(state)
        mean = torch.zeros(len(state), 4)
        return PriorOutput(mean=mean, log_std=mean - 1)


def test_an_arm_with_a_guard_is_timed_without_the_episodes_of_its_prior():
    experiment = Experiment(
        env=EnvSettings(tasks=("reach",), num_envs=2, max_episode_steps=5),
        train=TrainSettings(n_steps=8, batch_size=8, n_epochs=1, guard=True),
    )
    prior = Still()
    throughput.interleaved(experiment, None, {"lago": prior}, rounds=2)
    assert prior.queried == 3 * 8 * 2  # every step of the rollouts, the warm-up's too, and nothing else


def test_a_window_is_no_shorter_than_an_episode():
    env = EnvSettings(tasks=("reach",), max_episode_steps=200)
    counts = [throughput.rollouts_of(Experiment(env=env, train=TrainSettings(n_steps=n))) for n in (128, 200, 500)]
    assert counts == [2, 1, 1]
    rolled = iter([(10, 1.0), (30, 3.0), (20, 1.0)])
    assert throughput._rate(lambda: next(rolled), 3) == 12


def test_lago_bench_prints_rates_and_stages_and_writes_them(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    assert cli.main(["bench", *TINY, "--tasks", "reach", "--json", str(out)]) == 0
    told = capsys.readouterr().out
    assert "of raw" in told
    assert "where the time of ppo went" in told
    written = runs.read_json(out)
    assert set(written["windows"]) == {"raw", "ppo", "sb3_envpool"}
    assert written["settings"]["env"]["num_envs"] == 2
    assert cli.main(["bench", *TINY, "--json", str(out)]) == 2
    assert "RunExists: json" in capsys.readouterr().err
    assert cli.main(["bench", "--rounds", "0"]) == 2


def test_simulators_are_grouped_where_that_was_faster():
    assert groups_of(EnvSettings(tasks=("push", "reach"), num_envs=32)) == 2
    assert groups_of(EnvSettings(tasks=("push", "reach"), num_envs=34)) == 1  # 17 of each
    assert groups_of(EnvSettings(tasks=("push",), num_envs=8)) == 1
    assert groups_of(EnvSettings(tasks=("push",), num_envs=64, groups=1)) == 1
