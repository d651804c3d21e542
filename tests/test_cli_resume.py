"""`lago train` in a real process: killed, terminated, resumed, finished; and what --resume refuses."""

import csv
import re
import signal
import subprocess
import sys
import time

import pytest

from lago_fast import cli, runs
from lago_fast.algorithms.checkpoint import newest, paths_in

pytest.importorskip("envpool", reason="Meta-World needs the extra 'envs'")

LAGO = "import sys; from lago_fast.cli import main; sys.exit(main())"
SETTINGS = (
    *("--arm", "ppo", "--tasks", "reach", "--num-envs", "4", "--max-episode-steps", "40", "--seed", "7"),
    *("--steps-per-task", "6000", "--n-steps", "50", "--batch-size", "100", "--n-epochs", "1", "--num-threads", "1"),
)


def start(*words):
    return subprocess.Popen([sys.executable, "-c", LAGO, "train", *map(str, words)], stderr=subprocess.PIPE, text=True)


def wait_for(folder, iteration):
    for _ in range(6000):
        paths = paths_in(folder / "checkpoints")
        if paths and int(paths[-1].stem[-8:]) >= iteration:
            return
        time.sleep(0.01)
    pytest.fail(f"no checkpoint of iteration {iteration}")


@pytest.mark.slow
def test_killed_terminated_and_finished(tmp_path):
    out = tmp_path / "a run"
    process = start(*SETTINGS, "--checkpoint-every", 1, "--out", out)
    wait_for(out, 3)
    process.kill()
    process.communicate()
    reached = newest(out / "checkpoints")[1].figures["iterations"]
    assert reached >= 3

    process = start("--resume", "--checkpoint-every", 1, "--out", out)
    wait_for(out, reached + 2)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[1]
    assert process.returncode == 143
    assert f"go on with: lago train --resume --out '{out}'" in told
    assert not (out / "model.zip").exists()
    stopped = newest(out / "checkpoints")[1].figures["iterations"]

    process = start("--resume", "--out", out)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    rows = list(csv.DictReader((out / "progress.csv").read_text().splitlines()))
    assert [int(row["time/iterations"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > stopped
    assert int(rows[-1]["time/total_timesteps"]) >= 6000
    assert (out / "model.zip").is_file()
    points = runs.read_json(out / "curve.json")["tasks"]["reach"]["env_steps"]
    assert points == sorted(set(points))
    assert len(points) >= len(rows) - 1
    assert len(runs.read_json(out / "provenance.json")["resumed"]) == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "run"
    words = list(SETTINGS)
    words[words.index("6000")] = "150"
    assert cli.main(["train", *words, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "resume: .*nothing is left"),
        (("--seed", "3"), "seed: the run .* was made with 7"),
        (("--arm", "bc_ppo"), "arm: the run .* was made with ppo"),
        (("--n-steps", "64"), "train: the run"),
        (("--overwrite",), "overwrite: "),
        (("--instruction-encoder", "x"), "instruction_encoder: "),
    ],
)
def test_what_cannot_be_resumed_is_refused(finished, words, says, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.name != "provenance.json"}
    assert cli.main(["train", "--resume", "--out", str(finished), *words]) == 2

    assert re.search(f"UnsupportedArgument: {says}", capsys.readouterr().err)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_folder_without_a_run_or_of_another_command_is_refused(tmp_path, capsys):
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
    runs.open_run(tmp_path / "other", {"arms": ["ppo"]})
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "other")]) == 2
    assert "not made by `lago train`" in capsys.readouterr().err


def test_overwriting_a_run_deletes_its_checkpoints(finished):
    assert paths_in(finished / "checkpoints")
    runs.open_run(finished, {"arm": "ppo"}, overwrite=True)
    assert not paths_in(finished / "checkpoints")
