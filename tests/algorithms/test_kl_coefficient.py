"""Schedules and the steering of the "auto" coefficient, by hand."""

import pytest

from lago_fast.algorithms.kl_coefficient import AUTO_MAX, AUTO_MIN, AUTO_START, KLCoefficient, LinearSchedule
from lago_fast.errors import UnsupportedArgument


def test_linear_schedule():
    schedule = LinearSchedule(0.4, 0.1, until=0.5)
    assert [schedule(p) for p in (1.0, 0.75, 0.5, 0.0)] == pytest.approx([0.4, 0.25, 0.1, 0.1])
    with pytest.raises(UnsupportedArgument, match="until"):
        LinearSchedule(0.4, until=0.0)


def test_number_and_schedule():
    assert KLCoefficient(0.3, None).value(0.5) == 0.3
    assert KLCoefficient(LinearSchedule(1.0), None).value(0.25) == pytest.approx(0.25)


def test_auto_grows_shrinks_rests_and_is_clamped():
    coefficient = KLCoefficient("auto", 1.0)
    coefficient.observe(1.2)  # within a factor of 1.5
    assert coefficient.value(1.0) == AUTO_START
    coefficient.observe(1.6)
    assert coefficient.value(1.0) == pytest.approx(1.5 * AUTO_START)
    coefficient.observe(0.6)
    assert coefficient.value(1.0) == pytest.approx(AUTO_START)
    for _ in range(50):
        coefficient.observe(100.0)
    assert coefficient.value(1.0) == AUTO_MAX
    for _ in range(50):
        coefficient.observe(0.0)
    assert coefficient.value(1.0) == AUTO_MIN
