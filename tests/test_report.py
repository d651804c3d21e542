"""The report's arithmetic, by hand."""

import pytest

from lago_fast.envs.suites import suite_named
from lago_fast.evaluate import TaskResult, wilson
from lago_fast.presets import EnvSettings, Experiment
from lago_fast.report import Outcome, curves_of, make_report, sample_efficiency, splits_of, stages

EXPERIMENT = Experiment(env=EnvSettings(tasks=("reach",), num_envs=2), seeds=(0, 1))


def outcome(arm, seed, success, steps_to_90=None, successes=5, settled_from=0):
    steps = [1000 * (i + 1) for i in range(len(success))]
    tasks = {"reach": {"env_steps": steps, "success": success}}
    curve = {"tasks": tasks, "steps_to_90": {"reach": steps_to_90}, "settled_from": settled_from}
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


def test_the_first_to_end_do_not_count_as_progress():
    # where success ends an episode the first to end are successes
    curves = {"ppo": [1.0, 0.4, 0.8], "lago": [1.0, 0.8, 0.9]}
    runs = {arm: [outcome(arm, 0, success, settled_from=2000)] for arm, success in curves.items()}
    found = sample_efficiency(runs)["tasks"]["reach"]
    assert found["ppo_best_success"] == pytest.approx(0.8)
    assert found["steps_to_ppo_final"] == {"ppo": 3000, "lago": 2000}
    assert curves_of(EXPERIMENT, runs)["reach"]["ppo"][0][0].tolist() == [2000, 3000]
    # shorter than that: the whole curve
    short = {arm: [outcome(arm, 0, success, settled_from=10**9)] for arm, success in curves.items()}
    assert sample_efficiency(short)["tasks"]["reach"]["ppo_best_success"] == 1.0


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
    keys = {"arms", "tasks", "per_seed", "budget", "prior_mode", "overlap", "audit_kl_nats", "warm_start", "wall_s"}
    assert keys | {"imitation", "raw_env_steps_per_s"} <= report.keys()
    assert [row["seed"] for row in report["per_seed"]["lago"]] == [0, 1]


def test_each_task_weighs_alike_in_its_split_and_each_split_in_the_mean():
    suite = suite_named("clevr-robot")
    successes = {"real": 90, "rephrase": 60, "easy": 30, "two-goals": 40, "three-goals": 0, "line": 0, "gather": 0}
    other = dict.fromkeys(successes, 10)
    results = {
        arm: {task: [TaskResult(50, n // 2, 0, 0.0)] * 2 for task, n in counts.items()}
        for arm, counts in (("lago", successes), ("ppo", other))
    }
    found = splits_of(suite, results, tuple(successes))
    assert {name: arms["lago"]["success"] for name, arms in found["splits"].items()} == pytest.approx(
        {"real": 0.9, "rephrase": 0.6, "easy": 0.3, "hard": 0.1, "mean": 0.475}
    )
    assert found["splits"]["real"]["lago"]["success_ci95"] == pytest.approx(wilson(90, 100))
    assert found["splits"]["hard"]["lago"]["episodes"] == 400
    assert found["lago_minus_ppo"]["mean"] == pytest.approx(0.375)
    low, high = found["lago_minus_ppo"]["ci95"]
    assert low < 0.375 < high
    assert found["published"]["gpu_hours"] == 36
    # with some families alone there are some of the splits and no mean, and Meta-World has none
    some = splits_of(suite, results, ("real", "easy", "line"))
    assert set(some["splits"]) == {"real", "easy"}
    assert some["lago_minus_ppo"] is None
    assert splits_of(suite_named("metaworld"), results, ("push",)) == {}


def test_the_report_of_clevr_robot_has_splits_and_core_hours():
    families = tuple(name for members in suite_named("clevr-robot").splits.values() for name in members)
    settings = EnvSettings(env="clevr-robot", tasks=("real",), eval_tasks=families, num_envs=2)
    curve = {"tasks": {"real": {"env_steps": [10, 20], "success": [0.2, 0.4]}}, "steps_to_90": {"real": None}}
    curve["settled_from"] = 10
    tasks = {name: TaskResult(10, 8 if name == "real" else 2, 0, 1.0) for name in families}
    runs = {arm: [Outcome(arm, 0, curve, 20, 1.0, None, {}, tasks, {}, cpu_s=1800.0)] for arm in ("ppo", "lago")}
    experiment = Experiment(env=settings, seeds=(0,))
    report = make_report(experiment, {"random": {t: [r] for t, r in tasks.items()}}, runs, {}, {}, 1.0)
    assert set(report["tasks"]) == set(families)
    assert report["splits"]["mean"]["lago"]["success"] == pytest.approx(0.35)
    assert report["arms"]["lago"]["core_hours"] == pytest.approx(0.5)
    assert report["arms"]["random"]["core_hours"] is None
    assert report["per_seed"]["ppo"][0]["mean"] == pytest.approx(0.35)
    assert report["lago_minus_ppo"]["mean"] == pytest.approx(0.0)
    assert report["sample_efficiency"]["tasks"]["real"]["steps_to_ppo_final"] == {"ppo": 20, "lago": 20}


def test_stages_are_summed_over_the_runs():
    found = stages([{"env": 1.5, "loss": 0.5}, {"env": 4.5, "loss": 1.5}])
    assert found["env"] == {"seconds": 6.0, "share": 0.75, "speed_up": 4.0}
    assert found["loss"]["speed_up"] == pytest.approx(4 / 3)
    assert stages([]) == {}
