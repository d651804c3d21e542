"""Work that does not fit into the GPU's memory is done in parts, to the same result.

Of a minibatch the loss op always sees the whole, for its inputs are small: its means divide by the count of all valid
rows, and the advantages are normalised over all. Only the network runs in parts: once without gradients for the op's
inputs, and once more, part by part, with the op's gradients. Dropout or batch norm in a policy would see the parts.
Test: pytest tests/algorithms/test_micro_batches.py
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lago_fast.algorithms.heads import Head, differentiate
from lago_fast.buffers import Observations, RolloutBatch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Halving:
    """How many rows are worked on at once: all, until the memory does not suffice; then half as many, for good.

    Args:
        what: the work, as the log names it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.rows: int | None = None  # at once; None: all

    def __call__(self, work: Callable[[int], Result], total: int) -> Result:
        """Return what `work` makes of `total` rows; it is called with the number of rows to take at once.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        while True:
            at_once = min(self.rows or total, total)
            try:
                return work(at_once)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
            # outside of the handler, which still holds the tensors of the failed attempt
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.rows is None:
                logger.warning("out of GPU memory in %s of %d rows: going on with parts of it", self.what, total)
            self.rows = (at_once + 1) // 2


class MicroBatches:
    """The network's two passes over a minibatch, in as many parts as the memory asks for."""

    def __init__(self) -> None:
        self.halving = Halving("a minibatch")
        self._whole: tuple[tuple[Tensor, ...], Tensor] | None = (
            None  # of `evaluate`; kept here alone, so that it can go
        )

    def evaluate(self, head: Head, batch: RolloutBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what the loss op differentiates by, and values [B], without gradients."""

        def work(at_once: int) -> tuple[tuple[Tensor, ...], Tensor]:
            if at_once == len(batch.weight):
                outputs, values = self._whole = head.evaluate(batch)
                return tuple(output.detach() for output in outputs), values.detach()
            if head.networks is not None:
                head.networks.leave_to_modules()  # whose gradients add up over parts
            with torch.no_grad():
                parts = [head.evaluate(part) for _, part in _parts(batch, at_once)]
            columns = zip(*(outputs for outputs, _ in parts), strict=True)
            return tuple(_joined(column) for column in columns), torch.cat([values for _, values in parts])

        self._whole = None
        return self.halving(work, len(batch.weight))

    def backward(self, head: Head, batch: RolloutBatch, grads: tuple[Tensor, ...]) -> None:
        """Make the parameters' gradients those of `grads`, given for what `evaluate` returned."""

        def work(at_once: int) -> None:
            whole, self._whole = self._whole, None
            head.policy.optimizer.zero_grad()
            if whole is not None:
                head.backward(*whole, grads)
                return
            if head.networks is not None:
                head.networks.leave_to_modules()
            for rows, part in _parts(batch, at_once):
                outputs, values = head.evaluate(part)
                pairs = [
                    (output, grad if isinstance(output, nn.Parameter) else grad[rows])
                    for output, grad in zip((*outputs, values), grads, strict=True)
                    # a parameter, as the log std is one, has its whole gradient once
                    if not isinstance(output, nn.Parameter) or rows.start == 0
                ]
                differentiate(*zip(*pairs, strict=True))

        self.halving(work, len(batch.weight))


def _parts(batch: RolloutBatch, at_once: int) -> Iterator[tuple[slice, RolloutBatch]]:
    for start in range(0, len(batch.weight), at_once):
        rows = slice(start, start + at_once)
        columns: dict[str, Any] = {n: c[rows] for n, c in batch._asdict().items() if isinstance(c, Tensor)}
        columns["observations"] = _rows(batch.observations, rows)
        yield rows, RolloutBatch(**columns, prior=tuple(column[rows] for column in batch.prior))


def _rows(observations: Observations, rows: slice) -> Observations:
    if isinstance(observations, dict):
        return {key: column[rows] for key, column in observations.items()}
    return observations[rows]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Return one output of all rows; a parameter is the same in every part."""
    return parts[0].detach() if isinstance(parts[0], nn.Parameter) else torch.cat(parts)
