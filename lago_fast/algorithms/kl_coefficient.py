"""The weight of the KL to the prior over training: constant, scheduled, or steered to a target.

Test: pytest tests/algorithms/test_kl_coefficient.py
"""

import math
from collections.abc import Callable

from lago_fast.errors import UnsupportedArgument

Schedule = Callable[[float], float]  # progress remaining, 1 to 0 -> value

AUTO_START, AUTO_FACTOR, AUTO_MIN, AUTO_MAX = 0.1, 1.5, 1e-4, 10.0


class LinearSchedule:
    """From `start` to `end`, linear in the steps taken, reaching `end` when `until` of the budget is spent.

    Args:
        start, end: values at the beginning and at the end.
        until: share of the budget, in (0, 1].
    """

    def __init__(self, start: float, end: float = 0.0, until: float = 1.0) -> None:
        if not 0 < until <= 1:
            raise UnsupportedArgument(f"until={until}: give a share of the budget in (0, 1]")
        self.start, self.end, self.until = start, end, until

    def __call__(self, progress_remaining: float) -> float:
        spent = min((1 - progress_remaining) / self.until, 1.0)
        return self.start + spent * (self.end - self.start)

    def __repr__(self) -> str:
        return f"LinearSchedule({self.start}, {self.end}, until={self.until})"


class KLCoefficient:
    """What `kl_coef` means at each moment of training.

    Args:
        kl_coef: a number >= 0, a schedule, or "auto".
        target_prior_kl: nats; needed by "auto" and refused with anything else.
        auto: where "auto" starts.

    Raises:
        UnsupportedArgument: the two do not fit together, or a value is out of range.
    """

    def __init__(
        self, kl_coef: float | Schedule | str, target_prior_kl: float | None, auto: float = AUTO_START
    ) -> None:
        if isinstance(kl_coef, str) and kl_coef != "auto":
            raise UnsupportedArgument(f"kl_coef={kl_coef!r}: give a number, a schedule or 'auto'")
        if (kl_coef == "auto") != (target_prior_kl is not None):
            raise UnsupportedArgument("target_prior_kl: kl_coef='auto' needs it (in nats) and nothing else takes it")
        if target_prior_kl is not None and not 0 < target_prior_kl < math.inf:
            raise UnsupportedArgument(f"target_prior_kl={target_prior_kl}: give nats above 0")
        if isinstance(kl_coef, int | float):
            _check(kl_coef)
        self._kl_coef, self._target = kl_coef, target_prior_kl
        self._auto = auto

    def value(self, progress_remaining: float) -> float:
        """Return the coefficient now.

        Raises:
            UnsupportedArgument: the schedule returned no number >= 0.
        """
        if isinstance(self._kl_coef, str):
            return self._auto
        return _check(self._kl_coef(progress_remaining) if callable(self._kl_coef) else self._kl_coef)

    def observe(self, prior_kl: float) -> float:
        """Move the "auto" coefficient after a rollout whose mean `prior_kl` (nats) was this; return it."""
        if self._target is None:
            return self._auto
        if prior_kl > AUTO_FACTOR * self._target:
            self._auto = min(self._auto * AUTO_FACTOR, AUTO_MAX)
        elif prior_kl < self._target / AUTO_FACTOR:
            self._auto = max(self._auto / AUTO_FACTOR, AUTO_MIN)
        return self._auto


def _check(coefficient: float) -> float:
    if not 0 <= coefficient < math.inf:
        raise UnsupportedArgument(f"kl_coef={coefficient}: give a number >= 0, or a schedule that returns such")
    return float(coefficient)
