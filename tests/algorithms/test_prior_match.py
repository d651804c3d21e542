"""A quantized prior is taken within its bound, and found behind a student and a cache too."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from lago_fast.algorithms.prior_match import check_quantization
from lago_fast.errors import QuantizedTooFar


def prior(kl: float, bound: float = 0.05, quantization: str = "nf4") -> Any:
    return SimpleNamespace(quantization=quantization, quantization_kl_nats=kl, max_quantization_kl=bound)


def behind(inner: Any) -> list[Any]:
    return [inner, SimpleNamespace(exact=inner), SimpleNamespace(inner=inner), SimpleNamespace(exact=None, inner=inner)]


@pytest.mark.parametrize("taken", [prior(0.05), prior(0.2, bound=0.2), prior(math.nan, bound=math.inf)])
def test_within_its_bound_it_is_taken(taken):
    for asked in behind(taken):
        check_quantization(asked)


def test_an_exact_prior_is_taken():
    for asked in [*behind(prior(math.nan, quantization="none")), SimpleNamespace()]:
        check_quantization(asked)


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (prior(0.051), r"nf4, its KL from the exact prior is 0\.051 nats .* at most 0\.05 .* max_quantization_kl"),
        (prior(0.3, bound=0.2), r"at most 0\.2"),
        (prior(math.nan), "was never measured"),
    ],
)
def test_beyond_its_bound_it_is_refused(refused, says):
    for asked in behind(refused):
        with pytest.raises(QuantizedTooFar, match=says):
            check_quantization(asked)
