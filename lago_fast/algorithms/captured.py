"""A gradient step in static memory: on a GPU one CUDA graph, replayed for every full minibatch.

A small network's step is bound there by the launches of its many kernels; a graph launches all of them at once. What
changes between steps (rows, coefficients, the learning rate) is written in place, so that schedules are followed.
Elsewhere the step is computed as any other, which only tests have use for.
Test: pytest tests/algorithms/test_captured.py
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lago_fast import ops
from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.algorithms.heads import CategoricalHead, GaussianHead, Head, TextHead
from lago_fast.buffers import RolloutBuffer
from lago_fast.capture import capturing
from lago_fast.errors import UnsupportedArgument

logger = logging.getLogger(__name__)
WARM_UP_STEPS = 3  # before a capture: libraries allocate their workspaces in the first ones


class _Held(NamedTuple):
    """What a graph has the addresses of, and what it was made for."""

    columns: list[Tensor]  # [T * N, ...] each
    taken: ops.Columns  # of which a step takes its rows
    rows: Tensor  # [B] int64
    coefficients: dict[str, Tensor | None]  # 0-D each
    lr: Tensor  # 0-D
    statistics: Tensor  # [7]
    block: ops.AdamBlock
    form: tuple[Any, ...]


class CapturedStep:
    """Loss, gradients and a step of Adam for minibatches of one size, as one graph where there is CUDA.

    The first steps after a change of what a graph holds are taken one kernel at a time, and are steps like any other.

    Args:
        head: whose policy learns; its optimiser is a `FlatAdam`.
        take_rows: implementation of the op `take_rows`.

    Raises:
        UnsupportedArgument: a policy or an optimiser whose step may wait for the host.
    """

    def __init__(self, head: Head, take_rows: str = "auto") -> None:
        if not isinstance(head, GaussianHead | CategoricalHead) or isinstance(head, TextHead):
            raise UnsupportedArgument(
                f"cuda_graph: the step of a {type(head.policy).__name__} on these actions may wait for the host; "
                "pass cuda_graph=False"
            )
        if not isinstance(head.policy.optimizer, FlatAdam):
            raise UnsupportedArgument(
                f"cuda_graph: {type(head.policy.optimizer).__name__} may wait for the host; leave optimizer_class and "
                "optimizer_kwargs out of policy_kwargs, or pass cuda_graph=False"
            )
        self.head, self.take_rows = head, take_rows
        self.fits = True  # into the GPU's memory
        self.warmed = 0  # steps taken one kernel at a time, of those that a capture waits for
        self._buffer: RolloutBuffer | None = None  # whose rows the steps are taken on
        self._held: _Held | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(
        self,
        buffer: RolloutBuffer,
        coefficients: dict[str, float | None],
        batch_size: int,
        max_grad_norm: float,
        options: dict[str, Any],
    ) -> None:
        """Take over an update's rows, its numbers and the optimiser's learning rate; drop a graph that does not fit.

        Args:
            buffer: whose columns are copied.
            coefficients: of the head's loss op.
            batch_size: B, rows of a step.
            max_grad_norm: of all gradients together.
            options: of the head's loss op.
        """
        if not self.fits:
            return
        optimizer = self.head.policy.optimizer
        assert isinstance(optimizer, FlatAdam)
        (group,), block, columns = optimizer.param_groups, optimizer.gather(), buffer.columns()
        self._buffer, self._max_grad_norm, self._options = buffer, max_grad_norm, options
        form = (
            *((column.shape, column.dtype) for column in columns),
            *(name for name, value in coefficients.items() if value is None),
            *(batch_size, max_grad_norm, *group["betas"], group["eps"], *options.items()),
        )
        held = self._held
        if held is None or held.block is not block or held.form != form:
            device = block.parameter.device
            held = self._held = self._graph = None  # whose memory the new one may need
            try:
                own_columns = [torch.empty_like(column) for column in columns]
            except torch.OutOfMemoryError:
                self._give_up()
                return
            held = self._held = _Held(
                own_columns,
                ops.columns(own_columns, reuse=True, impl=self.take_rows),
                torch.zeros(batch_size, dtype=torch.int64, device=device),
                ops.coefficients_on(device, **coefficients),
                torch.zeros((), device=device),
                torch.zeros(len(ops.GaussianOutputs._fields), device=device),
                block,
                form,
            )
            self.warmed = 0
        for own, column in zip(held.columns, columns, strict=True):
            own.copy_(column)
        for name, place in held.coefficients.items():
            if place is not None and (value := coefficients[name]) is not None:
                place.fill_(value)
        held.lr.fill_(group["lr"])

    def take(self, rows: Tensor) -> Tensor | None:
        """Take one step on `rows` [B] int64 of the buffer's columns; return the loss op's statistics [7].

        None, and nothing is done: there are fewer than B rows, or the memory does not suffice.

        Raises:
            UnsupportedArgument: something in the policy's step waits for the host.
        """
        held = self._held
        if held is None or len(rows) != len(held.rows):
            return None
        held.rows.copy_(rows)
        try:
            self._run(held)
        except torch.OutOfMemoryError:
            self._give_up()
            return None
        return held.statistics.clone()

    def _give_up(self) -> None:
        logger.warning("out of GPU memory for captured gradient steps: going on without a graph")
        self.fits, self._graph, self._held, self._buffer = False, None, None, None

    def _run(self, held: _Held) -> None:
        if held.rows.device.type != "cuda":
            self._step(held)
            return
        with torch.cuda.device_of(held.rows):  # streams and graphs are those of the current device
            self._run_on_gpu(held)

    def _run_on_gpu(self, held: _Held) -> None:
        if self._graph is None and self.warmed < WARM_UP_STEPS:
            self.warmed += 1
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            try:
                with torch.cuda.stream(aside):
                    self._step(held)
            finally:
                here.wait_stream(aside)  # also where the memory did not suffice: the step is taken again, here
            return
        if self._graph is None:
            self._graph = self._captured(held)
        self._graph.replay()

    def _captured(self, held: _Held) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, held.rows.device):
                self._step(held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedArgument(
                f"cuda_graph: a step of {type(self.head.policy).__name__} cannot be captured, something in it waits "
                f"for the host ({error}); pass cuda_graph=False"
            ) from error
        return graph

    def _step(self, held: _Held) -> None:
        optimizer = self.head.policy.optimizer
        assert isinstance(optimizer, FlatAdam)
        assert self._buffer is not None
        batch = self._buffer.as_batch(held.taken.take(held.rows))
        outputs, values = self.head.evaluate(batch)
        row, grads = self.head.loss_and_grads(outputs, values, batch, held.coefficients, **self._options)
        torch.stack(row, out=held.statistics)
        optimizer.zero_grad()
        self.head.backward(outputs, values, tuple(grads))
        optimizer.clipped_step(self._max_grad_norm, held.lr)
