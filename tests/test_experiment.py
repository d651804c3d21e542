"""The whole slice at toy size: demonstrations, prior, student, every arm, report, curves, figure."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lago_fast import FastKLPPO
from lago_fast.envs.suites import suite_named
from lago_fast.errors import RunExists, UnsupportedArgument
from lago_fast.experiment import compare
from lago_fast.presets import PRESETS
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.runs import is_run, load_table
from lago_fast.stage_one import compact_table, policy_table, words_of
from lago_fast.training import make_env, rows_to_imitate, train_run

pytest.importorskip("transformers", reason="stage 1 needs the extra 'llm'")


@pytest.fixture(scope="module")
def toy():
    base = PRESETS["long"]
    return replace(
        base,
        seeds=(0,),
        eval_episodes=2,
        measure_baselines=False,
        env=replace(base.env, tasks=("reach", "push"), num_envs=4, max_episode_steps=30),
        demos=replace(base.demos, episodes_per_task=2),
        prior=replace(base.prior, epochs=1, student_epochs=1, rollout_noise=(0.3,), layers=1),
        train=replace(base.train, steps_per_task=300, n_steps=32, batch_size=64, n_epochs=2, guard=False),
    )


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "run"
    return out, compare(toy, out, report=lambda _: None)


def test_every_arm_is_trained_evaluated_and_reported(finished, toy):
    out, report = finished
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert set(report["arms"]) == {"random", "expert", "prior", *toy.arms}
    for arm in toy.arms:
        assert report["arms"][arm]["env_steps"] >= 600
        assert report["arms"][arm]["episodes"] == 4
        assert is_run(out / "runs" / f"{arm}_0")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_guided_arms_alone_log_the_prior_and_its_audit(finished):
    out, report = finished
    headers = {arm: (out / "runs" / f"{arm}_0" / "progress.csv").read_text().splitlines()[0] for arm in ("ppo", "lago")}
    assert "train/prior_kl" in headers["lago"]
    assert "prior/audit_kl_nats" in headers["lago"]
    assert "prior" not in headers["ppo"]
    assert report["audit_kl_nats"] >= 0
    assert report["per_seed"]["ppo"][0]["audit_kl_nats"] is None


def test_every_preset_guards():
    assert all(experiment.train.guard and experiment.train.guard_imitate for experiment in PRESETS.values())


def test_the_guard_is_a_setting_of_the_training(finished, toy, tmp_path):
    guarded = replace(toy, train=replace(toy.train, guard=True, steps_per_task=2000))
    student = AmortisedPrior.load(finished[0] / "student")
    table = compact_table(student.instruction_table().numpy())
    train_run("lago", 0, guarded, folder=tmp_path, table=table, prior=student, num_threads=1)
    header = (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert {"prior/guard_weight_reach", "prior/guard_advantage_push"} <= set(header.split(","))


def test_a_student_is_imitated_in_all_wordings_of_the_tasks(finished, toy, tmp_path):
    student = AmortisedPrior.load(finished[0] / "student")
    table = compact_table(student.instruction_table().numpy())
    env = make_env(toy.env, 0, table)
    lane = env.array_lane
    seen, ids, task = rows_to_imitate(student, toy.env, lane, table, 0)
    env.close()
    assert len(seen) == 4 * student.taught.rows
    assert set(ids) == set(range(len(lane.instructions)))  # of both tasks
    words = suite_named("metaworld").texts
    assert all((lane.instructions[i] in words(("push",))) == (k == 1) for i, k in zip(ids, task, strict=True))
    states = {row.tobytes() for row in student.taught.state.numpy()}
    assert {row.tobytes() for row in seen[:, : lane.state_dim]} == states
    index = {text: i for i, text in enumerate(student.instructions)}
    np.testing.assert_array_equal(seen[:, lane.state_dim :], table[[index[lane.instructions[i]] for i in ids]])
    imitating = replace(toy, train=replace(toy.train, imitate_passes=1))
    trained = train_run("lago", 0, imitating, folder=tmp_path, table=table, prior=student, num_threads=1)
    assert trained.env_steps >= 600
    plain = train_run("lago", 0, replace(toy, train=replace(toy.train, kl_coef=0.0, kl_coef_end=0.0)),
                      folder=tmp_path / "plain", table=table, prior=student, num_threads=1)  # fmt: skip
    kls = []
    for model in (trained.model, plain.model):
        with torch.no_grad():
            outputs, _ = model._head.forward(torch.from_numpy(seen[:512]))
            said = student(
                torch.from_numpy(seen[:512, : lane.state_dim]), model._prior_ids[torch.from_numpy(ids[:512])]
            )
            kls.append(float(model._head.prior_kl(outputs, model._head.prior_outputs(said)).mean()))
    assert kls[0] < 0.7 * kls[1]
    for wrong, match in (
        ({"prior_mode": "exact"}, "imitate_passes: an exact prior"),
        ({"guard": True, "guard_imitate": False}, "imitate_passes: guard_imitate=False"),
        ({"imitate_passes": -1}, "imitate_passes=-1"),
    ):
        with pytest.raises(UnsupportedArgument, match=match):
            compare(replace(imitating, train=replace(imitating.train, **wrong)), tmp_path / "y")
    assert not (tmp_path / "y").exists()
    with pytest.raises(UnsupportedArgument, match="imitate_passes: an exact prior"):
        train_run("lago", 0, imitating, folder=tmp_path / "x", table=table, prior=student.exact, num_threads=1)


def test_policies_may_see_what_the_student_makes_of_the_words(finished, toy, tmp_path):
    student = AmortisedPrior.load(finished[0] / "student")
    settings = replace(toy.env, words="student")
    words = words_of(student, settings)
    assert words.shape == (len(student.instructions), student.config.instruction_width)
    with torch.no_grad():
        normal = torch.zeros(len(words), student.state_dim)
        seen = student.student.seen(normal, student.exact.table, torch.arange(len(words)))
    np.testing.assert_allclose(seen[:, student.state_dim :], words, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedArgument, match="words='student'"):
        words_of(student.exact, settings)
    with pytest.raises(UnsupportedArgument, match="words='student'"):
        compare(replace(toy, env=settings, train=replace(toy.train, prior_mode="exact")), tmp_path / "y")
    assert not (tmp_path / "y").exists()
    out = tmp_path / "z"
    compare(replace(toy, env=settings, arms=("ppo",)), out, report=lambda _: None)
    made = AmortisedPrior.load(out / "student")
    np.testing.assert_array_equal(load_table(out), policy_table(words_of(made, settings), settings))


def test_the_models_of_a_comparison_load_and_predict(finished):
    out, _ = finished
    model = FastKLPPO.load(out / "runs" / "lago_0" / "model.zip", device="cpu")
    observation = model.observation_space.sample() * 0
    assert model.predict(observation, deterministic=True)[0].shape == (4,)


def test_a_finished_comparison_is_not_overwritten(finished, toy):
    with pytest.raises(RunExists):
        compare(toy, finished[0], report=lambda _: None)


def test_an_arm_without_what_it_needs_is_refused(toy, tmp_path):
    for arm, missing in (("lago", "prior"), ("bc_ppo", "demonstrations"), ("sac", "arm='sac'")):
        with pytest.raises(UnsupportedArgument, match=missing):
            train_run(arm, 0, toy, folder=tmp_path)
