"""Learning parity: its arithmetic by hand, and every exact rung trained for a moment."""

from dataclasses import replace

import pytest

from bench.bench_prior import folder_of
from bench.gpu_hours.parity import compared, rungs, train
from bench.gpu_hours.work import Work, shaped


def run_of(*success):
    return {"success": list(success)}


def test_runs_are_compared_with_the_first_rung_on_the_same_prior_seed_by_seed():
    found = {
        1: [run_of(0.5, 1.0), run_of(0.0, 1.0)],
        2: [run_of(0.7, 1.0), run_of(0.3, 0.9)],  # better by 0.1 on both seeds
        3: [],
        5: [run_of(0.4)],
        7: [run_of(0.2)],
    }
    second, seventh = compared(found)
    assert (second["rung"], second["against"]) == (2, 1)
    assert second["mean"] == pytest.approx(0.1)
    assert second["half_width_90"] == pytest.approx(0)
    assert (seventh["rung"], seventh["against"]) == (7, 5)
    assert seventh["mean"] == pytest.approx(-0.2)
    assert seventh["half_width_90"] is None  # of one seed


@pytest.mark.slow
def test_exact_rungs_train_and_are_evaluated():
    small = {"num_envs": 2, "n_steps": 8, "batch_size": 8, "n_epochs": 1, "max_episode_steps": 20, "eval_episodes": 2}
    work = replace(Work(), task="reach", **small)
    made = rungs(shaped(work, folder_of("minilm"), "bf16"))
    assert set(made) == {1, 2, 3, 5, 6, 7}
    for rung, threshold in ((2, 0.0), (7, 1.1)):
        run = train(made[rung], work, 2, threshold)
        assert run["env_steps"] == [16, 32]  # no episode of 20 steps ends within 16
        assert run["threshold_steps"] == (run["env_steps"][0] if rung == 2 else None)
        assert 0 < run["seconds"][0] < run["seconds"][1]
        assert all(success in (0.0, 0.5, 1.0) for success in run["success"])
