"""The command line from end to end on a small budget: what it makes, and what it refuses in one clear line.

The simulators, the datasets, the training and the files are real; the language model is a tiny random BERT.
"""

import csv
import json
import re
import shutil
import subprocess
import sys

import minari
import numpy as np
import pytest
from gymnasium.spaces import Box

from lago_fast import cli, runs
from lago_fast.cli.demos import Demos
from lago_fast.envs.metaworld_tasks import task_phrasings
from tests.command_line import backbone, lago, refused

__all__ = ["backbone", "refused"]  # fixtures

TASKS = ("drawer-open", "push")
SMALL_ENV = ("--num-envs", "4", "--max-episode-steps", "40")
SMALL_TRAIN = ("--steps-per-task", "200", "--n-steps", "50", "--batch-size", "100", "--n-epochs", "2", "--no-guard")
SMALL = SMALL_ENV + SMALL_TRAIN
QUICK = ("--epochs", "2", "--student-epochs", "2", "--student-episode-steps", "20")


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "demos"
    assert lago("demos", "--tasks", *TASKS, "--episodes", 3, "--max-episode-steps", 40, "--out", path) == 0
    return path


@pytest.fixture(scope="module")
def prior(demos, backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "prior"
    assert lago("fit-prior", "--demos", demos, "--out", path, "--backbone", backbone, *QUICK) == 0
    return path


@pytest.fixture(scope="module")
def run(prior, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    words = ("--prior", prior, "--prior-mode", "amortised", "--tasks", *TASKS, *SMALL)
    assert lago("train", *words, "--seed", 3, "--out", path) == 0
    return path


# help


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_of_every_command_is_explained(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        lago(command, "--help")
    assert end.value.code == 0
    lines = [line.strip("|│ ") for line in capsys.readouterr().out.splitlines()]
    assert cli.COMMANDS[command].__doc__.splitlines()[0] in lines
    text = "\n".join(lines)
    # an option, its values, words that say what it is, and its default
    options = dict(re.findall(r"^(--[a-z][\w.-]*)(.*?)\((?:default|required)", text, re.DOTALL | re.MULTILINE))
    assert len(options) == len(re.findall(r"^--[a-z]", text, re.MULTILINE))
    assert "--debug" in options
    values = r"^ *(\[.*?\]\]?|\{.*?\}|[A-Z]+)?\s"
    told = {name: re.sub(values, "", words).split() for name, words in options.items()}
    # the entries of a dict are explained by the heading of their group
    assert [name for name, words in told.items() if len(words) < 2 and name.count(".") < 2] == []


def test_help_needs_nothing_heavy(tmp_path):
    code = "import sys, lago_fast.cli as c\ntry: c.main(['compare', '--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "envpool",
        "minari",
        "stable_baselines3",
        "matplotlib",
        "gymnasium",
    }
    assert heavy.isdisjoint(done.stdout.split())


def test_without_a_command_the_commands_are_named(capsys):
    with pytest.raises(SystemExit) as end:
        lago()
    assert end.value.code == 2
    told = capsys.readouterr()
    assert all(command in told.err + told.out for command in cli.COMMANDS)


# errors


def test_an_error_is_one_line_and_debug_shows_where(refused):
    from lago_fast.errors import UnknownTask

    words = ("demos", "--tasks", "drawer-opne", "--out", "nowhere")
    line = refused(*words)
    assert line.startswith("UnknownTask: tasks: 'drawer-opne'")
    assert "drawer-open" in line
    with pytest.raises(UnknownTask):
        lago(*words, "--debug")


def test_interruption_has_its_own_exit_code(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Demos, "run", interrupt)
    assert lago("demos") == 130
    assert capsys.readouterr().err.startswith("Interrupted")


def test_an_output_that_cannot_be_written_is_a_line_too(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("demos", "--tasks", "push", "--episodes", 1, "--out", tmp_path / "file" / "demos")


# lago demos


def test_demos_are_recorded_and_not_overwritten_unasked(demos, refused, capsys, tmp_path):
    copy = shutil.copytree(demos, tmp_path / "demos")
    words = ("demos", "--tasks", "reach", "--episodes", 1, "--max-episode-steps", 5, "--out", copy)
    assert refused(*words).startswith("RunExists: ")
    assert lago(*words, "--overwrite") == 0
    assert lago("info", copy) == 0
    assert "reach" in capsys.readouterr().out


def test_the_table_of_experts(tmp_path, capsys, refused):
    path = tmp_path / "new" / "experts.json"
    words = (
        "demos",
        "--table",
        "--tasks",
        "reach",
        "--episodes",
        2,
        "--max-episode-steps",
        150,
        "--json",
        path,
    )
    assert lago(*words) == 0
    (row,) = json.loads(path.read_text())["experts"]
    assert (row["task"], row["episodes"], row["success"]) == ("reach", 2, 1.0)
    assert "reach" in capsys.readouterr().out
    assert "exists already" in refused(*words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "out: "),
        (("--out", "x", "--json", "y"), "json: "),
        (("--table", "--out", "x"), "out: "),
        (("--table", "--success-only"), "success_only: "),
        (("--out", "x", "--episodes", "0"), "episodes"),
        (("--out", "x", "--max-episode-steps", "0"), "max_episode_steps: 0; give at least 1"),
        (("--table", "--max-episode-steps", "0"), "max_episode_steps: 0; give at least 1"),
    ],
)
def test_options_of_demos_that_do_not_fit_are_refused(words, named, refused):
    assert refused("demos", *words).startswith(f"UnsupportedArgument: {named}")


# lago fit-prior


def test_fit_prior_prints_what_it_measured(demos, backbone, tmp_path, capsys):
    path = tmp_path / "prior"
    words = ("--backbone", backbone, "--epochs", 1, "--random-init", "--no-student", "--seed", 5)
    assert lago("fit-prior", "--demos", demos, "--out", path, *words) == 0
    told = capsys.readouterr().out
    assert "val_nll " in told
    assert "val_nll_shuffled_instructions" in told
    config = json.loads((path / "config.json").read_text())
    assert config["backbone"]["random_init"] is True
    assert config["instructions"] == [text for task in TASKS for text in task_phrasings()[task]]
    assert not (path / "amortised").exists()


def test_fit_prior_plans_its_memory_and_quantizes(demos, backbone, tmp_path, capsys):
    path = tmp_path / "prior"
    words = ("--backbone", backbone, "--epochs", 1, "--no-student", "--quantization", "int8")
    words = (*words, "--max-quantization-kl", 0.3, "--gradient-accumulation-steps", 2)
    assert lago("fit-prior", "--demos", demos, "--out", path, *words) == 0
    told = capsys.readouterr()
    assert "memory plan: " in told.err
    assert "quantization.kl_nats" in told.out
    config = json.loads((path / "config.json").read_text())
    assert (config["quantization"], config["max_quantization_kl"]) == ("int8", 0.3)
    assert json.loads((path / "metrics.json").read_text())["quantization"]["agreement"] <= 1


def test_a_std_of_zero_is_refused_and_not_taken_for_none(demos, backbone, refused, tmp_path):
    words = ("--demos", demos, "--out", tmp_path / "prior", "--backbone", backbone, "--epochs", 1, "--std-init", 0)
    assert "std_init, std_floor, state_clip: must be positive" in refused("fit-prior", *words)


def test_a_prior_is_not_overwritten_unasked(prior, demos, backbone, refused):
    before = (prior / "config.json").read_bytes()
    assert "RunExists" in refused("fit-prior", "--demos", demos, "--out", prior, "--backbone", backbone)
    assert (prior / "config.json").read_bytes() == before


@pytest.fixture
def strange_demos(tmp_path):
    """Return a function that writes a dataset of other spaces or tasks."""

    def write(task: str, state_dim: int, action_dim: int):
        folder = tmp_path / "strange" / "data"
        folder.mkdir(parents=True)
        space = Box(-1.0, 1.0, (action_dim,), np.float32)
        storage = minari.dataset.minari_storage.MinariStorage.new(
            folder, Box(-9, 9, (state_dim,), np.float32), space, data_format="hdf5"
        )
        buffer = minari.data_collector.EpisodeBuffer(
            seed=0,
            observations=np.zeros((4, state_dim), np.float32),
            actions=np.zeros((3, action_dim), np.float32),
            rewards=np.zeros(3),
            terminations=np.zeros(3, bool),
            truncations=np.zeros(3, bool),
            infos={},
        )
        storage.update_episodes([buffer])
        storage.update_episode_metadata([{"task": task, "instruction": "do it", "success": False}], range(1))
        return folder.parent

    return write


def test_demonstrations_that_do_not_fit_are_refused(strange_demos, refused, tmp_path, demos):
    words = ("fit-prior", "--out", tmp_path / "prior", "--demos")
    assert refused(*words, strange_demos("push", 39, 2)).startswith("DemonstrationError: demos: ")
    shutil.rmtree(tmp_path / "strange")
    assert refused(*words, strange_demos("juggle", 39, 4)).startswith("UnknownTask: tasks: 'juggle'")
    assert refused(*words, tmp_path / "nothing").startswith("DemonstrationError: ")
    corrupt = shutil.copytree(demos, tmp_path / "corrupt")
    (corrupt / "data" / "main_data.hdf5").write_bytes(b"half of a file")
    assert refused(*words, corrupt).startswith("DemonstrationError: ")
    assert not (tmp_path / "prior").exists()


def test_a_hub_that_cannot_be_reached_is_named(demos, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    line = refused("fit-prior", "--demos", demos, "--out", tmp_path / "prior", "--backbone", "nobody/nothing")
    assert line.startswith("BackboneUnavailable: backbone: 'nobody/nothing'")
    assert "connect to the hub" in line


@pytest.mark.parametrize("command", ["fit-prior", "train", "eval", "compare"])
def test_cuda_that_is_not_there_is_refused(command, demos, prior, run, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = {
        "fit-prior": ("--demos", demos, "--out", tmp_path / "x", "--device"),
        "train": ("--prior", prior, "--tasks", *TASKS, "--out", tmp_path / "x", "--device"),
        "eval": (run, "--device"),
        "compare": ("--out", tmp_path / "x", "--train.device"),
    }
    assert refused(command, *words[command], "cuda").startswith("DeviceUnavailable: device: 'cuda'")
    assert refused(command, *words[command], "tpu").startswith("UnsupportedArgument: device: 'tpu'")
    assert not (tmp_path / "x").exists()


# lago train


def test_a_run_folder_holds_everything(run, prior):
    config = runs.read_config(run)
    assert (config["arm"], config["seed"], config["env"]["tasks"]) == ("lago", 3, list(TASKS))
    assert config["train"]["steps_per_task"] == 200
    assert config["prior"]["folder"] == str(prior)
    assert config["instruction_encoder"]["sha256"]
    provenance = runs.read_json(run / "provenance.json")
    assert set(provenance["implementations"]) == {"adam", "gae", "mlp", "ppo_kl_gaussian", "take_rows"}
    assert {"env", "prior", "policy"} <= provenance["stages"].keys()
    assert sum(stage["share"] for stage in provenance["stages"].values()) == pytest.approx(1)
    curve = runs.read_json(run / "curve.json")
    assert set(curve["tasks"]) == set(TASKS)
    assert max(curve["tasks"]["push"]["env_steps"]) >= 200
    header = (run / "progress.csv").read_text().splitlines()[0]
    assert {"train/prior_kl", "train/kl_coef", "prior/audit_kl_nats", "time/env_s"} <= set(header.split(","))
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "model.zip").is_file()
    texts = sum(len(task_phrasings()[task]) for task in TASKS)
    assert len(runs.load_table(run)) == texts


@pytest.mark.parametrize("arm", ["ppo", "bc_ppo", "exact", "distilled"])
def test_the_other_arms_train_too(arm, prior, demos, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lago_fast.presets.PriorSettings.student_epochs", 1)
    inputs = {
        "ppo": ("--arm", "ppo", "--tasks", "push", "drawer-open", "--instruction-encoder", backbone),
        "bc_ppo": ("--arm", "bc_ppo", "--tasks", "push", "--demos", demos),
        "distilled": ("--tasks", *TASKS, "--prior", prior, "--prior-mode", "amortised", "--demos", demos),
        "exact": ("--tasks", "push", "--prior", prior / "amortised"),
    }
    profile = ["--profile"] if arm == "ppo" else []
    overlap = ["--overlap", "update"] if arm == "ppo" else []
    assert lago("train", *inputs[arm], *SMALL, *profile, *overlap, "--out", tmp_path / arm) == 0
    assert ("where the time went" in capsys.readouterr().out) == bool(profile)
    config = runs.read_config(tmp_path / arm)
    assert config["arm"] == (arm if arm in ("ppo", "bc_ppo") else "lago")
    provenance = runs.read_json(tmp_path / arm / "provenance.json")
    assert config["train"]["overlap"] == provenance["overlap"] == ("update" if overlap else "none")
    header = (tmp_path / arm / "progress.csv").read_text().splitlines()[0].split(",")
    assert ("rollout/updates_behind" in header) == bool(overlap)
    # with one task the policy needs no words
    assert (runs.load_table(tmp_path / arm) is None) == (len(config["env"]["tasks"]) == 1)


def trained(folder):
    """Return the weights of a run, and what it logged but for times and the cache's size."""
    from lago_fast import FastKLPPO

    with (folder / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "prior/"))} for row in rows]
    return FastKLPPO.load(folder / "model.zip", device="cpu").policy.state_dict(), kept, rows


def test_a_second_run_is_answered_by_the_file_of_the_first_and_equals_it(prior, tmp_path, capsys):
    words = ("train", "--prior", prior, "--tasks", *TASKS, *SMALL)
    words = (*words, "--prior-cache", tmp_path / "answers.lmdb")
    for name in ("cold", "warm"):
        assert lago(*words, "--out", tmp_path / name) == 0
    (cold, logged, cold_rows), (warm, logged_again, warm_rows) = (trained(tmp_path / n) for n in ("cold", "warm"))
    assert all(float(row["prior/cache_hit_rate"]) == 0 for row in cold_rows), "continuous states do not come again"
    assert all(float(row["prior/cache_hit_rate"]) == 1 for row in warm_rows)
    assert all(torch_equal(cold[name], warm[name]) for name in cold)
    assert logged == logged_again
    assert runs.read_config(tmp_path / "warm")["asking"]["prior_cache"] == str(tmp_path / "answers.lmdb")
    stats = runs.read_json(tmp_path / "warm" / "provenance.json")["prior_cache"]
    assert stats["file_hits"] == stats["file_rows"] == 600
    assert "file_hits" in capsys.readouterr().out


def torch_equal(a, b):
    import torch

    return torch.equal(a, b)


def test_what_rounded_keys_change_is_logged(prior, tmp_path):
    words = ("train", "--prior", prior, "--tasks", *TASKS, *SMALL, "--out", tmp_path / "run")
    words = (*words, "--prior-cache", "memory", "--prior-cache-resolution", 0.5, "--prior-cache-format", "int8")
    assert lago(*words) == 0
    rows = trained(tmp_path / "run")[2]
    assert float(rows[-1]["prior/cache_hit_rate"]) > 0.3
    assert float(rows[0]["prior/cache_kl_nats"]) > 0


@pytest.fixture(scope="module")
def quantized(demos, backbone, tmp_path_factory):
    """Return a prior that is further from the exact one than it is allowed to be."""
    path = tmp_path_factory.mktemp("cli") / "quantized"
    words = ("--demos", demos, "--backbone", backbone, "--no-student", "--quantization", "nf4")
    # at the default floor of the std this tiny model's KL is too small for float32 on some processors
    words += ("--epochs", 5, "--learning-rate", 0.01, "--std-floor", 0.01)
    assert lago("fit-prior", "--out", path, *words, "--max-quantization-kl", 1e-9) == 0
    return path


def test_a_cache_of_another_prior_or_none_is_refused(prior, quantized, refused, tmp_path):
    cache = ("--prior-cache", tmp_path / "answers.lmdb")
    words = ("train", "--tasks", *TASKS, *SMALL, *cache, "--out")
    assert lago(*words, tmp_path / "run", "--prior", prior) == 0
    assert refused(*words, tmp_path / "x", "--prior", quantized).startswith("CacheMismatch: path: ")
    whole = (tmp_path / "answers.lmdb").read_bytes()
    (tmp_path / "answers.lmdb").write_bytes(whole[: len(whole) // 2])
    assert refused(*words, tmp_path / "x", "--prior", prior).startswith("CacheCorrupt: path: ")

    def train(*more):
        return refused("train", "--tasks", *TASKS, "--out", tmp_path / "x", *more)

    assert "take --prior-mode exact" in train("--prior", prior, "--prior-mode", "amortised", *cache)
    assert train("--prior", prior, "--prior-cache-bytes", 5).startswith("UnsupportedArgument: prior_cache_bytes: ")
    assert train("--arm", "ppo", *cache).startswith("UnsupportedArgument: prior_cache: the arm ppo has no prior")
    words = ("--prior", prior, "--prior-cache", "memory")
    assert "do not hold one row" in train(*words, "--prior-cache-bytes", 5)
    assert "give at least" in train(*words, "--prior-cache-bytes", 5000, *SMALL)
    assert not (tmp_path / "x").exists() or runs.is_run(tmp_path / "x")


def test_a_quantized_prior_that_is_too_far_off_is_taken_only_when_told(quantized, refused, tmp_path, capsys):
    capsys.readouterr()
    assert lago("info", quantized) == 0
    told = capsys.readouterr().out
    shown = ("name", "kl_nats", "agreement", "std_floor", "weights_bytes", "exact_weights_bytes")
    assert all(f"quantization.{name} " in told for name in shown)
    words = ("train", "--prior", quantized, "--tasks", *TASKS, *SMALL)
    line = refused(*words, "--out", tmp_path / "x")
    assert line.startswith("QuantizedTooFar: prior: quantized to nf4, its KL from the exact prior is ")
    assert "--max-quantization-kl" in line
    assert lago(*words, "--out", tmp_path / "run", "--max-quantization-kl", 9, "--prior-buckets") == 0


def test_a_run_is_overwritten_only_when_asked_and_only_by_one_that_starts(run, backbone, refused, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    words = (
        "train",
        "--arm",
        "ppo",
        "--tasks",
        *TASKS,
        *SMALL,
        "--instruction-encoder",
        backbone,
        "--out",
        copy,
    )
    assert refused(*words).startswith("RunExists: out: ")
    assert "no multiple of the 2 tasks" in refused(*words, "--overwrite", "--num-envs", 5)
    assert "UnknownTask" in refused(*words, "--overwrite", "--tasks", "juggle")
    assert "cuda_graph: there are none" in refused(*words, "--overwrite", "--cuda-graph")
    assert "steps_per_task=0" in refused(*words, "--overwrite", "--steps-per-task", 0)
    assert "learning_rate=-1.0" in refused(*words, "--overwrite", "--learning-rate", -1)
    assert "kl_coef: the arm ppo has no prior" in refused(*words, "--overwrite", "--kl-coef", 2)
    assert "torch_threads=0" in refused(*words, "--overwrite", "--torch-threads", 0)
    assert {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert lago(*words, "--overwrite") == 0
    assert runs.read_config(copy)["arm"] == "ppo"


def test_inputs_that_an_arm_lacks_or_would_ignore_are_refused(prior, demos, refused, tmp_path):
    def train(*words):
        return refused("train", "--out", tmp_path / "x", *words)

    assert "lago fit-prior" in train()
    assert "has no use for it" in train("--arm", "ppo", "--prior", prior)
    assert "lago demos" in train("--arm", "bc_ppo")
    assert "has no use for them" in train("--prior", prior, "--demos", demos)
    assert "sees no instruction" in train("--prior", prior, "--tasks", "push", "--instruction-encoder", "x")
    assert "--arm lago" in train("--prior", prior, "--tasks", *TASKS, "--arm", "lago_random_init")
    assert "no episode of reach" in train("--arm", "bc_ppo", "--demos", demos, "--tasks", "reach")
    assert not (tmp_path / "x").exists()


def test_a_prior_that_does_not_fit_is_refused(prior, backbone, refused, tmp_path):
    from lago_fast.priors.finetune import fit_prior

    def train(path, *words):
        return refused("train", "--out", tmp_path / "x", "--prior", path, "--tasks", *(words or TASKS))

    assert train(prior, "reach").startswith("PriorMismatch: prior: it does not know the words of reach")
    assert train(tmp_path).startswith("PriorMismatch: ")
    without = shutil.copytree(prior, tmp_path / "without")
    shutil.rmtree(without / "amortised")
    assert "--prior-mode exact" in train(without, *TASKS, "--prior-mode", "amortised")

    rows = np.zeros((8, 5), np.float32)
    other = fit_prior(rows, rows[:, :2], [0] * 8, range(8), ["do it"], backbone=str(backbone), epochs=1, val_fraction=0)
    other.save(tmp_path / "other")
    line = refused("eval", tmp_path / "other", "--tasks", "push")
    assert line.startswith("PriorMismatch: prior: it is gaussian, for states of 5 and actions of 2")

    altered = shutil.copytree(prior, tmp_path / "altered")
    for path in (altered / "prior.safetensors", altered / "amortised" / "student.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert train(altered).startswith("HashMismatch: ")
    assert refused("info", altered).startswith("HashMismatch: ")
    assert refused("eval", altered).startswith("HashMismatch: ")
    assert not (tmp_path / "x").exists()


def test_a_loss_that_explodes_is_named(tmp_path, refused):
    words = (
        "train",
        "--arm",
        "ppo",
        "--tasks",
        "push",
        *SMALL,
        "--learning-rate",
        "1e30",
        "--out",
        tmp_path / "x",
    )
    assert refused(*words).startswith("NonFiniteError: loss: ")
    # the broken run is there to be looked at, and says that its training did not end
    assert "training did not end" in refused("eval", tmp_path / "x")


# lago eval, plot, info


def test_eval_of_a_run_and_of_a_prior(run, prior, tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert lago("eval", run, "--episodes", 3, "--json", path) == 0
    found = json.loads(path.read_text())["tasks"]
    assert set(found) == {*TASKS, "all"}
    assert found["all"]["episodes"] == 6
    assert set(found["push"]) == {"success", "success_ci95", "success_at_end", "return", "episodes"}
    assert "95 % interval" in capsys.readouterr().out

    played = {}
    for words in ((), ("--tasks", "push"), ("--tasks", "push", "--prior-mode", "amortised")):
        (tmp_path / "prior.json").unlink(missing_ok=True)
        small = ("--episodes", 2, "--max-episode-steps", 10)
        assert lago("eval", prior, *words, *small, "--json", tmp_path / "prior.json") == 0
        played[words] = json.loads((tmp_path / "prior.json").read_text())["tasks"]
    assert set(played[()]) == {*TASKS, "all"}
    assert [set(tasks) for tasks in list(played.values())[1:]] == [{"push"}, {"push"}]


def test_eval_repeats_itself(run, tmp_path):
    for name in ("a", "b"):
        assert lago("eval", run, "--episodes", 2, "--seed", 5, "--json", tmp_path / name) == 0
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_eval_refuses_what_it_cannot_play(run, refused, tmp_path):
    assert "tasks, prior_mode" in refused("eval", run, "--tasks", "push")
    assert "PriorMismatch" in refused("eval", tmp_path)
    assert "path: " in refused("eval", tmp_path / "nowhere")
    assert "episodes: 0" in refused("eval", run, "--episodes", 0)
    assert "seed=-1" in refused("eval", run, "--seed", -1)
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "instruction_table.npy").unlink()
    assert "instruction_table.npy" in refused("eval", copy)
    (copy / "model.zip").write_bytes(b"half")
    assert "model.zip" in refused("eval", copy)


def test_plot_draws_runs_and_replaces_nothing_unasked(run, refused, tmp_path):
    path = tmp_path / "curves.png"
    assert lago("plot", run, run.parent, "--out", path, "--title", "two") == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "RunExists" in refused("plot", run, "--out", path)
    assert lago("plot", run, "--out", path, "--overwrite") == 0
    assert "no curve.json" in refused("plot", tmp_path, "--out", tmp_path / "x.png")
    assert "no format known" in refused("plot", run, "--out", tmp_path / "x.gif")


def test_info_tells_what_is_there(run, prior, demos, refused, tmp_path, capsys):
    for path, told in (
        (None, "ppo_kl_gaussian"),
        (run, "lago"),
        (prior, "LatentActionPrior"),
        (demos, "drawer-open"),
    ):
        assert lago("info", *([] if path is None else [path])) == 0
        assert told in capsys.readouterr().out
    assert "no run, no prior and no dataset" in refused("info", tmp_path)


# lago compare


# lago audit


def test_audit_shows_what_the_prior_said(run, prior, refused, capsys, tmp_path):
    words = ("audit", run, "--states", 20, "--shown", 4, "--episodes", 2, "--out", tmp_path / "new" / "audit.html")
    assert lago(*words) == 0
    told = capsys.readouterr().out
    assert all(column in told for column in ("instruction", "policy", "KL", "trust", "drawer-open", "hand at"))
    page = (tmp_path / "new" / "audit.html").read_text()
    assert (
        page.count("<tr>")
        == 1 + 20 + len(re.findall("class='facts'>(.*?)</table>", page, re.DOTALL)[0].split("<tr>")) - 1
    )
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert str(prior) in page
    assert refused(*words).startswith("RunExists: out: ")
    assert lago(*words, "--overwrite") == 0
    assert (tmp_path / "new" / "audit.html").read_text() == page, "the same seed, the same page"


def test_audit_refuses_what_it_cannot_compare(run, prior, quantized, refused, tmp_path):
    assert refused("audit", run, "--prior", quantized).startswith("PriorMismatch: prior: the one in ")
    assert "holds no run" in refused("audit", prior)
    assert refused("audit", run, "--states", 0).startswith("UnsupportedArgument: states, shown")
    words = ("train", "--arm", "ppo", "--tasks", TASKS[0], *SMALL, "--out", tmp_path / "ppo")
    assert lago(*words) == 0
    assert "--prior" in refused("audit", tmp_path / "ppo")
    assert lago("audit", tmp_path / "ppo", "--prior", prior, "--episodes", 1, "--states", 5) == 0
    assert (tmp_path / "ppo" / "audit.html").is_file()


def test_compare_runs_every_arm_and_prints_the_table(backbone, refused, capsys, tmp_path):
    out = tmp_path / "comparison"
    words = ("compare", "--preset", "demo", "--out", out, "--seeds", 0, "--no-measure-baselines")
    words += ("--eval-episodes", 2, "--demos.episodes-per-task", 3, "--env.tasks", *TASKS)
    words += ("--prior.backbone", backbone, "--prior.epochs", 2, "--prior.student-epochs", 2)
    words += ("--prior.rollout-noise", "0.2")
    words += tuple(word.replace("--", "--env.") for word in SMALL_ENV)
    words += tuple(word.replace("--", "--train.") for word in SMALL_TRAIN)
    assert lago(*words) == 0
    told = capsys.readouterr().out
    for part in ("random", "expert", "prior", "ppo", "lago", "95 % interval", "report.json", "curves.png"):
        assert part in told
    report = json.loads((out / "report.json").read_text())
    assert set(report["arms"]) == {"random", "expert", "prior", "ppo", "lago"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    assert refused(*words).startswith("RunExists: ")
    assert "runs below it" in refused("eval", out)
    assert lago("plot", out, "--out", tmp_path / "again.png") == 0
    assert lago("info", out) == 0
    assert "at the end" in capsys.readouterr().out
    (run,) = [path.parent for path in out.rglob("model.zip") if "lago" in str(path)]
    assert lago("eval", run, "--episodes", 1) == 0
    assert lago(*words, "--overwrite") == 0


def test_compare_checks_its_settings_before_it_begins(refused, tmp_path):
    words = ("compare", "--out", tmp_path / "x")
    assert refused("compare", "--preset", "nope", "--out", tmp_path / "x").startswith(
        "UnsupportedArgument: preset: 'nope'"
    )
    assert refused(*words, "--env.tasks", "juggle").startswith("UnknownTask: ")
    assert refused(*words, "--train.cuda-graph").startswith("UnsupportedArgument: cuda_graph: ")
    assert "no multiple of the 3 tasks" in refused(*words, "--env.num-envs", 5)
    assert refused(*words, "--arms", "magic").startswith("UnsupportedArgument: arms=['magic']: ")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("plot",), "runs: name at least one"),
        (("bench", "--tasks", "reach", "--num-envs", 4, "--n-steps", 0), "n_steps=0"),
        (("bench", "--tasks", "reach", "--num-envs", 4, "--torch-threads", -1), "torch_threads=-1"),
        (("demos", "--tasks", "reach", "--seed", -1, "--out", "nowhere"), "seed=-1"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused_by_its_name(words, named, refused):
    assert named in refused(*words)
