"""Both PPO + prior-KL losses with their gradients: every implementation that runs here, beside reference and inductor.

Two entries: `loss_and_grads` into buffers that are kept, and the differentiable loss with `.backward()`. The cells that
the kernels are judged by come first, and shapes vary slowest: a run that is stopped has whole cells.
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
FULL_SIZE = [("categorical", 1048576, 40), ("gaussian", 1048576, 4)]
REPLAYED = [("categorical", 512 * 64, 4), ("gaussian", 512 * 64, 4)]
# these compile for seconds per shape
COMPILED_ROWS, COMPILED_WIDTH = (64, 2048, 65536), {"categorical": 40, "gaussian": 4}
MOST_ELEMENTS = 2048 * 32000
# of the logits' bytes: inputs, gradients, what eager and autograd keep beside them, and the reference's
TIMES_THE_LOGITS = 10
pytestmark = [
    # torch.compile looks at .grad of tensors that are no leaves
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # inductor advises on how a GPU would be faster
    pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor"),
]


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


def skip_unless_it_fits(kind: str, impl: str, rows: int, width: int) -> None:
    """Skip what cannot run here or would take minutes, with the reason."""
    cases.require(f"ppo_kl_{kind}", impl)
    if cases.DEVICE.type == "cpu" and rows > 65536:
        pytest.skip("a million rows are for a GPU")
    if rows * width > MOST_ELEMENTS:
        pytest.skip(f"{rows} rows of {width} take minutes on a CPU, and their drawing on a GPU: 2,048 stand for them")
    free, needed = cases.free_bytes(), TIMES_THE_LOGITS * 4 * rows * width
    if free is not None and needed > free:
        pytest.skip(f"{rows} rows of {width} need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")


def skip_unless_compiled(kind: str, impl: str, rows: int, width: int) -> None:
    """Skip most of the shapes that torch.compile would compile for seconds each."""
    if impl == "inductor" and (rows not in COMPILED_ROWS or width != COMPILED_WIDTH[kind]):
        pytest.skip(f"compiles for seconds per shape: {COMPILED_WIDTH[kind]} wide and {COMPILED_ROWS} rows only")


def time_loss_and_grads(benchmark: Any, case: Loss, impl: str, **facts: Any) -> None:
    """Check against the reference, then time the entry of the trainer."""
    returned = case.loss_and_grads(case.inputs, case.coefficients, impl=impl)
    expected = case.loss_and_grads(case.inputs, case.coefficients, impl="reference")
    cases.check([*returned[0], *returned[1]], [*expected[0], *expected[1]])
    # what autograd returns would only be copied to buffers
    out = None if impl in ops.BY_AUTOGRAD else returned
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


def cells(kind: str, widths: list[int]) -> list[tuple[int, int]]:
    """Return rows and widths of a loss, without those at full size."""
    return [(rows, width) for rows in ROWS for width in widths if (kind, rows, width) not in FULL_SIZE]


entries = pytest.mark.parametrize("entry", [time_loss_and_grads, time_autograd], ids=["loss_and_grads", "autograd"])
impls = pytest.mark.parametrize("impl", list(ops.IMPLEMENTATIONS["ppo_kl_categorical"]))


@entries
@impls
@pytest.mark.parametrize(("kind", "rows", "width"), FULL_SIZE)
def test_at_full_size(benchmark, kind, rows, width, impl, entry):
    skip_unless_it_fits(kind, impl, rows, width)
    entry(benchmark, loss(kind, rows, width), impl, op=kind, shape=[rows, width], dtype="float32")


@pytest.mark.skipif(cases.DEVICE.type == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize(("kind", "rows", "width"), REPLAYED)
def test_by_graph_replay(benchmark, kind, rows, width, impl):
    skip_unless_it_fits(kind, impl, rows, width)
    case = loss(kind, rows, width)
    out = case.loss_and_grads(case.inputs, case.coefficients, impl=impl)
    graph = cases.captured(lambda: case.loss_and_grads(case.inputs, case.coefficients, impl=impl, out=out))
    for written in (*out[0], *out[1]):
        written.fill_(torch.nan)
    graph.replay()
    expected = case.loss_and_grads(case.inputs, case.coefficients, impl="reference")
    cases.check([*out[0], *out[1]], [*expected[0], *expected[1]])
    facts = {"op": kind, "impl": impl, "entry": "graph replay", "shape": [rows, width], "dtype": "float32"}
    cases.run(benchmark, graph.replay, case.least_bytes(), **facts)


@entries
@impls
@pytest.mark.parametrize(("rows", "actions"), cells("categorical", ACTIONS))
def test_ppo_kl_categorical(benchmark, rows, actions, impl, entry):
    skip_unless_it_fits("categorical", impl, rows, actions)
    skip_unless_compiled("categorical", impl, rows, actions)
    case = loss("categorical", rows, actions)
    entry(benchmark, case, impl, op="categorical", shape=[rows, actions], dtype="float32")


@entries
@impls
@pytest.mark.parametrize(("rows", "dims"), cells("gaussian", DIMS))
def test_ppo_kl_gaussian(benchmark, rows, dims, impl, entry):
    skip_unless_it_fits("gaussian", impl, rows, dims)
    skip_unless_compiled("gaussian", impl, rows, dims)
    entry(benchmark, loss("gaussian", rows, dims), impl, op="gaussian", shape=[rows, dims], dtype="float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("impl", [name for name in ops.IMPLEMENTATIONS["ppo_kl_categorical"] if name != "inductor"])
def test_ppo_kl_categorical_in_half_types(benchmark, impl, dtype):
    skip_unless_it_fits("categorical", impl, 2048, 40)
    case = loss("categorical", 2048, 40)
    x = cases.categorical(2048, 40, dtype)
    case = case._replace(inputs=x, read=tuple(t for t in x if t is not None))
    name = str(dtype).removeprefix("torch.")
    time_loss_and_grads(benchmark, case, impl, op="categorical", shape=[2048, 40], dtype=name)
