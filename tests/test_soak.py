"""A long run: memory, threads and file descriptors stay where they were after its first tenth."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from lago_fast import FastKLPPO
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.progress_log import progress_logger
from lago_fast.envs.sb3_adapter import SB3VecEnv
from tests.algorithms.array_points import ArrayPoints
from tests.algorithms.point_env import ScriptedPrior

GROWTH = 0.01  # of the resident memory after the first tenth


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(BaseCallback):
    """What the process holds after each iteration."""

    def __init__(self):
        super().__init__()
        self.seen = []  # (env steps, resident bytes, threads of the system, of Python, file descriptors)

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        counts = (len(os.listdir("/proc/self/task")), threading.active_count(), len(os.listdir("/proc/self/fd")))
        self.seen.append((self.num_timesteps, resident_bytes(), *counts))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_soak(tmp_path, request):
    total = request.config.getoption("--soak-steps")
    torch.set_num_threads(1)
    model = FastKLPPO(
        "MlpPolicy",
        SB3VecEnv(ArrayPoints(64)),
        n_steps=64,
        batch_size=1024,
        n_epochs=2,
        device="cpu",
        seed=0,
        prior=ScriptedPrior(),
    )
    model.set_logger(progress_logger(tmp_path, ["csv", "tensorboard"]))
    watch = Watch()
    model.learn(total, callback=[CheckpointEvery(tmp_path / "checkpoints", 5), watch])
    model.logger.close()
    seen = np.array(watch.seen)
    late = seen[seen[:, 0] > total / 10]
    first, growth = late[0], late[:, 1].max() / late[0, 1] - 1
    print(
        f"\n{model.num_timesteps:,} env steps: {first[1] / 2**20:.1f} MiB after the first tenth, at most "
        f"{100 * growth:+.2f} % later; {first[2]} threads and {first[4]} file descriptors throughout"
    )
    assert len(late) > 5
    assert growth < GROWTH
    assert (late[:, 2:] == first[2:]).all()
