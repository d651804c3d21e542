"""A training run in a process of its own, which tests kill, interrupt, and start again."""

import time
from pathlib import Path

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from lago_fast import FastKLPPO
from lago_fast.algorithms.checkpoint import newest, paths_in
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.progress_log import progress_logger
from lago_fast.algorithms.stopping import StopOnSignals
from tests.algorithms.point_env import PointEnv


class Tell(BaseCallback):
    """Write down each iteration whose checkpoint is complete; end the run after so many of them."""

    def __init__(self, path: Path, iterations: int | None, step_s: float) -> None:
        super().__init__()
        self.path, self.left, self.step_s = path, iterations, step_s

    def _on_rollout_start(self) -> None:
        with self.path.open("a") as file:
            file.write(f"{self.model.iterations}\n")

    def _on_step(self) -> bool:
        time.sleep(self.step_s)
        return True

    def _on_rollout_end(self) -> None:
        self.left = None if self.left is None else self.left - 1

    @property
    def done(self) -> bool:
        return self.left == 0


class StopWhenDone(BaseCallback):
    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell

    def _on_step(self) -> bool:
        return not self.tell.done


def run(folder: Path, iterations: int | None = None, step_s: float = 0.0) -> None:
    """Train in a folder, from its newest checkpoint where there is one; forever, or for some iterations."""
    torch.set_num_threads(1)
    checkpoints = folder / "checkpoints"
    env = DummyVecEnv([PointEnv] * 2)
    resumed = bool(paths_in(checkpoints))
    if resumed:
        model = FastKLPPO.resume(checkpoints, env, device="cpu")
    else:
        # wide, so that much of the time goes into writing
        wide = {"net_arch": [256, 256]}
        model = FastKLPPO(
            "MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu", policy_kwargs=wide
        )
    model.set_logger(progress_logger(folder, ["csv"], since=model.num_timesteps))
    tell = Tell(folder / "told", iterations, step_s)
    with StopOnSignals() as stop:
        callbacks = [CheckpointEvery(checkpoints, 1, keep=2, stop=stop), tell, StopWhenDone(tell)]
        model.learn(10**9, callback=callbacks, reset_num_timesteps=not resumed)


def last_told(folder: Path) -> int:
    """Return the last iteration whose checkpoint was complete, -1 before the first."""
    return int((folder / "told").read_text().split("\n")[-2]) if lines_told(folder) else -1


def lines_told(folder: Path) -> int:
    """Return how often a process has told of a checkpoint; one that resumes tells of the one that it found."""
    path = folder / "told"
    return path.read_text().count("\n") if path.exists() else 0


def newest_iteration(folder: Path) -> int:
    """Return the iteration of the newest checkpoint, all of it read and checked."""
    path, state = newest(folder / "checkpoints")
    assert path.name == f"iteration_{state.figures['iterations']:08d}.safetensors"
    return state.figures["iterations"]
