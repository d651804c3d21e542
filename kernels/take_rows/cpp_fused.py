"""Some rows of several columns in one native call, on CPU tensors.

Native side: csrc/ops/take_rows.cc. Test: pytest tests/kernels/test_take_rows.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lago_fast import _C


class Columns:
    """Columns [n, ...] of one length, to take rows from again and again.

    Args:
        columns: contiguous, on the CPU.
        reuse: let a call return the tensors of the last one of as many rows, overwritten; for one thread.

    Raises:
        ValueError: a column that is not contiguous on the CPU, or of another length.
    """

    def __init__(self, columns: Sequence[Tensor], *, reuse: bool = False) -> None:
        self._reuse = reuse
        self.columns = list(columns)  # alive as long as their addresses are used
        self._length = len(columns[0])
        for column in columns:
            if not (column.is_cpu and column.is_contiguous()) or len(column) != self._length:
                raise ValueError(
                    f"columns: expected contiguous CPU tensors of {self._length} rows, got {list(column.shape)} "
                    f"with strides {column.stride()} on {column.device}; use impl='reference'"
                )
        self._last: tuple[int, list[Tensor], list[tuple[int, int, int]]] = (-1, [], [])  # rows, tensors, places

    def take(self, picked: Tensor) -> list[Tensor]:
        """Return the rows `picked` [B] int64 of each column.

        Raises ValueError where `picked` is not such, or names a row that is not there.
        """
        if picked.dtype is not torch.int64 or picked.dim() != 1 or not (picked.is_cpu and picked.is_contiguous()):
            raise ValueError(f"picked: expected contiguous int64 [B] on the CPU, got {picked.dtype} {picked.shape}")
        rows = len(picked)
        last_rows, taken, places = self._last
        if not self._reuse or last_rows != rows:
            taken = [
                torch.empty((rows, *column.shape[1:]), dtype=column.dtype, device="cpu") for column in self.columns
            ]
            places = [  # from, to, bytes of a row
                (column.data_ptr(), own.data_ptr(), column.element_size() * column.shape[1:].numel())
                for column, own in zip(self.columns, taken, strict=True)
            ]
            if self._reuse:
                self._last = rows, taken, places
        _C.take_rows(places, picked.data_ptr(), rows, self._length)
        return taken
