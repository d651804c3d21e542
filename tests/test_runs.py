"""Run folders: what is refused, what is replaced, what survives, and where a result says it came from."""

import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from lago_fast import errors, runs
from lago_fast.errors import RunExists, UnsupportedArgument
from tests.algorithms.test_safe_load import mutate


@dataclass(frozen=True)
class Inner:
    tasks: tuple[str, ...] = ("push",)
    layers: int | None = None
    sizes: tuple[int, ...] | None = (1, 2)


@dataclass(frozen=True)
class Outer:
    seed: int = 3
    inner: Inner = field(default_factory=Inner)


def test_a_new_folder_holds_config_and_provenance(tmp_path):
    folder = runs.open_run(tmp_path / "a" / "b", Outer())
    assert runs.is_run(folder)
    assert runs.read_config(folder) == {
        "seed": 3,
        "inner": {"tasks": ["push"], "layers": None, "sizes": [1, 2]},
    }
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "provenance.json"]


@pytest.mark.parametrize("made", [Outer(), Outer(7, Inner(("a", "b"), 2, None))])
def test_settings_survive_json(made):
    assert runs.from_plain(Outer, json.loads(json.dumps(runs.to_plain(made)))) == made


def test_a_setting_of_another_version_is_refused():
    with pytest.raises(UnsupportedArgument, match="Inner has no setting colour"):
        runs.from_plain(Outer, {"seed": 1, "inner": {"colour": "red"}})


def test_a_run_is_not_overwritten_unasked(tmp_path):
    runs.open_run(tmp_path, {"seed": 1})
    (tmp_path / "model.zip").write_text("kept")
    with pytest.raises(RunExists, match="--overwrite"):
        runs.open_run(tmp_path, {"seed": 2})
    assert (tmp_path / "model.zip").read_text() == "kept"
    assert runs.read_config(tmp_path) == {"seed": 1}


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    runs.open_run(tmp_path, {"seed": 1})
    (tmp_path / "checkpoints").mkdir()
    old = [
        "model.zip",
        "curve.json",
        "progress.csv",
        "events.out.tfevents.1.host.2.0",
        "checkpoints/a_10_steps.zip",
    ]
    strangers = ["notes.txt", "model.zip.bak", "checkpoints/readme.md"]
    for name in [*old, *strangers]:
        (tmp_path / name).write_text(name)
    (tmp_path / "child").mkdir()
    runs.open_run(tmp_path / "child", {"seed": 9})

    runs.open_run(tmp_path, {"seed": 2}, overwrite=True)
    assert [name for name in old if (tmp_path / name).exists()] == []
    assert [(tmp_path / name).read_text() for name in strangers] == strangers
    assert runs.read_config(tmp_path) == {"seed": 2}
    assert runs.read_config(tmp_path / "child") == {"seed": 9}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"format_version": 1, "class": "LatentActionPrior"}'),
        ("config.json", "not json"),
        ("model.zip", "somebody's model"),
        ("progress.csv", "somebody's progress"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_strangers_are_never_replaced(tmp_path, name, content, overwrite):
    (tmp_path / name).write_text(content)
    with pytest.raises(RunExists, match="name another folder"):
        runs.open_run(tmp_path, {"seed": 1}, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_a_run_may_lie_beside_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    runs.open_run(tmp_path, {"seed": 1})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RunExists, match="is a file"):
        runs.open_run(tmp_path / "x", {})


def test_a_config_that_is_no_json_leaves_the_old_run(tmp_path):
    runs.open_run(tmp_path, {"seed": 1})
    with pytest.raises(UnsupportedArgument, match="seed: nan"):
        runs.open_run(tmp_path, {"seed": math.nan}, overwrite=True)
    assert runs.read_config(tmp_path) == {"seed": 1}


def test_an_infinite_setting_is_kept_and_read_back(tmp_path):
    @dataclass(frozen=True)
    class Bounds:
        most: float | None = None
        least: float = 0.0

    made = Bounds(math.inf, -math.inf)
    assert runs.from_plain(Bounds, runs.read_config(runs.open_run(tmp_path, made))) == made


def test_writing_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    runs.write_json(path, {"a": (1, Path("x"))})
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(path, {"a": math.inf})
    assert json.loads(path.read_text()) == {"a": [1, "x"]}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"seed": 1}'])
def test_what_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedArgument, match="holds no run"):
        runs.read_config(tmp_path)


def test_a_run_of_another_format_is_refused(tmp_path):
    runs.write_json(tmp_path / "config.json", {"run_format": 99})
    with pytest.raises(UnsupportedArgument, match="format 99"):
        runs.read_config(tmp_path)


def test_provenance_names_code_versions_and_machine(tmp_path):
    folder = runs.open_run(tmp_path / "run", {})
    found = json.loads((folder / "provenance.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["hardware"]["cpu"]
    assert found["hardware"]["cores"] >= 1
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["command_line"] == sys.argv
    assert found["date_utc"].endswith("+00:00")


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_of_the_package_alone(tmp_path, monkeypatch):
    package = tmp_path / "lago_fast"
    package.mkdir()
    (package / "runs.py").write_text("")
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
    assert runs.code_version() == {"commit": None, "dirty": None}  # no checkout

    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "-m", "somebody's project")
    assert runs.code_version() == {"commit": None, "dirty": None}  # below a checkout that does not have it

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "the package")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert runs.code_version() == {"commit": commit, "dirty": False}
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside of a hook
    assert runs.code_version() == {"commit": commit, "dirty": False}

    (package / "runs.py").write_text("altered")
    assert runs.code_version() == {"commit": commit, "dirty": True}


def test_without_git_there_is_no_commit_and_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.code_version() == {"commit": None, "dirty": None}


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # of a header that looks like Python 2's
def test_mutated_tables_are_read_or_refused(tmp_path, request):
    runs.save_table(tmp_path, np.arange(12, dtype=np.float32).reshape(3, 4))
    path = tmp_path / runs.TABLE
    whole, rng, outcomes = path.read_bytes(), random.Random(0), {"read": 0, "refused": 0}
    for _ in range(request.config.getoption("--mutations")):
        path.write_bytes(mutate(whole, rng))
        try:
            assert runs.load_table(tmp_path).nbytes <= len(whole) + 64
            outcomes["read"] += 1
        except errors.UnsupportedArgument:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


def test_a_table_that_claims_more_than_it_holds_takes_no_memory(tmp_path):
    path = tmp_path / runs.TABLE
    np.save(path, np.zeros((3, 4), np.float32))
    path.write_bytes(path.read_bytes().replace(b"(3, 4), }", b"(3000000000, 400), }"))
    with pytest.raises(errors.UnsupportedArgument, match="cannot be read"):
        runs.load_table(tmp_path)
