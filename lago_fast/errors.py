"""Typed errors of the package: each names the argument at fault and the remedy in its message."""

from typing import Any


class LagoError(Exception):
    """Base of every error that this package raises on purpose."""


class UnknownTask(LagoError, ValueError):
    """A task name that no environment family knows; the message lists the nearest names."""


class DemonstrationError(LagoError, ValueError):
    """A dataset that is empty, corrupt, or recorded for other spaces."""


class PriorMismatch(LagoError, ValueError):
    """A prior fitted for another observation space, action space or set of instructions."""


class EncoderMismatch(LagoError, ValueError):
    """A text encoder other than the one whose vectors a model was trained on."""


class TrainablePrior(LagoError, ValueError):
    """A prior with a parameter that requires a gradient: stage 2 needs it frozen."""


class HashMismatch(LagoError, ValueError):
    """A file whose SHA-256 is not the one that was recorded for it."""


class BackboneUnavailable(LagoError, OSError):
    """A pretrained model that neither the hub nor this machine can provide."""


class NonFiniteError(LagoError, ValueError):
    """NaN or infinity in observations, rewards, losses or a prior's answer.

    Args:
        message: says which, and what to do.
        rows: tensors to be kept for inspection, by name; None: those of the rollout.
    """

    def __init__(self, message: str, rows: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.rows = rows


class NonFiniteLoss(NonFiniteError):
    """A loss or gradient that became NaN or infinite.

    Args:
        message: says which, and what to do.
        gradient_step: the first one of the update that was; None: none of the rollout's rows is to blame.
        rows: as of NonFiniteError.
    """

    def __init__(self, message: str, gradient_step: int | None, rows: dict[str, Any] | None = None) -> None:
        super().__init__(message, rows)
        self.gradient_step = gradient_step


class EnvironmentFailed(LagoError, RuntimeError):
    """An environment's process that died or does not answer."""


class RunExists(LagoError, FileExistsError):
    """An output folder that already holds results; nothing is overwritten unasked."""


class DeviceUnavailable(LagoError, RuntimeError):
    """A device that was asked for by name and is not there."""


class ImplUnavailable(LagoError, RuntimeError):
    """An implementation that was asked for by name and cannot run here."""


class UnsupportedArgument(LagoError, ValueError):
    """An argument value that cannot be honoured; it is refused, never ignored."""


class MissingExtra(LagoError, ImportError):
    """An optional dependency that is not installed; the message names the extra that brings it."""


class CacheMismatch(LagoError, ValueError):
    """A cache file written for another prior, row format or resolution."""


class CacheCorrupt(LagoError, ValueError):
    """A cache file that was truncated or altered, or is none."""


class CacheFull(LagoError, OSError):
    """A cache file that cannot grow; what was committed before stays readable."""


class UntrustedPickle(LagoError, ValueError):
    """A pickled entry of a model file that names something outside of the written list; nothing of it was run."""


class CorruptFile(LagoError, ValueError):
    """A file that is truncated, altered, or larger than what it can honestly hold."""


class NotSaved(LagoError, OSError):
    """A file that could not be written, on a full disk for one; what stood in its place stands."""


class NoCheckpoint(LagoError, FileNotFoundError):
    """A place that holds no whole checkpoint."""


class QuantizedTooFar(LagoError, ValueError):
    """A quantized prior whose answers are further from the exact prior's than is allowed, or were not compared."""


class InsufficientMemory(LagoError, MemoryError):
    """A fit that cannot go into the memory of its device; refused before it starts."""


class SceneUnsampled(LagoError, RuntimeError):
    """A scene that no draw satisfies: what is asked of it is too much for the table."""


def check_whole(least: int, **counts: object) -> None:
    """Raise UnsupportedArgument unless each count is an integer, Python's or numpy's, of at least `least`."""
    for name, count in counts.items():
        if not _is_whole(count) or count < least:  # type: ignore[operator]  # which whole numbers know
            raise UnsupportedArgument(f"{name}={count!r}: give a whole number, {least} or more")


def check_seed(name: str, seed: int, bits: int = 63) -> None:
    """Raise UnsupportedArgument unless a seed is one that generators take: of so many bits, and not negative."""
    if not _is_whole(seed) or not 0 <= seed < 2**bits:
        raise UnsupportedArgument(f"{name}={seed}: give an integer from 0 to 2**{bits} - 1")


def _is_whole(number: object) -> bool:
    # True has an index too, and is no number that anybody means
    return hasattr(number, "__index__") and not isinstance(number, bool)
