"""The door: which implementation is chosen, and how a wrong choice is refused."""

import pytest
import torch

from lago_fast import ops
from lago_fast.errors import ImplUnavailable


@pytest.mark.parametrize("op", list(ops.IMPLEMENTATIONS))
def test_auto_takes_the_first_that_runs_on_the_device(op):
    name, module = ops.resolve(op, "cpu")
    assert name == next(iter(ops.IMPLEMENTATIONS[op]))
    assert module.__name__.startswith(f"lago_fast.kernels.{op}")


@pytest.mark.parametrize("op", list(ops.IMPLEMENTATIONS))
def test_an_explicit_name_never_falls_back(op):
    for name in ("inductor", "cuda"):
        if name not in ops.IMPLEMENTATIONS[op]:
            with pytest.raises(ImplUnavailable, match=f"impl='{name}'.*{op}"):
                ops.resolve(op, "cpu", name)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ImplUnavailable, match="reference"):
        ops.resolve("gae", "cpu", "fast")


def test_native_code_refuses_another_device():
    with pytest.raises(ImplUnavailable, match="not on cuda"):
        ops.resolve("gae", "cuda", "cpp")


def test_coefficients_are_0d_tensors():
    made = ops.coefficients_on(torch.device("cpu"), clip_range=0.2, clip_range_vf=None)
    assert made["clip_range_vf"] is None
    assert made["clip_range"].shape == ()
    assert made["clip_range"].dtype == torch.float32
