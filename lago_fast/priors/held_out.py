"""Which units of demonstrations are held out: chosen once, and kept out of every later fit too.

A student that is fitted again goes on from its weights, so what an earlier fit taught measures nothing any more.
Test: pytest tests/priors/test_held_out.py
"""

from collections.abc import Mapping

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lago_fast.errors import DemonstrationError
from lago_fast.priors.rows import whole_numbers


class HeldOut:
    """The units that all fits so far have taught and held out, by their ids.

    Attributes:
        held: [h] int64.
        taught: [t] int64.
    """

    def __init__(self) -> None:
        self.held, self.taught = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)

    def split(self, episode_id: ArrayLike | None, rows: int, fraction: float, generator: torch.Generator) -> Tensor:
        """Return which rows are held out [n] bool, on the CPU, whole units each, and remember the choice.

        Args:
            episode_id: [n] integers, the units; an id names the same one in every call. None: rows, by their numbers.
            rows: n.
            fraction: share of the units not seen before that is held out.
            generator: of the draw.

        Raises DemonstrationError for fewer than two units, or when earlier fits leave nothing to hold out or to teach.
        """
        unit = torch.arange(rows) if episode_id is None else whole_numbers("episode_id", episode_id).cpu()
        units = unit.unique()
        if len(unit) != rows or len(units) < 2:
            raise DemonstrationError("episode_id: needs one entry per row and at least 2 episodes")
        known = units[torch.isin(units, self.held)]
        fresh = units[~torch.isin(units, torch.cat([self.held, self.taught]))]
        count = max(0 if len(known) else 1, round(fraction * len(fresh)))
        # something is left to teach, and no more is drawn than there is
        count = max(0, min(count, len(fresh), len(units) - len(known) - 1))
        drawn = fresh[torch.randperm(len(fresh), generator=generator)[:count]]
        out = torch.isin(units, torch.cat([known, drawn]))
        if not out.any() or out.all():
            before, verb = ("taught", "hold out") if not out.any() else ("held out", "teach")
            raise DemonstrationError(
                f"episode_id: earlier fits of this student {before} all {len(units)} of these units, which leaves none "
                f"to {verb}; add others, or fit a new student"
            )
        self.held = torch.cat([self.held, drawn])
        self.taught = torch.cat([self.taught, units[~out & ~torch.isin(units, self.taught)]])
        return torch.isin(unit, units[out])

    def tensors(self) -> dict[str, Tensor]:
        """Return what `restore` takes, by name."""
        return {"split.held": self.held, "split.taught": self.taught}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` returned; students of before there was this have nothing, and may choose anew."""
        self.held, self.taught = (
            tensors[name].cpu() if name in tensors else torch.empty(0, dtype=torch.int64)
            for name in ("split.held", "split.taught")
        )
