"""Transitions of text games on disk."""

import json
import shutil

import h5py
import numpy as np
import pytest

from lago_fast import demo_files
from lago_fast.envs.overcooked import make_overcooked
from lago_fast.envs.text_recording import make_text_expert, record_text_episodes
from lago_fast.errors import DemonstrationError, RunExists
from lago_fast.text_demos import load_text_demos, save_text_demos
from tests.test_demos import damage_and_load, fork_trial

ORIGIN = {"game": "overcooked", "task": "tomato-salad", "epsilon": 0.3, "seed": 0}


@pytest.fixture(scope="module")
def played():
    env = make_overcooked(4)
    return record_text_episodes(env, make_text_expert(env, 0.3), 6, seed=0)


@pytest.fixture(scope="module")
def written(played, tmp_path_factory):
    return save_text_demos(played, tmp_path_factory.mktemp("demos") / "kitchen", origin=ORIGIN)


@pytest.fixture
def dataset(written, tmp_path):
    return shutil.copytree(written, tmp_path / "kitchen")


def test_what_is_read_is_what_was_written(played, written):
    for before, after in zip(played, load_text_demos(written), strict=True):
        np.testing.assert_array_equal(np.array(after, object), np.array(before, object))


def test_minari_reads_it_too(played, written, monkeypatch):
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(written.parent))
    dataset = minari.load_dataset("kitchen")
    assert dataset.total_steps == len(played.choice)
    first = dataset[0]
    assert first.observations["observation"][0] == played.observation[0]
    assert first.actions[0] == played.choice[0]


def test_its_origin_is_kept(written):
    kept = json.loads((written / "data" / "metadata.json").read_text())["lago"]
    assert kept["origin"] == ORIGIN
    assert "lago_fast" in kept["versions"]


@pytest.mark.parametrize("column", ["instruction", "observation", "next_observation"])
@pytest.mark.parametrize("text", ["a\0b", "c\0", "a\ud83d"])
def test_texts_that_the_file_cannot_hold_are_refused(played, tmp_path, column, text):
    texts = [*getattr(played, column)]
    texts[-1] = text
    with pytest.raises(DemonstrationError, match=f"row {len(texts) - 1}, {column}: .*HDF5 cannot hold"):
        save_text_demos(played._replace(**{column: texts}), tmp_path / "kitchen", origin=ORIGIN)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("column", "other"), [("next_observation", "elsewhere"), ("next_admissible", ("wait",))])
def test_a_row_that_is_not_followed_by_what_it_says_is_refused(played, tmp_path, column, other):
    rows = [*getattr(played, column)]
    rows[1] = other
    with pytest.raises(DemonstrationError, match=f"row 1, {column}: .*record the episode again"):
        save_text_demos(played._replace(**{column: rows}), tmp_path / "kitchen", origin=ORIGIN)


def test_odd_characters_are_kept(played, tmp_path):
    # the last row's is no other row's observation
    texts = [*played.next_observation[:-1], "a\x85b\u2028\r\n\x1b[1m\U0001f600"]
    save_text_demos(played._replace(next_observation=texts), tmp_path / "kitchen", origin=ORIGIN)
    assert list(load_text_demos(tmp_path / "kitchen").next_observation) == texts


def forge(dataset, change):
    """Change the data, and the hash with them."""
    from lago_fast.demo_files import sha256_of

    with h5py.File(dataset / "data" / "main_data.hdf5", "a") as file:
        change(file)
    path = dataset / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["lago"]["sha256"] = sha256_of(dataset)
    path.write_text(json.dumps(metadata))


def test_choices_that_are_not_admissible_are_refused(dataset):
    forge(dataset, lambda file: file["episode_1/actions"].__setitem__(0, 7))
    with pytest.raises(DemonstrationError, match="choice: not among the 6 admissible actions"):
        load_text_demos(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["episode_0/infos/admissible"].__setitem__(0, "no list"), "unreadable"),
        (lambda file: file["episode_0/infos/admissible"].resize((2,)), "needs"),
        (lambda file: file["episode_0/rewards"].__setitem__(0, np.nan), "NaN"),
        (lambda file: file.__delitem__("episode_0/infos"), "unreadable"),
        (lambda file: file["episode_2"].attrs.__delitem__("success"), "unreadable"),
        (lambda file: file["episode_2/terminations"].__setitem__(0, True), "row"),
    ],
)
def test_a_damaged_dataset_is_refused(dataset, change, message):
    forge(dataset, change)
    with pytest.raises(DemonstrationError, match=message):
        load_text_demos(dataset)


def test_an_altered_or_missing_dataset_is_refused(dataset, tmp_path):
    with h5py.File(dataset / "data" / "main_data.hdf5", "a") as file:
        file["episode_0/rewards"][0] = 5
    with pytest.raises(DemonstrationError, match="another SHA-256"):
        load_text_demos(dataset)
    with pytest.raises(DemonstrationError, match="no dataset"):
        load_text_demos(tmp_path / "elsewhere")


def test_nothing_is_overwritten_unasked(played, dataset):
    with pytest.raises(RunExists, match="exists already"):
        save_text_demos(played, dataset, origin={})
    save_text_demos(played, dataset, origin={}, overwrite=True)
    with pytest.raises(DemonstrationError, match="choice"):
        save_text_demos(played._replace(choice=played.choice + 8), dataset, origin={}, overwrite=True)
    assert load_text_demos(dataset).observation == played.observation


def test_mutated_datasets_are_refused_or_read(dataset, request, monkeypatch):
    monkeypatch.setattr(demo_files, "run_trial", fork_trial)
    damage_and_load(dataset, load_text_demos, request.config.getoption("--mutations"))
