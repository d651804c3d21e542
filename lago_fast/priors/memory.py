"""States with the exact prior's answers to them: a bounded store, the oldest rows overwritten first.

Test: pytest tests/priors/test_amortised.py
"""

import torch
from torch import Tensor

from lago_fast.priors.base import PriorOutput


class Memory:
    """At most `capacity` rows of (state [S], instruction id, answer).

    Args:
        capacity: rows that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows = 0
        self.state = self.ids = torch.empty(0)
        self.answer = PriorOutput()
        self._next = 0

    def add(self, state: Tensor, ids: Tensor, answer: PriorOutput) -> None:
        """Keep rows [B, S], [B] and their answers; of more than `capacity` the last."""
        state, ids = state[-self.capacity :].clone(), ids[-self.capacity :].clone()
        kept = PriorOutput(*(None if column is None else column[-self.capacity :].clone() for column in answer))
        kept = kept._replace(latent=None)
        if not self.rows:
            self.state, self.ids = _rows(self.capacity, state), _rows(self.capacity, ids)
            self.answer = PriorOutput(*(None if c is None else _rows(self.capacity, c) for c in kept))
        place = (self._next + torch.arange(len(state), device=state.device)) % self.capacity
        self.state[place], self.ids[place] = state, ids
        for column, fresh in zip(self.answer, kept, strict=True):
            if column is not None and fresh is not None:
                column[place] = fresh
        self._next = (self._next + len(state)) % self.capacity
        self.rows = min(self.rows + len(state), self.capacity)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor, PriorOutput]:
        """Return the rows at `index`."""
        return self.state[index], self.ids[index], pick_rows(self.answer, index)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, PriorOutput]:
        """Return `count` rows drawn with replacement."""
        return self.take(torch.randint(self.rows, (count,), generator=generator).to(self.state.device))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the kept rows, oldest first, under names that start with `prefix`; {} of none."""
        if not self.rows:
            return {}
        start = self._next if self.rows == self.capacity else 0
        order = (start + torch.arange(self.rows, device=self.state.device)) % self.capacity
        state, ids, answer = self.take(order)
        found = {f"{prefix}.{name}": column for name, column in answer._asdict().items() if column is not None}
        return {f"{prefix}.state": state, f"{prefix}.ids": ids, **found}

    def restore(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        """Take back the rows that `tensors` wrote."""
        if f"{prefix}.state" not in tensors:
            return
        answer = PriorOutput(**{n: tensors.get(f"{prefix}.{n}") for n in ("log_probs", "mean", "log_std", "trust")})
        self.add(tensors[f"{prefix}.state"], tensors[f"{prefix}.ids"], answer)

    @property
    def place(self) -> int:
        """Return where the next row goes."""
        return self._next

    def raw(self, prefix: str) -> dict[str, Tensor]:
        """Return the kept rows as they lie, under names that start with `prefix`; with `place` they are all of it."""
        if not self.rows:
            return {}
        columns = {"state": self.state, "ids": self.ids, **self.answer._asdict()}
        return {f"{prefix}.{name}": column[: self.rows] for name, column in columns.items() if column is not None}

    @classmethod
    def from_raw(
        cls, prefix: str, tensors: dict[str, Tensor], capacity: int, place: int, device: torch.device
    ) -> "Memory":
        """Return the memory that `raw` and `place` tell of, on a device."""
        memory = cls(capacity)
        memory.restore(prefix, {name: tensor.to(device) for name, tensor in tensors.items()})
        memory._next = place
        return memory


def pick_rows(answer: PriorOutput, index: Tensor) -> PriorOutput:
    """Return the rows of an answer at `index`."""
    return PriorOutput(*(None if column is None else column[index] for column in answer))


def _rows(capacity: int, like: Tensor) -> Tensor:
    return torch.zeros((capacity, *like.shape[1:]), dtype=like.dtype, device=like.device)
