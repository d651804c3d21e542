"""The report's arithmetic, by hand."""

import pytest

from lago_fast.evaluate import TaskResult
from lago_fast.presets import EnvSettings, Experiment
from lago_fast.report import Outcome, make_report, sample_efficiency, stages

EXPERIMENT = Experiment(env=EnvSettings(tasks=("reach",), num_envs=2), seeds=(0, 1))


def outcome(arm, seed, success, steps_to_90=None, successes=5):
    steps = [1000 * (i + 1) for i in range(len(success))]
    curve = {"tasks": {"reach": {"env_steps": steps, "success": success}}, "steps_to_90": {"reach": steps_to_90}}
    tasks, stage_s = {"reach": TaskResult(10, successes, 1, 7.0)}, {"env": 1.5, "loss": 0.5, "prior": 0.0}
    return Outcome(arm, seed, curve, 4000, 2.0, None, {"gae": "cpp"}, tasks, stage_s)


def test_steps_to_ninety_percent_of_ppos_best():
    runs = {
        "ppo": [outcome("ppo", 0, [0.0, 0.2, 0.4, 0.8]), outcome("ppo", 1, [0.0, 0.0, 0.4, 0.8])],
        "lago": [outcome("lago", 0, [0.6, 0.9, 1.0, 1.0]), outcome("lago", 1, [0.4, 0.9, 1.0, 1.0])],
    }
    # PPO's best mean is 0.8, its 90 % 0.72: reached at step 4000 by PPO, at 2000 by LaGO
    found = sample_efficiency(runs)
    assert found["tasks"]["reach"]["steps"] == {"ppo": 4000, "lago": 2000}
    assert found["mean_lago_over_ppo"] == pytest.approx(0.5)


def test_a_task_that_ppo_never_solves_is_no_ratio():
    runs = {"ppo": [outcome("ppo", 0, [0.0, 0.02])], "lago": [outcome("lago", 0, [0.5, 1.0])]}
    assert sample_efficiency(runs)["mean_lago_over_ppo"] is None


def test_a_lago_that_never_gets_there_is_no_ratio_either():
    runs = {"ppo": [outcome("ppo", 0, [0.1, 0.9])], "lago": [outcome("lago", 0, [0.1, 0.2])]}
    assert sample_efficiency(runs)["mean_lago_over_ppo"] is None


def test_report_pools_seeds_and_keeps_the_promised_keys():
    runs = {
        "ppo": [outcome("ppo", 0, [0.0], None, 1), outcome("ppo", 1, [0.0], 3000, 2)],
        "lago": [outcome("lago", 0, [1.0], 1000, 9), outcome("lago", 1, [1.0], 2000, 10)],
    }
    references = {"prior": {"reach": [TaskResult(10, 5, 5, 3.0)]}}
    report = make_report(EXPERIMENT, references, runs, {"val_nll": 1.0}, {"raw_env_steps_per_s": 9.0}, 60.0)
    lago = report["arms"]["lago"]
    assert lago["success"] == pytest.approx(19 / 20)
    assert lago["env_steps"] == 8000
    assert lago["env_steps_per_s"] == pytest.approx(2000)
    assert lago["stages"]["env"] == {"seconds": 3.0, "share": 0.75, "speed_up": 4.0}
    assert report["tasks"]["reach"]["lago"]["steps_to_90"] == 1500
    # one seed never got there: no mean over the lucky one
    assert report["tasks"]["reach"]["ppo"]["steps_to_90"] is None
    assert report["arms"]["prior"]["env_steps_per_s"] is None
    keys = {"arms", "tasks", "per_seed", "budget", "prior_mode", "audit_kl_nats", "warm_start", "wall_s"}
    assert keys | {"raw_env_steps_per_s"} <= report.keys()
    assert [row["seed"] for row in report["per_seed"]["lago"]] == [0, 1]


def test_stages_are_summed_over_the_runs():
    found = stages([{"env": 1.5, "loss": 0.5}, {"env": 4.5, "loss": 1.5}])
    assert found["env"] == {"seconds": 6.0, "share": 0.75, "speed_up": 4.0}
    assert found["loss"]["speed_up"] == pytest.approx(4 / 3)
    assert stages([]) == {}
