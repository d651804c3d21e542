"""What a slice of work cost: wall time, CPU time of all processes, and on a GPU busy time and energy.

Allocated GPU-hours are devices times wall time; busy ones are weighted by the utilisation that NVML samples; energy is
NVML's counter, or a model (power limit times wall time, watts per core times CPU time), and is called so.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

logger = logging.getLogger(__name__)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SAMPLE_S = 0.1  # NVML renews utilisation and energy every 20 to 100 ms: never for a single kernel
# modelled: a server processor of 280 W with 64 cores, at full load, without memory and fans
WATTS_PER_CORE = 280 / 64


@dataclass
class Cost:
    """What was used between two moments; figures of a GPU are None without one."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of this process and its children, all threads
    gpu_busy_s: float | None = None  # utilisation times wall time; None: not measured
    gpu_joules: float | None = None
    gpu_joules_are: str | None = None  # "measured" or "modelled"

    def scaled(self, times: float) -> "Cost":
        """Return the cost of so many such slices."""
        numbers = {k: v * times for k, v in asdict(self).items() if isinstance(v, float)}
        return Cost(**{**asdict(self), **numbers})

    def plus(self, other: "Cost") -> "Cost":
        """Return the sum; what one of them lacks is lacking."""

        def both(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        return Cost(
            self.wall_s + other.wall_s,
            self.cpu_s + other.cpu_s,
            both(self.gpu_busy_s, other.gpu_busy_s),
            both(self.gpu_joules, other.gpu_joules),
            self.gpu_joules_are if self.gpu_joules_are == other.gpu_joules_are else "modelled",
        )


def cpu_seconds() -> float:
    """Return the CPU time so far of this process and its descendants, ended or (on Linux) alive."""
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system + sum(map(_spent, _descendants(os.getpid())))


def _descendants(pid: int) -> list[int]:
    found = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listing.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _spent(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it ended meanwhile, and counts among the ended ones
        return 0.0
    return sum(int(field) for field in fields[11:15]) / TICKS_PER_S


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far, without children."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no VmHWM")


@contextmanager
def measured() -> Iterator[Callable[[], Cost]]:
    """Measure a block; what it yields returns the cost once the block is left."""
    gpu = _Gpu() if torch.cuda.is_available() else None
    if gpu is not None:
        torch.cuda.synchronize()
        gpu.start()
    cpu, started = cpu_seconds(), time.perf_counter()
    cost = Cost()
    yield lambda: cost
    if gpu is not None:
        torch.cuda.synchronize()
    cost.wall_s, cost.cpu_s = time.perf_counter() - started, cpu_seconds() - cpu
    if gpu is not None:
        cost.gpu_busy_s, cost.gpu_joules, cost.gpu_joules_are = gpu.stop(cost.wall_s)


class _Gpu:
    """Samples of the device's utilisation, and its energy counter; what NVML refuses is None, and said once."""

    _said: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml
        except ImportError:  # pip install nvidia-ml-py; without it nothing is measured and energy is modelled
            return
        try:
            pynvml.nvmlInit()
            # torch counts the devices that CUDA_VISIBLE_DEVICES names, NVML all of them
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:  # as in a container without the driver's library
            self._say("NVML", error)
            return
        self._nvml = pynvml

    def start(self) -> None:
        """Begin to sample."""
        if self._nvml is None:
            return
        self._shares: list[float] = []
        self._ended = threading.Event()
        self._joules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self, wall_s: float) -> tuple[float | None, float | None, str | None]:
        """Return busy seconds, joules, and whether these were measured or modelled."""
        if self._nvml is None:
            return None, None, None
        self._ended.set()
        self._thread.join()
        busy = wall_s * sum(self._shares) / len(self._shares) if self._shares else None
        now = self._read("nvmlDeviceGetTotalEnergyConsumption")
        if self._joules is not None and now is not None:
            return busy, (now - self._joules) / 1e3, "measured"
        limit_mw = self._read("nvmlDeviceGetEnforcedPowerLimit")
        return (busy, None, None) if limit_mw is None else (busy, limit_mw / 1e3 * wall_s, "modelled")

    def _read(self, name: str) -> Any:
        """Return what NVML says of the device, None where it refuses: many GPUs, and guests of most, refuse some."""
        try:
            return getattr(self._nvml, name)(self._handle)
        except self._nvml.NVMLError as error:
            self._say(name, error)
            return None

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            rates = self._read("nvmlDeviceGetUtilizationRates")
            if rates is None:
                return
            self._shares.append(rates.gpu / 100)

    @classmethod
    def _say(cls, name: str, error: Exception) -> None:
        if name not in cls._said:
            cls._said.add(name)
            logger.warning("%s: %s; the figures that need it are left out or modelled", name, error)
