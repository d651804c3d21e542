"""Checkpoint files: what is written comes back, what is damaged is refused, what stood before stands."""

import json
import os
import random
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save

from lago_fast import errors
from lago_fast.algorithms.checkpoint import (
    Checkpoint,
    newest,
    paths_in,
    read_tensors,
    set_aside_after,
    write_checkpoint,
    write_tensors,
)
from tests.algorithms.test_safe_load import mutate

STATE = Checkpoint(
    {
        "policy.weight": torch.arange(12.0).reshape(3, 4).t(),  # not contiguous
        "random.torch": torch.get_rng_state(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
    },
    {"num_timesteps": 12, "nan": float("nan"), "text": "Größe", "nested": {"list": [1, None, True, 0.1]}},
)


def written(folder, iteration=1, keep=3):
    return write_checkpoint(folder, iteration, STATE, keep)


def test_what_is_written_comes_back_bit_for_bit(tmp_path):
    tensors, figures = read_tensors(written(tmp_path))
    assert tensors.keys() == STATE.tensors.keys()
    for name, tensor in STATE.tensors.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert figures.pop("nan") != 0
    assert figures == {name: value for name, value in STATE.figures.items() if name != "nan"}


def test_the_last_few_stay_and_the_rests_of_a_killed_writer_go(tmp_path):
    (tmp_path / ".iteration_00000002.safetensors.abc").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    for iteration in (3, 25, 100, 1000):
        written(tmp_path, iteration)
    assert [p.name for p in paths_in(tmp_path)] == [f"iteration_{i:08d}.safetensors" for i in (25, 100, 1000)]
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in paths_in(tmp_path)} == {"notes.txt"}


def test_the_newest_whole_one_is_taken_and_a_damaged_one_named(tmp_path, caplog):
    written(tmp_path, 1)
    bad = written(tmp_path, 2)
    bad.write_bytes(bad.read_bytes()[:-1])
    path, state = newest(tmp_path)
    assert (path.name, state.figures["num_timesteps"]) == ("iteration_00000001.safetensors", 12)
    assert bad.name in caplog.text
    with pytest.raises(errors.CorruptFile, match=bad.name):
        newest(bad)
    path.write_bytes(b"")
    with pytest.raises(errors.NoCheckpoint, match="none of its 2"):
        newest(tmp_path)
    with pytest.raises(errors.NoCheckpoint, match="no checkpoint is there"):
        newest(tmp_path.parent / tmp_path.name / "..")
    for absent in (tmp_path / "absent", tmp_path / "absent.safetensors"):
        with pytest.raises(errors.NoCheckpoint, match="no checkpoint is there"):
            newest(absent)
    with pytest.raises(errors.NoCheckpoint, match="cannot be read"):
        read_tensors(tmp_path / "absent.safetensors")


def crafted(tmp_path, metadata, tensors=None):
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(save(tensors or {"a": torch.ones(2)}, metadata))
    return path


def test_altered_contents_and_strange_headers_are_refused(tmp_path):
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in a tensor
    path.write_bytes(content)
    with pytest.raises(errors.HashMismatch, match="altered"):
        read_tensors(path)
    for metadata in (None, {"format": "1"}, {"format": "x", "figures": "{}", "sha256": ""}):
        with pytest.raises(errors.CorruptFile):
            read_tensors(crafted(tmp_path, metadata))
    deep = {"format": "1", "figures": "[" * 100_000, "sha256": ""}
    with pytest.raises(errors.CorruptFile):
        read_tensors(crafted(tmp_path, deep))
    with pytest.raises(errors.UnsupportedArgument, match="format 2"):
        read_tensors(crafted(tmp_path, {"format": "2", "figures": "{}", "sha256": ""}))
    write_tensors(path, {}, {})
    # a header that claims more than the file holds
    for length in (2**63, 2**32, 10**6):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(errors.CorruptFile):
            read_tensors(path)


def test_a_file_larger_than_any_checkpoint_is_not_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(17 * 2**30)  # sparse: it takes no room
    with pytest.raises(errors.CorruptFile, match="no checkpoint has"):
        read_tensors(path)


def test_no_name_in_a_file_is_ever_a_path(tmp_path):
    path = crafted(tmp_path, {"format": "1", "figures": "{}", "sha256": ""}, {"../../etc/passwd": torch.ones(1)})
    with pytest.raises(errors.HashMismatch):
        read_tensors(path)
    assert [p.name for p in tmp_path.iterdir()] == ["crafted.safetensors"]


def test_where_no_more_can_be_written_the_error_says_so_and_the_old_ones_stand(tmp_path):
    before = written(tmp_path, 1).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(errors.NotSaved, match=r"iteration_00000002.*File too large.*make room"):
            written(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lago_fast import errors
from lago_fast.algorithms.checkpoint import newest
from tests.algorithms.test_checkpoint import written
folder = Path(sys.argv[1])
written(folder, 1)
room = folder / "filler"
with room.open("wb", buffering=0) as file:
    try:
        while file.write(b"0" * 4096):
            pass
    except OSError:
        pass
try:
    written(folder, 2, keep=1)
except errors.NotSaved as error:
    print(error)
print(newest(folder)[0].name, sorted(p.name for p in folder.iterdir()))
"""


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    script = f"mount -t tmpfs -o size=256k tmpfs {disk} && exec {sys.executable} -c '{DISK}' {disk} {root}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no disk of its own can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    said, names = done.stdout.splitlines()
    assert "No space left on device" in said
    assert names == "iteration_00000001.safetensors ['filler', 'iteration_00000001.safetensors']"


def test_mutated_checkpoints_are_refused_by_a_typed_error(tmp_path, request):
    whole = written(tmp_path).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    path, rng = tmp_path / "mutated.safetensors", random.Random(0)
    refused = 0
    for i in range(request.config.getoption("--mutations")):
        content = mutate(whole, rng)
        if i % 2:  # the header alone, its length put right
            changed = mutate(json.dumps(header).encode(), rng)
            content = len(changed).to_bytes(8, "little") + changed + whole[8 + length :]
        path.write_bytes(content)
        try:
            tensors, figures = read_tensors(path)
        except (errors.CorruptFile, errors.HashMismatch, errors.UnsupportedArgument):
            refused += 1
        else:  # a change that changes nothing, such as of white space
            assert all(torch.equal(tensors[name], tensor) for name, tensor in STATE.tensors.items())
            assert figures["num_timesteps"] == 12
    assert refused > 0.9 * request.config.getoption("--mutations")


def test_a_run_that_was_taken_back_sets_what_came_after_aside(tmp_path):
    for iteration in (4, 5, 6):
        written(tmp_path, iteration)
    aside = set_aside_after(tmp_path, 4)
    assert [path.name for path in aside] == [f"iteration_0000000{n}.safetensors.aside" for n in (5, 6)]
    assert all(path.is_file() for path in aside)
    assert newest(tmp_path)[0].name == "iteration_00000004.safetensors"


def test_what_was_just_written_stays_whatever_is_newer(tmp_path):
    written(tmp_path, 6)
    path = written(tmp_path, 5, keep=1)
    assert paths_in(tmp_path) == [path]
    written(tmp_path, 7, keep=2)
    assert [p.name for p in paths_in(tmp_path)] == ["iteration_00000005.safetensors", "iteration_00000007.safetensors"]
