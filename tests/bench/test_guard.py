"""The guard's experiment: its arithmetic on made runs, and what its priors answer."""

from dataclasses import replace

import pytest
import torch

from bench import guard, guard_tasks


def made(arm, prior, success, reached, seed=0):
    curve = {"env_steps": [100, 200, 300, 400], "success": [0.5 if 100 * (i + 1) >= reached else 0.0 for i in range(4)]}
    row = {"task": "button-press", "seed": seed, "arm": arm, "prior": prior, "success": success}
    return {**row, "curve": curve}


def test_the_report_by_hand():
    rows = []
    for seed, ppo in enumerate((0.5, 0.7)):
        rows += [made("ppo", "", ppo, 400, seed), made("lago", "good", 0.9, 100, seed)]
        rows += [made("guarded", "good", 0.8, 200, seed), made("guarded", "uniform", ppo + 0.02, 400, seed)]
    text = "\n".join(guard.report(rows))
    assert "| good | lago | 90 |  |  | +30.0 | -33.1 to +93.1 | 2 |" in text  # 6.314 * 14.14 / sqrt(2) = 63.1
    assert "| uniform | guarded | 62 |  |  | +2.0 | +2.0 to +2.0 | 2 |" in text
    assert "button-press, 2 pairs: 0.75 unguarded, \n0.50 guarded, kept: 0.67" in text


def test_every_row_of_the_plan_has_a_degree_of_freedom():
    assert max(guard.T_90) >= len(guard.SEEDS) * len(guard_tasks.TASKS) - 1


def test_goals_are_told_as_numbers():
    texts, numbers = guard_tasks.goal_numbers("clevr-real")
    assert len(texts) == len(numbers) == len(set(texts))
    assert len(numbers.unique(dim=0)) == 80
    assert (numbers.sum(dim=1) == 3).all()
    assert guard_tasks.policy_table("clevr-real").shape == numbers.shape
    assert guard_tasks.policy_table("button-press") is None


@pytest.fixture
def small(monkeypatch, tmp_path):
    tasks = {name: replace(guard_tasks.TASKS[name], demos=2) for name in ("clevr-real", "button-press")}
    monkeypatch.setattr(guard_tasks, "TASKS", tasks)
    monkeypatch.setattr(guard_tasks, "FIT_STEPS", 5)
    monkeypatch.setattr(guard_tasks, "FEW", 2)
    for name in tasks:
        guard_tasks.record(name, tmp_path)
    guard_tasks.make_prior.cache_clear()
    yield lambda kind, name: guard_tasks.make_prior(kind, name, tmp_path)
    guard_tasks.make_prior.cache_clear()


def test_bad_priors_are_bad_in_the_way_that_they_are_named(small):
    state, ids = torch.rand(6, 10), torch.arange(6)
    good = small("good", "clevr-real").query(state, ids).log_probs
    adversarial = small("adversarial", "clevr-real").query(state, ids).log_probs
    assert not torch.equal(good, adversarial)
    torch.testing.assert_close(good.sort(dim=1).values, adversarial.sort(dim=1).values)
    assert small("uniform", "clevr-real").query(state, ids).log_probs.unique().numel() == 1
    other = small("other_task", "clevr-real")
    assert not torch.equal(other.words, small("good", "clevr-real").words)
    assert len({small(kind, "clevr-real").digest for kind in guard_tasks.PRIORS}) == 5

    state, ids = torch.rand(6, 39), torch.zeros(6, dtype=torch.int64)
    good, negated = (small(kind, "button-press").query(state, ids) for kind in ("good", "adversarial"))
    torch.testing.assert_close(negated.mean, -good.mean)
    assert (small("uniform", "button-press").query(state, ids).log_std > 2).all()
