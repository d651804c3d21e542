"""A model file is whole or not there, whatever happens while it is written."""

import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from stable_baselines3.common.env_util import make_vec_env

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.atomic import replacing

WRITER = """
import sys
from lago_fast.algorithms.atomic import replacing
from pathlib import Path
path, n = Path(sys.argv[1]), 0
while True:
    n += 1
    with replacing(path) as file:
        for _ in range(64):
            file.write(n.to_bytes(8, "little") * 4096)
    print(n, flush=True)
"""


def test_a_killed_writer_leaves_the_last_whole_file(tmp_path):
    path, rng = tmp_path / "file", random.Random(0)
    last = 0
    for _ in range(10):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()  # it has written once
        time.sleep(rng.random() * 0.05)
        writer.send_signal(signal.SIGKILL)
        told = [1, *map(int, writer.communicate()[0].split())]
        content = path.read_bytes()
        found = int.from_bytes(content[:8], "little")
        assert content == found.to_bytes(8, "little") * (4096 * 64)
        assert found in (told[-1], told[-1] + 1)  # what it had told of, or the next, moved and not yet told
        last = max(last, found)
    assert last > 1


def test_an_error_while_writing_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way():
        with replacing(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_where_the_system_writes_no_more_the_error_says_so_and_the_old_model_stands(tmp_path):
    model = FastKLPPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=1), n_steps=8, batch_size=8, device="cpu")
    path = tmp_path / "model.zip"
    model.save(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(errors.NotSaved, match=r"model\.zip.*File too large.*of before stands"):
            model.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.zip"]


def test_names_are_completed_as_in_stable_baselines3(tmp_path):
    model = FastKLPPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=1), n_steps=8, batch_size=8, device="cpu")
    model.save(tmp_path / "deep" / "best_model")
    assert (tmp_path / "deep" / "best_model.zip").is_file()
    with (tmp_path / "open.zip").open("wb") as file:
        model.save(file)
    for name in ("deep/best_model", "deep/best_model.zip", "open.zip"):
        FastKLPPO.load(tmp_path / name, device="cpu")
