"""The text-game experiment: its arithmetic on made runs, what it counts, and every arm with hardly any steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.llm_priors import report, run, work
from lago_fast.algorithms.dqn_prior import DQNPrior
from lago_fast.envs.text_recording import record_text_episodes
from lago_fast.envs.text_transitions import check_transitions
from lago_fast.priors.cached_text_prior import CachedTextPrior
from tests.algorithms.text_fakes import FakeEncoder, FakePrior, TableGame

ROOT = Path(__file__).resolve().parents[2]


def trained(arm, prior, success, seed=0, walked=0, game="overcooked", **more):
    curve = {"env_steps": [100, 200, 300, 400], "success": success, "total_reward": success}
    row = {"game": game, "seed": seed, "arm": arm, "prior": prior, "fraction": 0, "success": success[-1]}
    return {**row, "curve": curve, "walkthrough_steps": walked, "env_steps": 400, **more}


def offline(arm, prior, fraction, success, walked=0, seed=0):
    row = {"game": "overcooked", "seed": seed, "arm": arm, "prior": prior, "fraction": fraction, "success": success}
    return {**row, "transitions": round(1000 * fraction), "full_transitions": 1000, "walkthrough_steps": walked}


def test_steps_to_a_success_count_walkthroughs():
    rows = [trained("dqn_prior", "fitted", [0.2, 0.8, 0.9, 1.0], walked=14)]
    assert report.steps_to(rows, 0.8) == 214
    assert report.steps_to(rows, 1.1) == float("inf")
    both = [*rows, trained("dqn_prior", "fitted", [0.0, 0.0, 0.9, 1.0], seed=1, walked=16)]
    assert report.steps_to(both, 0.8) == 315  # of the mean curve


def test_interval_by_hand():
    mean, half = report.interval([0.1, 0.3, 0.5])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(2.920 * 0.2 / 3**0.5)


def test_online_criterion_by_hand():
    base = [trained("dqn", "", [0.0, 0.3, 0.6, 0.9], seed=s) for s in range(2)]
    own = [trained("dqn_prior", "fitted", [0.7, 0.9, 0.9, 0.9], seed=s, walked=10) for s in range(2)]
    found = report.criteria(base + own)["online overcooked dqn_prior fitted"]
    assert found["baseline_final"] == pytest.approx(0.6)  # of the last three
    assert (found["steps"], found["baseline_steps"]) == (110, 300)
    assert found["mean_success_minus_baseline"] == pytest.approx(0.85 - 0.45)


def test_offline_criterion_charges_the_walkthroughs():
    rows = [offline("cql", "", 1.0, 0.8), offline("cql_prior", "fitted", 0.01, 0.5, 14)]
    rows += [offline("cql_prior", "fitted", 0.03, 0.9, 14), offline("cql_prior", "fitted", 0.08, 1.0, 14)]
    found = report.criteria(rows)["offline overcooked fitted"]
    assert found["fraction"] == 0.03
    assert found["share_spent"] == pytest.approx(0.044)


def test_queries_per_thousand_steps():
    rows = [trained("dqn_prior", "fitted", [1, 1, 1, 1], seed=s, queries=500, first_sightings=50) for s in range(2)]
    assert report.query_figures(rows) == pytest.approx((1250, 125, 10))


def test_report_shows_every_arm(tmp_path):
    rows = [trained("dqn", "", [0, 0.3, 0.6, 0.9]), trained("dqn_prior", "fitted", [0.7, 0.9, 0.9, 0.9], walked=10)]
    text = "\n".join(report.lines(rows))
    assert "| dqn_prior | fitted | 10 | 90 | 85 | 110 | 0.37 |" in text
    report.plot_online(rows, tmp_path / "online.png")
    report.plot_offline(rows, tmp_path / "offline.png")
    assert (tmp_path / "online.png").stat().st_size > 1000


def test_the_episodes_of_both_are_whole():
    env = TableGame(4)
    one, other = (record_text_episodes(env, lambda state: [0] * len(state.observation), n, n) for n in (2, 3))
    both = work.together(one, other)
    check_transitions(both)
    assert len(both.success) == 5
    assert both.observation == one.observation + other.observation
    assert both.reward.tolist() == [*one.reward, *other.reward]


def test_jobs_have_one_key_each():
    keys = [job.key for job in run.jobs((0, 1), Path(), False)]
    assert len(keys) == len(set(keys))
    assert {key[2] for key in keys} == {"random", "prior", *run.OFFLINE, *run.ONLINE}


def test_counts_first_sightings_as_the_cache_does_and_not_those_of_evaluations():
    cached = CachedTextPrior(FakePrior(lambda _, action: float(len(action))))
    counted = work.Counted(cached)
    model = DQNPrior(TableGame(4), counted, FakeEncoder(), seed=0, learning_starts=10)
    model.learn(200, log_interval=10**6)  # a row of the log would take the figures
    told = cached.telemetry()
    assert (counted.asked, counted.first_sightings) == (told["prior/queries"], told["prior/first_sightings"])
    assert counted.first_sightings < counted.asked / 10
    counted.counting = False
    counted.query(["other"], ["hall"], [("go",)])
    assert counted.asked == told["prior/queries"]


def test_the_cache_changes_nothing_that_is_learnt():
    found = []
    for cached in (False, True):
        prior = FakePrior(lambda _, action: float(len(action)))
        model = DQNPrior(TableGame(4), CachedTextPrior(prior) if cached else prior, FakeEncoder(), seed=0)
        model.learn(200)
        found.append(torch.cat([p.detach().flatten() for p in model.network.parameters()]))
    assert torch.equal(*found)


@pytest.mark.slow
def test_every_arm_runs_and_a_second_start_goes_on(tmp_path):
    command = [sys.executable, "-m", "bench.llm_priors.run", str(tmp_path), "--seeds", "0", "--smoke"]
    command += ["--games", "overcooked"]  # which has every arm, and needs no interpreter
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    rows = run.read(tmp_path)
    assert {run.key(row) for row in rows} == {
        job.key for job in run.jobs((0,), tmp_path, True) if job.game == "overcooked"
    }
    (tmp_path / run.ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert len(run.read(tmp_path)) == len(rows)
    subprocess.run([sys.executable, "-m", "bench.llm_priors.report", str(tmp_path)], check=True, cwd=ROOT)
    assert {"report.md", "criteria.json", "online.png", "offline.png"} <= {p.name for p in tmp_path.iterdir()}
