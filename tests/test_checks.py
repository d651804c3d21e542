"""What an experiment is refused for is found before its folder is touched."""

import math
from dataclasses import fields, is_dataclass, replace

import pytest

from lago_fast.checks import check_experiment
from lago_fast.errors import LagoError
from lago_fast.experiment import compare
from lago_fast.presets import PRESETS
from lago_fast.runs import open_run

pytest.importorskip("transformers", reason="stage 1 needs the extra 'llm'")
DEMO = replace(PRESETS["demo"], env=replace(PRESETS["demo"].env, tasks=("reach", "push"), num_envs=4))

# what is asked for, and what the refusal names
REFUSED = [
    ({"arms": ()}, "arms"),
    ({"arms": ("ppo", "dqn")}, "arms"),
    ({"arms": ("ppo", "ppo")}, "arms"),
    ({"seeds": ()}, "seeds"),
    ({"seeds": (1, 1)}, "seeds"),
    ({"seeds": (0, -1)}, "seed=-1"),
    ({"seeds": (2**32,)}, "seed=4294967296"),
    ({"eval_episodes": 0}, "eval_episodes"),
    ({"env": {"tasks": ("reach", "fly")}}, "fly"),
    ({"env": {"eval_tasks": ("push",)}}, "eval_tasks"),
    ({"env": {"num_envs": 3}}, "num_envs"),
    ({"env": {"max_episode_steps": 0}}, "max_episode_steps"),
    ({"env": {"groups": 3}}, "groups"),
    ({"env": {"gamma": 1.5}}, "gamma"),
    ({"env": {"explained_variance": 0.0}}, "explained_variance"),
    ({"env": {"sample_actions": True}}, "sample_actions"),
    ({"env": {"words": "student"}, "train": {"prior_mode": "exact"}}, "words"),
    ({"demos": {"episodes_per_task": 0}}, "episodes_per_task"),
    ({"demos": {"num_envs_per_task": 0}}, "num_envs_per_task"),
    ({"demos": {"action_noise": math.nan}}, "action_noise"),
    ({"demos": {"noisy_tasks": ("push",)}}, "noisy_tasks"),
    ({"demos": {"seed": -1}}, "seed"),
    ({"prior": {"backbone": "no/such-model"}}, "backbone"),
    ({"prior": {"epochs": 0}}, "epochs"),
    ({"prior": {"batch_size": 0}}, "batch_size"),
    ({"prior": {"learning_rate": math.inf}}, "lr"),
    ({"prior": {"patience": 0}}, "patience"),
    ({"prior": {"input_noise": math.nan}}, "input_noise"),
    ({"prior": {"wording_noise": -0.1}}, "wording_noise"),
    ({"prior": {"wordings": 0}}, "wordings"),
    ({"prior": {"layers": 99}}, "layers"),
    ({"prior": {"head_hidden": 0}}, "head_hidden"),
    ({"prior": {"std_floor": 0.0}}, "std_floor"),
    ({"prior": {"seed": -1}}, "seed"),
    ({"prior": {"student_epochs": 0}}, "epochs"),
    ({"prior": {"noisy_copies": -1}}, "noisy_copies"),
    ({"prior": {"rollout_noise": (0.1, math.nan)}}, "rollout_noise"),
    ({"prior": {"student": {"hidden": 0}}}, "hidden"),
    ({"train": {"steps_per_task": 0}}, "steps_per_task"),
    ({"train": {"n_steps": 0}}, "n_steps"),
    ({"train": {"batch_size": 1}}, "batch_size"),
    ({"train": {"n_epochs": 0}}, "n_epochs"),
    ({"train": {"learning_rate": -1.0}}, "learning_rate"),
    ({"train": {"log_std_init": math.inf}}, "log_std_init"),
    ({"train": {"ent_coef": math.nan}}, "ent_coef"),
    ({"train": {"net_arch": (64, 0)}}, "net_arch"),
    ({"train": {"kl_coef": -1.0}}, "kl_coef"),
    ({"train": {"kl_coef_end": math.inf}}, "kl_coef_end"),
    ({"train": {"kl_coef_until": 0.0}}, "until"),
    ({"train": {"guard_floor": 2.0}}, "floor"),
    ({"train": {"imitate_passes": -1}}, "imitate_passes"),
]


def changed(experiment, changes):
    """The experiment with some settings changed, those of its parts by their own names."""
    parts = {field.name for field in fields(experiment) if is_dataclass(getattr(experiment, field.name))}
    return replace(
        experiment,
        **{k: replace(getattr(experiment, k), **value) if k in parts else value for k, value in changes.items()},
    )


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=lambda case: str(case))
def test_a_comparison_that_cannot_be_had_leaves_the_old_one(changes, named, tmp_path):
    open_run(tmp_path, {"old": True})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LagoError, match=named):
        compare(changed(DEMO, changes), tmp_path, overwrite=True, report=lambda _: None)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_pass(preset):
    check_experiment(PRESETS[preset])


def test_what_is_odd_but_has_a_meaning_passes():
    odd = {"env": {"gamma": 0.0}, "train": {"learning_rate": 0.0, "ent_coef": -0.01, "kl_coef": 0.0, "net_arch": ()}}
    check_experiment(changed(DEMO, odd))
