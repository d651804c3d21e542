"""Both PPO + prior-KL losses with their gradients: every implementation that runs here, beside reference and inductor.

Two entries: `loss_and_grads` into buffers that are kept, and the differentiable loss with `.backward()`.
Run: pytest bench/bench_ppo_kl.py --benchmark-only
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import cases
from lago_fast import ops

ROWS = [64, 2048, 32768, 65536, 1048576]
ACTIONS = [4, 40, 32000]
DIMS = [4, 17]
# these compile for seconds per shape
COMPILED_ROWS, COMPILED_ACTIONS, COMPILED_DIMS = (64, 2048, 65536), 40, 4
MOST_ELEMENTS_CPU = 2048 * 32000
# torch.compile looks at .grad of tensors that are no leaves
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Loss(NamedTuple):
    """One loss with its inputs, its two entries, and the bytes that it cannot avoid."""

    inputs: Any
    coefficients: Any
    differentiable: Any
    loss_and_grads: Any
    differentiated: tuple[str, ...]
    read: tuple[Tensor, ...]

    def least_bytes(self) -> int:
        written = [getattr(self.inputs, name) for name in self.differentiated]
        return cases.bytes_of(self.read) + cases.bytes_of(written)


def loss(kind: str, rows: int, width: int) -> Loss:
    """Build the loss for a batch of `rows` and `width` actions or dimensions."""
    if kind == "categorical":
        x: Any = cases.categorical(rows, width)
        parts = (ops.CategoricalCoefficients, ops.ppo_kl_categorical, ops.ppo_kl_categorical_loss_and_grads)
        names: tuple[str, ...] = ("logits", "values")
    else:
        x = cases.gaussian(rows, width)
        parts = (ops.GaussianCoefficients, ops.ppo_kl_gaussian, ops.ppo_kl_gaussian_loss_and_grads)
        names = ("mean", "log_std", "values")
    # without value clipping the old values are not read
    read = tuple(t for name, t in x._asdict().items() if t is not None and name != "old_values")
    return Loss(x, cases.coefficients(parts[0]), parts[1], parts[2], names, read)


def skip_unless_it_fits(op: str, impl: str, rows: int, width: int, compiled_width: int) -> None:
    """Skip what cannot run here or would take minutes, with the reason."""
    cases.require(op, impl)
    on_cpu = cases.DEVICE.type == "cpu"
    if on_cpu and rows > 65536:
        pytest.skip("a million rows are for a GPU")
    if on_cpu and rows * width > MOST_ELEMENTS_CPU:
        pytest.skip(f"{rows} rows of {width} actions take minutes on a CPU")
    if impl == "inductor" and (rows not in COMPILED_ROWS or width != compiled_width):
        pytest.skip(f"compiles for seconds per shape: {compiled_width} wide and {COMPILED_ROWS} rows only")


def time_loss_and_grads(benchmark: Any, case: Loss, impl: str, **facts: Any) -> None:
    """Check against the reference, then time the entry of the trainer."""
    outputs, out = case.loss_and_grads(case.inputs, case.coefficients, impl=impl)
    expected = case.loss_and_grads(case.inputs, case.coefficients, impl="reference")
    cases.check([*outputs, *out], [*expected[0], *expected[1]])
    cases.run(
        benchmark,
        lambda: case.loss_and_grads(case.inputs, case.coefficients, impl=impl, out=out),
        case.least_bytes(),
        impl=impl,
        entry="loss_and_grads",
        **facts,
    )


def time_autograd(benchmark: Any, case: Loss, impl: str, **facts: Any) -> None:
    """Check against the reference, then time the loss and its backward, whose gradients land in leaves."""
    leaves = [getattr(case.inputs, name).clone().requires_grad_() for name in case.differentiated]
    inputs = case.inputs._replace(**dict(zip(case.differentiated, leaves, strict=True)))

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        case.differentiable(inputs, case.coefficients, impl=impl).loss.backward()

    step()
    expected = case.loss_and_grads(case.inputs, case.coefficients, impl="reference")[1]
    cases.check([leaf.grad for leaf in leaves], expected)
    cases.run(benchmark, step, case.least_bytes(), impl=impl, entry="autograd", **facts)


@pytest.mark.parametrize("entry", [time_loss_and_grads, time_autograd], ids=["loss_and_grads", "autograd"])
@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["ppo_kl_categorical"]))
def test_ppo_kl_categorical(benchmark, impl, rows, actions, entry):
    skip_unless_it_fits("ppo_kl_categorical", impl, rows, actions, COMPILED_ACTIONS)
    entry(benchmark, loss("categorical", rows, actions), impl, shape=[rows, actions], dtype="float32")


@pytest.mark.parametrize("entry", [time_loss_and_grads, time_autograd], ids=["loss_and_grads", "autograd"])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["ppo_kl_gaussian"]))
def test_ppo_kl_gaussian(benchmark, impl, rows, dims, entry):
    skip_unless_it_fits("ppo_kl_gaussian", impl, rows, dims, COMPILED_DIMS)
    entry(benchmark, loss("gaussian", rows, dims), impl, shape=[rows, dims], dtype="float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("impl", [name for name in ops.IMPLEMENTATIONS["ppo_kl_categorical"] if name != "inductor"])
def test_ppo_kl_categorical_in_half_types(benchmark, impl, dtype):
    skip_unless_it_fits("ppo_kl_categorical", impl, 2048, 40, COMPILED_ACTIONS)
    case = loss("categorical", 2048, 40)
    x = cases.categorical(2048, 40, dtype)
    case = case._replace(inputs=x, read=tuple(t for t in x if t is not None))
    name = str(dtype).removeprefix("torch.")
    time_loss_and_grads(benchmark, case, impl, shape=[2048, 40], dtype=name)
