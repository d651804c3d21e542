"""Some rows of several columns, in a given order, which is a minibatch: the definition.

Test: pytest tests/kernels/test_take_rows.py
"""

from collections.abc import Sequence

from torch import Tensor


class Columns:
    """Columns [n, ...] of one length, to take rows from again and again."""

    def __init__(self, columns: Sequence[Tensor], *, reuse: bool = False) -> None:
        del reuse  # what is allocated anew is overwritten by nobody
        self.columns = list(columns)

    def take(self, picked: Tensor) -> list[Tensor]:
        """Return the rows `picked` [B] int64 of each column."""
        return [column.index_select(0, picked) for column in self.columns]
