"""Demonstrations: recorded, read back, readable by Minari, and refused when damaged."""

import faulthandler
import json
import os
import random
import shutil
import signal
import sys

import h5py
import minari
import numpy as np
import pytest

from lago_fast import demo_files, demos
from lago_fast.demos import expert_table, load_demos, record_demos
from lago_fast.envs.experts import play_expert
from lago_fast.envs.metaworld_tasks import task_phrasings
from lago_fast.errors import DemonstrationError, MissingExtra, RunExists, UnknownTask, UnsupportedArgument
from tests.algorithms.test_safe_load import little_memory, mutate

TASKS = ["reach", "drawer-open"]
SETTINGS = {"seed": 4, "max_episode_steps": 70, "num_envs_per_task": 2}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three episodes of two tasks with a little noise."""
    path = tmp_path_factory.mktemp("demos") / "two-tasks-v0"
    calls = []
    returned = record_demos(TASKS, 3, path, action_noise=0.05, progress=lambda *call: calls.append(call), **SETTINGS)
    assert returned == path
    assert calls == [(task, kept, 3) for task in TASKS for kept in (1, 2, 3)]
    return path


@pytest.fixture
def damaged(recorded, tmp_path):
    """A copy of the dataset to break."""
    return shutil.copytree(recorded, tmp_path / "copy")


def test_arrays_are_what_was_played(recorded):
    loaded = load_demos(recorded)
    assert loaded.tasks == TASKS
    assert loaded.states.shape == (6 * 70, 39)
    assert loaded.actions.shape == (6 * 70, 4)
    assert loaded.states.dtype == loaded.actions.dtype == np.float32
    assert loaded.instruction_id.dtype == loaded.episode_id.dtype == loaded.task_id.dtype == np.int64
    np.testing.assert_array_equal(loaded.episode_id, np.repeat(np.arange(6), 70))
    np.testing.assert_array_equal(loaded.task_id, np.repeat([0, 1], 3 * 70))
    np.testing.assert_array_equal(loaded.action_low, [-1.0] * 4)
    np.testing.assert_array_equal(loaded.action_high, [1.0] * 4)
    assert loaded.success.shape == (6,)
    for k, task in enumerate(TASKS):
        played = play_expert(task, action_noise=0.05, seed=4, max_episode_steps=70, num_envs=2)
        for number, episode in zip(range(3 * k, 3 * k + 3), played, strict=False):
            rows = loaded.episode_id == number
            np.testing.assert_array_equal(loaded.states[rows], episode.states[:-1])
            np.testing.assert_array_equal(loaded.actions[rows], episode.actions)
            assert {loaded.instructions[i] for i in loaded.instruction_id[rows]} == {episode.instruction}
            assert loaded.success[number] == episode.success.any()
        played.close()


def test_instructions_are_the_tasks_own(recorded):
    loaded = load_demos(recorded)
    assert len(set(loaded.instructions)) == len(loaded.instructions)
    for instruction, task in zip(loaded.instruction_id, loaded.task_id, strict=True):
        assert loaded.instructions[instruction] in task_phrasings()[TASKS[task]]


def test_minari_reads_it(recorded, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded.parent))
    dataset = minari.load_dataset("two-tasks-v0")
    assert dataset.total_episodes == 6
    assert dataset.total_steps == 6 * 70
    assert dataset.spec.dataset_id == "two-tasks-v0"
    loaded = load_demos(recorded)
    for number, episode in enumerate(dataset.iterate_episodes()):
        rows = loaded.episode_id == number
        np.testing.assert_array_equal(episode.observations[:-1], loaded.states[rows])
        np.testing.assert_array_equal(episode.actions, loaded.actions[rows])
        np.testing.assert_array_equal(episode.truncations, [False] * 69 + [True])
        assert not episode.terminations.any()
        assert episode.infos["success"].any() == loaded.success[number]


def test_provenance_is_kept(recorded):
    metadata = json.loads((recorded / "data" / "metadata.json").read_text())
    provenance = metadata["lago"]
    assert provenance["tasks"] == TASKS
    assert (provenance["seed"], provenance["action_noise"], provenance["max_episode_steps"]) == (4, 0.05, 70)
    assert (provenance["episodes_per_task"], provenance["num_envs_per_task"]) == (3, SETTINGS["num_envs_per_task"])
    assert (provenance["success_only"], provenance["stop_after_success"]) == (False, None)
    assert provenance["versions"]["envpool"]
    assert {"metaworld", "mujoco", "minari", "numpy", "lago_fast"} <= set(provenance["versions"])
    assert str(recorded.parent) not in json.dumps(metadata)


def test_same_seed_same_dataset_and_a_task_stands_alone(recorded, tmp_path):
    alone = load_demos(record_demos(["drawer-open"], 3, tmp_path / "alone", action_noise=0.05, **SETTINGS))
    both = load_demos(recorded)
    np.testing.assert_array_equal(alone.states, both.states[both.task_id == 1])
    np.testing.assert_array_equal(alone.actions, both.actions[both.task_id == 1])


def test_success_filter_keeps_exactly_so_many_successes(tmp_path):
    # at this horizon the expert reaches some goals in time and some not
    settings = {"seed": 0, "max_episode_steps": 40, "num_envs_per_task": 4}
    every = load_demos(record_demos(["reach"], 8, tmp_path / "all", **settings))
    only = load_demos(record_demos(["reach"], 5, tmp_path / "some", success_only=True, **settings))
    assert 0 < every.success.sum() < 8
    assert only.success.tolist() == [True] * 5
    first = int(np.flatnonzero(every.success)[0])
    np.testing.assert_array_equal(only.states[only.episode_id == 0], every.states[every.episode_id == first])


def test_success_filter_gives_up_and_leaves_nothing(tmp_path):
    path = tmp_path / "never"
    with pytest.raises(DemonstrationError, match=r"'push' succeeded in 0 of 10 episodes.*lower action_noise"):
        record_demos(["push"], 1, path, success_only=True, max_episode_steps=2)
    assert list(tmp_path.iterdir()) == []


def test_stop_after_success_is_flagged_as_truncated(tmp_path):
    path = record_demos(["reach"], 2, tmp_path / "short", stop_after_success=0, **SETTINGS)
    for episode in minari.MinariDataset(path / "data").iterate_episodes():
        assert len(episode.actions) < 70
        assert episode.infos["success"].tolist() == [False] * (len(episode.actions) - 1) + [True]
        assert episode.truncations[-1]
        assert not episode.terminations.any()


def test_existing_path_is_kept_unless_overwrite(damaged, tmp_path):
    before = load_demos(damaged)
    with pytest.raises(RunExists, match="overwrite"):
        record_demos(["reach"], 1, damaged, **SETTINGS)
    np.testing.assert_array_equal(load_demos(damaged).states, before.states)
    record_demos(["reach"], 1, damaged, overwrite=True, **SETTINGS)
    assert load_demos(damaged).success.shape == (1,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_folder_that_is_no_dataset_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(RunExists, match="no dataset"):
        record_demos(["reach"], 1, tmp_path / "thesis", overwrite=True, **SETTINGS)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize("when", ["writing", "moving"])
def test_a_crash_leaves_the_old_dataset_and_no_litter(damaged, tmp_path, monkeypatch, when):
    before = load_demos(damaged)

    def crash(*_args):
        raise OSError("disk full")

    if when == "writing":
        monkeypatch.setattr(demos, "_append", crash)
    else:
        rename = demos.Path.rename

        def refuse_the_new(self, target):
            return crash() if self.name == "complete" else rename(self, target)

        monkeypatch.setattr(demos.Path, "rename", refuse_the_new)
    with pytest.raises(OSError, match="disk full"):
        record_demos(["reach"], 1, damaged, overwrite=True, **SETTINGS)
    np.testing.assert_array_equal(load_demos(damaged).states, before.states)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


DISCRETE = '{"type": "Discrete", "dtype": "int64", "start": 0, "n": 3}'


def truncate_file(path):
    file = path / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:1000])


def forget_hash(path):
    file = path / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["lago"]["sha256"]
    file.write_text(json.dumps(metadata))


def alter(path):
    file = path / "data" / "main_data.hdf5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(path):
    forget_hash(path)
    truncate_file(path)


def rewrite(path, name, change):
    forget_hash(path)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        values = change(file[name][()])
        del file[name]
        file[name] = values


def poison(column):
    def change(values):
        values[3] = np.nan
        return values

    return lambda path: rewrite(path, f"episode_1/{column}", change)


def edit_metadata(**changes):
    def edit(path):
        file = path / "data" / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def bomb(path):
    forget_hash(path)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        del file["episode_0/observations"]
        file.create_dataset("episode_0/observations", (10**9, 39), np.float32, chunks=(1024, 39))


def drop_label(path):
    forget_hash(path)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        del file["episode_2"].attrs["instruction"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "no dataset"),
        (lambda path: (path / "data" / "metadata.json").unlink(), "unreadable"),
        (lambda path: (path / "data" / "metadata.json").write_text("{nonsense"), "unreadable"),
        (lambda path: (path / "data" / "main_data.hdf5").unlink(), "unreadable"),
        (truncate_file, "unreadable.*SHA-256"),
        (cut_short, "unreadable"),
        (alter, "unreadable.*SHA-256"),
        (bomb, "unreadable.*156,0.*honestly"),
        (edit_metadata(total_episodes=0), "no episode"),
        (edit_metadata(total_episodes=9), "unreadable"),
        (edit_metadata(action_space=DISCRETE), "do not fit"),
        (drop_label, "unreadable.*instruction"),
        (poison("observations"), "episode 1 holds NaN"),
        (poison("actions"), "episode 1 holds NaN"),
        (lambda path: rewrite(path, "episode_0/actions", lambda a: a[:, :3]), "episode 0 .*do not fit"),
        (lambda path: rewrite(path, "episode_0/actions", lambda a: a[:-1]), "episode 0 .*do not fit"),
        (lambda path: rewrite(path, "episode_4/observations", lambda a: a[:, :20]), "episode 4 .*do not fit"),
    ],
    ids=[
        "missing",
        "no-metadata",
        "bad-json",
        "no-data",
        "truncated-file",
        "truncated-file-without-hash",
        "altered-file",
        "bomb",
        "empty",
        "too-few",
        "other-space",
        "no-instruction",
        "nan-observation",
        "nan-action",
        "action-dimensions",
        "lengths",
        "observation-dimensions",
    ],
)
def test_damage_is_told_with_the_remedy(damaged, damage, message):
    damage(damaged)
    with pytest.raises(DemonstrationError, match=f"{message}.*lago demos"):
        load_demos(damaged)


def test_actions_outside_the_box_are_clipped_on_reading(damaged):
    rewrite(damaged, "episode_0/actions", lambda actions: actions * 100.0)
    actions = load_demos(damaged).actions
    assert np.abs(actions).max() == 1.0


def test_only_the_tasks_named_are_noisy(tmp_path):
    tasks, options = ["drawer-open", "reach"], {"seed": 4, "max_episode_steps": 20, "num_envs_per_task": 1}
    clean = load_demos(record_demos(tasks, 1, tmp_path / "clean", **options))
    noisy = load_demos(record_demos(tasks, 1, tmp_path / "x", action_noise=0.5, noisy_tasks=["reach"], **options))
    for k, same in ((clean.tasks.index("drawer-open"), True), (clean.tasks.index("reach"), False)):
        assert np.array_equal(clean.actions[clean.task_id == k], noisy.actions[noisy.task_id == k]) == same


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": ["raech"]}, UnknownTask, "reach"),
        ({"episodes_per_task": 0}, UnsupportedArgument, "episodes_per_task=0"),
        ({"action_noise": -0.1}, UnsupportedArgument, "action_noise"),
        ({"action_noise": float("nan")}, UnsupportedArgument, "action_noise"),
        ({"noisy_tasks": ["push"], "action_noise": 0.1}, UnsupportedArgument, r"noisy_tasks.*push.*reach"),
        ({"noisy_tasks": ["reach"]}, UnsupportedArgument, r"noisy_tasks.*action_noise=0"),
        ({"stop_after_success": -1}, UnsupportedArgument, "stop_after_success"),
        ({"num_envs_per_task": 0}, UnsupportedArgument, "num_envs_per_task"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        record_demos(**{"tasks": ["reach"], "episodes_per_task": 1, "path": tmp_path / "x", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_missing_minari_names_the_extra(recorded, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtra, match=r"lago_fast\[envs\]"):
        load_demos(recorded)
    with pytest.raises(MissingExtra, match=r"lago_fast\[envs\]"):
        record_demos(["reach"], 1, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_expert_table_rows():
    rows = expert_table(TASKS, 3, seed=1, max_episode_steps=60)
    assert [row["task"] for row in rows] == TASKS
    reach = rows[0]
    played = play_expert("reach", seed=1, max_episode_steps=60, num_envs=3)
    episodes = [next(played) for _ in range(3)]
    played.close()
    assert reach["episodes"] == 3
    assert reach["success"] == np.mean([episode.success.any() for episode in episodes])
    assert reach["success_at_end"] == np.mean([episode.success[-1] for episode in episodes])
    returns = [episode.rewards.sum() for episode in episodes]
    assert reach["return"] == pytest.approx(np.mean(returns), rel=1e-6)
    with pytest.raises(UnsupportedArgument, match="episodes=0"):
        expert_table(TASKS, 0)


def fork_trial(dataset):
    """What `demo_files.run_trial` does, by a fork of this process: a hundred times sooner."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        faulthandler.disable()
        signal.alarm(30)  # some files make the HDF5 library read for ever; `run_trial` has a time limit too
        os._exit(demo_files.trial(dataset))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, "as the trial said"


def test_a_file_that_brings_the_library_down_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "two-tasks-v0"
    record_demos(["reach"], 1, path, max_episode_steps=5, num_envs_per_task=1)
    forget_hash(path)
    assert len(load_demos(path).success) == 1
    end = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(demo_files, "TRIAL", end)
    with pytest.raises(DemonstrationError, match="tried to read it ended with signal 11"):
        load_demos(path)
    monkeypatch.setattr(demo_files, "TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(demo_files, "LEAST_TRIAL_S", 0.1)
    with pytest.raises(DemonstrationError, match="took more than 0 s"):
        load_demos(path)
    monkeypatch.setattr(demo_files, "TRIAL", "import no_such_module")
    monkeypatch.setattr(demo_files, "LEAST_TRIAL_S", 60)
    with pytest.raises(DemonstrationError, match="exit code 1"):
        load_demos(path)


def test_mutated_datasets_are_refused_or_read(tmp_path, request, monkeypatch):
    path = tmp_path / "two-tasks-v0"
    record_demos(["reach"], 2, path, max_episode_steps=20, num_envs_per_task=2)
    monkeypatch.setattr(demo_files, "run_trial", fork_trial)
    damage_and_load(path, load_demos, request.config.getoption("--mutations"))


def damage_and_load(path, load, times):
    """Damage a dataset's data, or its metadata, and load it, so many times; most are refused."""
    data, about = path / "data" / "main_data.hdf5", path / "data" / "metadata.json"
    whole, metadata = data.read_bytes(), about.read_bytes()
    forget_hash(path)
    unhashed = about.read_bytes()  # as another program's dataset, which the HDF5 library has to make out by itself
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    with little_memory():
        for i in range(times):
            data.write_bytes(whole if i % 3 == 0 else mutate(whole, rng))
            about.write_bytes((mutate(metadata, rng), metadata, unhashed)[i % 3])
            try:
                load(path)
                outcomes["read"] += 1
            except DemonstrationError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["read"]
