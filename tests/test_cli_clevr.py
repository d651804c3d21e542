"""The command line on CLEVR-Robot, end to end on a small budget: what it makes, and what it refuses.

The simulator, the datasets, the training and the files are real; the language model is a tiny random BERT.
"""

import csv
import json

import minari
import numpy as np
import pytest

from lago_fast import runs
from lago_fast.cli.compare import print_report
from lago_fast.demos import load_demos
from lago_fast.envs.clevr_language import family_instructions
from lago_fast.envs.suites import suite_named
from lago_fast.presets import PRESETS
from lago_fast.priors.student import StudentConfig
from tests.command_line import backbone, lago, refused

__all__ = ["backbone", "refused"]  # fixtures

CLEVR = ("--env", "clevr-robot")
TRAINED, PLAYED = ("easy", "gather"), ("easy", "gather", "line")
FAMILIES = ("--tasks", *TRAINED, "--eval-tasks", *PLAYED)
SMALL_ENV = ("--num-envs", "4", "--max-episode-steps", "8")
# so few steps hold no whole episodes by which a guard could judge
SMALL_TRAIN = ("--steps-per-task", "60", "--n-steps", "20", "--batch-size", "40", "--n-epochs", "2", "--no-guard")
SMALL_TRAIN += ("--net-arch", "16")
SMALL = (*CLEVR, *FAMILIES, *SMALL_ENV, *SMALL_TRAIN)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    path = tmp_path_factory.mktemp("clevr") / "demos-v0"
    words = ("--families", *TRAINED, "--episodes", 12, "--max-episode-steps", 8, "--out", path)
    assert lago("demos", *CLEVR, *words) == 0
    return path


@pytest.fixture(scope="module")
def prior(demos, backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("clevr") / "prior"
    words = ("--epochs", 2, "--student-epochs", 2, "--student-episode-steps", 8, "--eval-tasks", *PLAYED)
    assert lago("fit-prior", *CLEVR, "--demos", demos, "--out", path, "--backbone", backbone, *words) == 0
    return path


@pytest.fixture(scope="module")
def run(prior, tmp_path_factory):
    path = tmp_path_factory.mktemp("clevr") / "run"
    words = ("--prior", prior, "--prior-mode", "amortised", "--seed", 3)
    assert lago("train", *SMALL, *words, "--out", path) == 0
    return path


def test_demonstrations_are_discrete_and_say_where_they_are_from(demos, monkeypatch):
    loaded = load_demos(demos)
    assert (loaded.tasks, loaded.num_actions) == (list(TRAINED), 40)
    assert loaded.states.shape == (len(loaded.actions), 10)
    assert loaded.actions.dtype == np.int64
    assert set(loaded.instructions) <= {text for family in TRAINED for text in family_instructions(family)}
    assert len(loaded.success) == 24
    assert loaded.success[:12].all()  # one push is enough for "easy"
    metadata = json.loads((demos / "data" / "metadata.json").read_text())
    assert metadata["lago"]["env"] == "clevr-robot"
    assert metadata["lago"]["versions"]["mujoco"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(demos.parent))
    episode = next(minari.load_dataset("demos-v0").iterate_episodes())
    assert episode.terminations.tolist() == [True]


def test_info_tells_of_discrete_demonstrations(demos, run, prior, capsys):
    for path, told in ((demos, "discrete actions"), (run, "clevr-robot"), (prior, "categorical")):
        assert lago("info", path) == 0
        assert told in capsys.readouterr().out


def test_the_table_of_experts(capsys, tmp_path):
    path = tmp_path / "experts.json"
    assert lago("demos", *CLEVR, "--table", "--families", "easy", "--episodes", 4, "--json", path) == 0
    (row,) = json.loads(path.read_text())["experts"]
    assert (row["task"], row["success"]) == ("easy", 1.0)
    assert "easy" in capsys.readouterr().out


def test_a_prior_knows_the_words_of_what_is_evaluated(prior):
    config = json.loads((prior / "config.json").read_text())
    assert config["prior"]["kind"] == "categorical"
    assert config["prior"]["action_dim"] == 40
    assert config["instructions"] == [text for family in PLAYED for text in family_instructions(family)]
    assert (prior / "amortised" / "student.safetensors").is_file()


def test_a_run_folder_holds_everything(run):
    config = runs.read_config(run)
    assert (config["env"]["env"], config["env"]["tasks"]) == ("clevr-robot", list(TRAINED))
    implementations = runs.read_json(run / "provenance.json")["implementations"]
    assert set(implementations) == {"adam", "gae", "mlp", "ppo_kl_categorical", "take_rows"}
    assert set(runs.read_json(run / "curve.json")["tasks"]) == set(TRAINED)
    header = (run / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"train/prior_kl", "train/kl_coef", "prior/audit_kl_nats"} <= set(header)
    assert len(runs.load_table(run)) == sum(len(family_instructions(family)) for family in PLAYED)


@pytest.mark.parametrize("arm", ["ppo", "bc_ppo", "exact"])
def test_the_other_arms_train_too(arm, prior, demos, backbone, tmp_path):
    inputs = {
        "ppo": ("--arm", "ppo", "--instruction-encoder", backbone),
        "bc_ppo": ("--arm", "bc_ppo", "--instruction-encoder", backbone, "--demos", demos),
        "exact": ("--prior", prior),
    }
    assert lago("train", *SMALL, *inputs[arm], "--out", tmp_path / arm) == 0
    assert runs.read_config(tmp_path / arm)["arm"] == ("lago" if arm == "exact" else arm)
    assert (tmp_path / arm / "model.zip").is_file()


def test_a_student_is_imitated_and_its_words_are_seen(prior, run, refused, tmp_path):
    out = tmp_path / "run"
    words = (*SMALL, "--prior", prior, "--words", "student", "--imitate-passes", 2)
    assert lago("train", *words, "--prior-mode", "amortised", "--explained-variance", 1.0, "--out", out) == 0
    width = runs.load_table(out).shape[1]
    assert 0 < width <= StudentConfig.instruction_width
    assert runs.load_table(out).shape != runs.load_table(run).shape
    rows = list(csv.DictReader((out / "progress.csv").read_text().splitlines()))
    updated = next(row for row in rows if row["train/prior_kl"])
    assert not updated["train/loss"]  # without a guard the first update is the fit
    assert lago("eval", out, "--episodes", 2) == 0
    before = sorted(p.name for p in out.iterdir())
    for wrong, said in (
        (("--words", "student"), "words='student': there is none"),
        (("--imitate-passes", 2), "imitate_passes: an exact prior keeps no states"),
        (("--imitate-passes", -1), "imitate_passes=-1"),
        (
            ("--words", "student", "--prior-mode", "amortised", "--instruction-encoder", "x"),
            "words='student': they are",
        ),
    ):
        assert said in refused("train", *SMALL, "--prior", prior, *wrong, "--out", out, "--overwrite")
    words = ("--arm", "ppo", "--words", "student", "--out", out, "--overwrite")
    assert "words='student': they are" in refused("train", *SMALL, *words)
    assert sorted(p.name for p in out.iterdir()) == before


def test_eval_plays_any_family_that_is_known_and_films_it(run, refused, tmp_path, capsys):
    path, film = tmp_path / "eval.json", tmp_path / "episode.gif"
    assert lago("eval", run, "--episodes", 3, "--json", path, "--video", film) == 0
    assert set(json.loads(path.read_text())["tasks"]) == {*PLAYED, "all"}
    assert set(json.loads(path.read_text())["splits"]) == {"easy"}
    assert film.read_bytes().startswith(b"GIF8")
    assert "an episode of easy is written" in capsys.readouterr().out
    found = {}
    for name in ("likeliest", "drawn", "again"):
        words = ("--families", "gather", "--actions", "drawn" if name == "again" else name, "--episodes", 4)
        assert lago("eval", run, *words, "--json", tmp_path / name) == 0
        found[name] = json.loads((tmp_path / name).read_text())["tasks"]
        assert set(found[name]) == {"gather"}
    assert found["drawn"] == found["again"]
    assert "was never computed" in refused("eval", run, "--families", "two-goals")
    assert "UnknownTask" in refused("eval", run, "--families", "juggle")
    assert "exists already" in refused("eval", run, "--video", film)
    assert "leave --env out" in refused("eval", run, "--env", "metaworld")


def test_eval_of_a_prior(prior, refused, tmp_path):
    for mode in ("exact", "amortised"):
        words = ("--prior-mode", mode, "--episodes", 2, "--max-episode-steps", 4, "--json", tmp_path / mode)
        assert lago("eval", prior, *CLEVR, *words) == 0
        assert set(json.loads((tmp_path / mode).read_text())["tasks"]) == {*PLAYED, "all"}
    line = refused("eval", prior)
    assert line.startswith("PriorMismatch: prior: it is categorical, for states of 10 and actions of 40")
    assert "does not know the words of two-goals" in refused("eval", prior, *CLEVR, "--families", "two-goals")
    assert "max_episode_steps: 0; give at least 1" in refused("eval", prior, *CLEVR, "--max-episode-steps", "0")


def test_what_belongs_to_another_environment_is_refused(prior, demos, refused, tmp_path):
    def train(*words):
        return refused("train", "--out", tmp_path / "x", *words)

    assert "Meta-World needs gaussian, 39 and 4" in train("--prior", prior, "--tasks", "push")
    assert "40 discrete actions, Meta-World has states of 39" in refused(
        "fit-prior", "--demos", demos, "--out", tmp_path / "x"
    )
    for option, value in (("--std", "state_dependent"), ("--std-init", "0"), ("--std-floor", "0.1")):
        words = ("--demos", demos, "--out", tmp_path / "x", option, value)
        named = option.removeprefix("--").replace("-", "_")
        assert f"{named}: the actions of clevr-robot are discrete" in refused("fit-prior", *CLEVR, *words)
    assert "families: 'juggle'" in train(*CLEVR, "--arm", "ppo", "--tasks", "juggle")
    assert "does not know the words of two-goals" in train(*CLEVR, "--prior", prior, "--tasks", "easy", "two-goals")
    assert "eval_tasks: Meta-World has no splits" in train("--arm", "ppo", "--tasks", "push", "--eval-tasks", "reach")
    assert "sample_actions: Meta-World" in train("--arm", "ppo", "--tasks", "push", "--sample-actions")
    assert "no multiple of the 2 families" in train(*SMALL, "--prior", prior, "--num-envs", 5)
    assert "action_noise=0.5" in refused("demos", *CLEVR, "--action-noise", "0.5", "--out", tmp_path / "x")
    assert "UnknownTask" in refused("demos", *CLEVR, "--families", "juggle", "--out", tmp_path / "x")
    assert refused("train", "--env", "atari", "--out", tmp_path / "x").startswith("UnsupportedArgument: env: 'atari'")
    assert not (tmp_path / "x").exists()


def test_a_meta_world_prior_is_refused(backbone, refused, tmp_path):
    from lago_fast.envs.metaworld_tasks import task_phrasings
    from lago_fast.priors.finetune import fit_prior

    rows, texts = np.zeros((4, 39), np.float32), task_phrasings()["push"]
    other = fit_prior(rows, rows[:, :4], [0] * 4, range(4), texts, backbone=str(backbone), epochs=1, val_fraction=0)
    other.save(tmp_path / "prior")
    words = ("--prior", tmp_path / "prior", "--out", tmp_path / "x")
    line = refused("train", *SMALL, *words)
    assert line.startswith(
        "PriorMismatch: prior: it is gaussian, for states of 39 and actions of 4 numbers; CLEVR-Robot"
    )
    assert not (tmp_path / "x").exists()


def test_compare_reports_every_split_beside_the_paper(backbone, capsys, tmp_path):
    out = tmp_path / "comparison"
    words = ("compare", "--preset", "clevr", "--out", out, "--seeds", 0, "--eval-episodes", 2)
    words += ("--arms", "ppo", "lago", "bc_ppo", "--demos.episodes-per-task", 12, "--prior.backbone", backbone)
    words += ("--prior.epochs", 2, "--prior.student-epochs", 2, "--prior.rollout-noise", "0.2")
    words += tuple(word.replace("--", "--env.") for word in ("--tasks", "easy", "--eval-tasks", *PLAYED, *SMALL_ENV))
    words += tuple(word.replace("--", "--train.") for word in SMALL_TRAIN)
    assert lago(*words) == 0
    told = " ".join(capsys.readouterr().out.split())
    for part in ("random", "greedy", "expert", "prior", "bc_ppo", "core-hours", "36 GPU-hours"):
        assert part in told
    assert "the paper's splits, reward and averaging are not known" in told
    report = json.loads((out / "report.json").read_text())
    assert set(report["arms"]) == {"random", "greedy", "expert", "prior", "ppo", "lago", "bc_ppo"}
    assert set(report["tasks"]) == set(PLAYED)
    assert report["splits"]["easy"]["expert"]["success"] == 1.0
    assert report["stage_one_wall_s"] > 0
    assert report["complete"]
    assert (report["mujoco"], report["physics"]) == ("3.3.0", "native")
    assert set(report["curves"]["lago"][0]) == {"easy"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_stands_beside_the_papers(capsys):
    row = {"success": 0.5, "success_ci95": [0.4, 0.6], "success_at_end": 0.5, "return": 1.0, "env_steps_per_s": 9.0}
    row |= {"steps_to_90": None, "wall_s": 3600.0, "core_hours": 0.9}
    splits = ("real", "rephrase", "easy", "hard", "mean")
    published = dict(suite_named("clevr-robot").published)
    gap = {"mean": 0.123, "ci95": [0.1, 0.15]}
    report = {"arms": {"lago": row}, "tasks": {"real": {"lago": row}}, "published": published, "lago_minus_ppo": gap}
    print_report({**report, "splits": {name: {"lago": row} for name in splits}})
    told = " ".join(capsys.readouterr().out.split())
    for part in ("40 to 60 %", "15.1 %", "27.2 %", "LaGO's mean minus PPO's: 12.3 points (10.0 to 15.0)."):
        assert part in told


def test_the_presets_train_on_the_real_split_and_evaluate_on_all():
    families = ("real", "rephrase", "easy", "two-goals", "three-goals", "line", "gather")
    for name, trained in (("clevr", ("real",)), ("clevr-all", families)):
        preset = PRESETS[name]
        assert preset.env.tasks == trained
        assert preset.env.eval_tasks == families
        assert preset.eval_episodes * len(preset.seeds) >= 200
        steps = preset.train.steps_per_task * len(trained)
        assert 1_490_000 < steps <= 1_500_000
        assert preset.env.num_envs % len(trained) == 0
