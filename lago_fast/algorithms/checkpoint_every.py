"""A callback that writes a checkpoint every few iterations, and ends a run that was asked to stop.

Test: pytest tests/algorithms/test_resume.py tests/algorithms/test_stopping.py; make kill
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stable_baselines3.common.callbacks import BaseCallback

from lago_fast.algorithms.checkpoint import newest, paths_in, set_aside_after, write_checkpoint
from lago_fast.algorithms.stopping import StopOnSignals
from lago_fast.algorithms.training_state import state_of
from lago_fast.errors import RunExists, UnsupportedArgument

if TYPE_CHECKING:
    from lago_fast.algorithms.fast_kl_ppo import FastKLPPO

logger = logging.getLogger(__name__)


class Kept(Protocol):
    """A callback, say, whose own state goes into the checkpoint."""

    def kept(self) -> Any:
        """Return the state, JSON-able."""
        ...


class CheckpointEvery(BaseCallback):
    """Write a checkpoint before the first iteration, after every few, and at the end.

    `FastKLPPO.resume(folder, env)` or `model.restore(folder)` goes on from the newest one. A run that was taken back
    to an older one sets those after it aside, under another name.

    Args:
        folder: of the checkpoints; made where it is missing.
        iterations: between two of them.
        keep: newest ones that stay.
        stop: signals that end the run after the iteration under way; see `StopOnSignals`.
        also: what else to keep, by name; `FastKLPPO.restore` returns it.

    Raises:
        UnsupportedArgument: iterations or keep are below 1, or the model is no FastKLPPO.
        RunExists: when learning starts, the folder holds the checkpoints of another run.
        NotSaved: a checkpoint could not be written; the ones of before stand.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        iterations: int = 25,
        keep: int = 3,
        *,
        stop: StopOnSignals | None = None,
        also: Mapping[str, Kept] | None = None,
    ) -> None:
        super().__init__()
        if min(iterations, keep) < 1:
            raise UnsupportedArgument(f"iterations={iterations}, keep={keep}: give at least 1 of each")
        self.folder, self.iterations, self.keep = Path(folder), iterations, keep
        self.stop, self.also = stop, also or {}
        self._written: int | None = None

    def _on_training_start(self) -> None:
        if not hasattr(self.model, "run_id"):
            raise UnsupportedArgument(f"CheckpointEvery: it keeps FastKLPPO, not {type(self.model).__name__}")
        self._written = None
        if paths_in(self.folder):
            path, there = newest(self.folder)
            if there.figures.get("run_id") != self._ppo.run_id:
                raise RunExists(
                    f"folder: {path} is of another run; go on from it with FastKLPPO.resume, name another folder, or "
                    "delete it"
                )
            for aside in set_aside_after(self.folder, self._ppo.iterations):
                logger.warning("%s is of an iteration that this run has not reached, or not again: set aside", aside)

    def _on_rollout_start(self) -> None:
        stopped = self.stop is not None and self.stop.caught is not None
        if stopped or self._written is None or self._ppo.iterations % self.iterations == 0:
            self._write()
        if stopped and self.stop is not None:
            logger.warning("stopped by a signal after iteration %d; go on from %s", self._ppo.iterations, self.folder)
            raise SystemExit(self.stop.exit_code)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._write()

    def _write(self) -> None:
        iteration = self._ppo.iterations
        if self._written == iteration:
            return
        state = state_of(self._ppo)
        state.figures["also"] = {name: holder.kept() for name, holder in self.also.items()}
        write_checkpoint(self.folder, iteration, state, self.keep)
        self._written = iteration

    @property
    def _ppo(self) -> "FastKLPPO":
        return self.model  # type: ignore[return-value]  # checked when learning starts
