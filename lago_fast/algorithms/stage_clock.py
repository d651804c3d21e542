"""Where the time of an iteration goes: one clock, read between coarse stages.

Every reading gives the time since the one before to the stage that has just ended, so that the stages sum to the
iteration. On CUDA the readings are events on the stream, evaluated once per iteration: the host waits for nothing.
Test: pytest tests/algorithms/test_stage_clock.py
"""

import time
from typing import Any, NamedTuple

import torch

# env: stepping; prior: its queries; policy: its forward passes, in collection and update; transfer: rows stored,
# gathered and copied between host and device; update: what one fused call does of policy to optimiser
STAGES = ("env", "prior", "policy", "transfer", "advantage", "loss", "backward", "optimiser", "update", "logging")


class StageShare(NamedTuple):
    seconds: float
    share: float  # of the iterations
    speed_up: float | None  # at most, of an iteration in which the stage costs nothing; None where there is no other


class StageClock:
    """Seconds per stage, of the iteration under way and of all that were closed.

    Args:
        device: whose stream does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._device = device
        self.total = dict.fromkeys(STAGES, 0.0)  # seconds, of closed iterations
        self.iterations = 0
        self._events: list[Any] = []  # reused by every iteration
        self.start()

    def start(self) -> None:
        """Begin an iteration now, and forget the one under way."""
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._ended: list[str] = []  # the stage before each event but the first
        self._last = time.perf_counter()
        if self._on_cuda:
            self._record(0)

    def lap(self, stage: str) -> None:
        """Give the time since the last reading to `stage`."""
        if self._on_cuda:
            self._ended.append(stage)
            self._record(len(self._ended))
            return
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def close(self) -> dict[str, float]:
        """End the iteration, begin the next, and return the seconds of each stage."""
        if self._on_cuda:
            self._events[len(self._ended)].synchronize()
            for k, stage in enumerate(self._ended):
                self._seconds[stage] += self._events[k].elapsed_time(self._events[k + 1]) / 1e3
        seconds = self._seconds
        for stage, spent in seconds.items():
            self.total[stage] += spent
        self.iterations += 1
        self.start()
        return seconds

    def _record(self, k: int) -> None:
        if k == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[k].record(torch.cuda.current_stream(self._device))


def shares(seconds: dict[str, float]) -> dict[str, StageShare]:
    """Return what each stage that took time was of the whole, the largest first, and the ceiling that it implies."""
    whole = sum(seconds.values())
    spent = sorted(((name, t) for name, t in seconds.items() if t > 0), key=lambda item: -item[1])
    return {name: StageShare(t, t / whole, whole / (whole - t) if len(spent) > 1 else None) for name, t in spent}
