"""SIGINT and SIGTERM as a request: the iteration is finished, a checkpoint written, the process left.

Test: pytest tests/algorithms/test_stopping.py
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lago_fast.errors import EnvironmentFailed, UnsupportedArgument

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar has hidden


class StopOnSignals:
    """A context in which the first SIGINT or SIGTERM is noted, for `CheckpointEvery`, and a second one leaves at once.

    `CheckpointEvery` then raises SystemExit with 130 or 143 once the iteration is whole and its checkpoint written.
    Envs in processes of their own may be ended by the same signal; then the checkpoint of before stands.

    Raises:
        UnsupportedArgument: entered in another thread than the main one, where signals cannot be caught.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """Return 128 + the signal, as shells do."""
        assert self.caught is not None
        return 128 + self.caught

    def __enter__(self) -> "StopOnSignals":
        if threading.current_thread() is not threading.main_thread():
            raise UnsupportedArgument("StopOnSignals: signals reach the main thread alone; train there, or without it")
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.caught is not None and isinstance(error, EnvironmentFailed):
            raise SystemExit(self.exit_code) from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        # straight to the descriptor: the interrupted code may hold the locks of a stream or of logging
        if self.caught is not None:
            os.write(2, SHOW_CURSOR if os.isatty(2) else b"")
            os._exit(128 + number)
        self.caught = number
        os.write(2, b"finishing the iteration, then a checkpoint; once more to leave at once\n")
