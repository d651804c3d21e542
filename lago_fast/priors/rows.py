"""Demonstration rows for stage 1: checked, split by whole episodes, instructions shuffled on demand.

Test: pytest tests/priors/test_rows.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lago_fast.errors import DemonstrationError, UnsupportedArgument
from lago_fast.priors.base import Kind
from lago_fast.priors.folder import check_choice


class Rows(NamedTuple):
    state: Tensor  # [n, S] float32
    action: Tensor  # [n, D] float32 or [n] int64
    instruction_id: Tensor  # [n] int64
    episode_id: Tensor  # [n] int64
    task_id: Tensor  # [n] int64
    wordings: Tensor  # [n, W] int64, instructions that say the same as instruction_id, which is the first

    def take(self, index: Tensor) -> "Rows":
        """Return the rows at `index`."""
        return Rows(*(column[index] for column in self))

    def reworded(self, generator: torch.Generator) -> "Rows":
        """Return the rows with one of their wordings each, drawn anew."""
        count, wordings = self.wordings.shape
        if wordings == 1:
            return self
        drawn = torch.randint(wordings, (count, 1), generator=generator).to(self.wordings.device)
        return self._replace(instruction_id=self.wordings.gather(1, drawn).squeeze(1))


def check_rows(
    states: ArrayLike,
    actions: ArrayLike,
    instruction_id: ArrayLike,
    episode_id: ArrayLike,
    task_id: ArrayLike | None,
    kind: Kind | None,
    texts: int,
) -> tuple[Rows, Kind]:
    """Return checked rows and the kind of the actions; DemonstrationError where they cannot be right."""
    state, action = torch.as_tensor(states), torch.as_tensor(actions)
    ids, episodes = whole_numbers("instruction_id", instruction_id), whole_numbers("episode_id", episode_id)
    if ids.ndim not in (1, 2) or (len(state) and not ids.numel()):
        raise DemonstrationError(
            f"instruction_id: shape {tuple(ids.shape)}; give [n], or [n, W] for W wordings of each"
        )
    wordings = ids if ids.ndim == 2 else ids[:, None]
    ids = wordings[:, 0]
    tasks = ids if task_id is None else whole_numbers("task_id", task_id)
    if kind is None:
        kind = "gaussian" if action.is_floating_point() else "categorical"
    check_choice("kind", kind, ("gaussian", "categorical"))
    shapes = {
        "states": state,
        "actions": action,
        "instruction_id": ids,
        "episode_id": episodes,
        "task_id": tasks,
    }
    lengths = {name: len(column) for name, column in shapes.items()}
    if len(set(lengths.values())) != 1 or not len(state):
        raise DemonstrationError(f"states, actions, ...: need one row each, at least one; found {lengths}")
    if state.ndim != 2 or action.ndim != (2 if kind == "gaussian" else 1):
        raise DemonstrationError(
            f"states {tuple(state.shape)}, actions {tuple(action.shape)}: a {kind} prior needs states [n, S] "
            f"and actions {'[n, D]' if kind == 'gaussian' else '[n]'}"
        )
    for name, column in (("states", state), ("actions", action)):
        if not torch.isfinite(column).all():
            raise DemonstrationError(f"{name}: NaN or infinity; record the demonstrations again")
    if wordings.min() < 0 or wordings.max() >= texts:
        raise DemonstrationError(f"instruction_id: outside of 0..{texts - 1}, the {texts} instructions given")
    action = action.float() if kind == "gaussian" else whole_numbers("actions", action)
    return Rows(state.float(), action, ids, episodes, tasks, wordings), kind


def whole_numbers(name: str, column: ArrayLike) -> Tensor:
    """Return a column of whole numbers as int64; DemonstrationError for any other number, which would be cut."""
    given = torch.as_tensor(column)
    whole = given.long()
    wrong = (whole != given).flatten().nonzero().flatten()
    if len(wrong):
        raise DemonstrationError(
            f"{name}: {len(wrong)} of {given.numel()} numbers are not whole, for one "
            f"{float(given.flatten()[wrong[0]]):g}; give integers"
        )
    return whole


def action_space(
    action: Tensor,
    kind: Kind,
    low: Sequence[float] | float,
    high: Sequence[float] | float,
    num_actions: int | None,
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Return (D or A, low [D], high [D]) and check that the actions lie inside."""
    if kind == "categorical":
        width = int(action.max()) + 1 if num_actions is None else num_actions
        if action.min() < 0 or action.max() >= width:
            raise DemonstrationError(f"actions: outside of 0..{width - 1}; give num_actions of the environment")
        return width, (), ()
    if num_actions is not None:
        raise UnsupportedArgument("num_actions: only for integer actions; leave it None for a Gaussian prior")
    width = action.shape[1]
    bounds = [torch.as_tensor(b, dtype=torch.float32).expand(width) for b in (low, high)]
    outside = (action < bounds[0] - 1e-5) | (action > bounds[1] + 1e-5)
    if outside.any():
        raise DemonstrationError(
            f"actions: {int(outside.any(1).sum())} rows outside of action_low..action_high; "
            "give the environment's bounds, or clip the demonstrations to them"
        )
    return width, tuple(bounds[0].tolist()), tuple(bounds[1].tolist())


def split_episodes(rows: Rows, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of fitted and of held-out rows, whole episodes each, an even share of every task.

    An id that several tasks have is held out of all of them, and counts for each: their ids may start anew, or an
    episode may go through several tasks.

    Raises DemonstrationError when nothing is left on one of the two sides.
    """
    if val_fraction == 0:
        return torch.arange(len(rows.state)), torch.arange(0)
    generator = torch.Generator().manual_seed(seed)
    held_out = rows.episode_id[:0]
    for task in rows.task_id.unique():
        episodes = rows.episode_id[rows.task_id == task].unique()
        free = episodes[~torch.isin(episodes, held_out)]
        count = min(max(1, round(val_fraction * len(episodes))), len(episodes) - 1) - (len(episodes) - len(free))
        drawn = free[torch.randperm(len(free), generator=generator)[: max(0, count)]]
        held_out = torch.cat([held_out, drawn])
    is_val = torch.isin(rows.episode_id, held_out)
    if not is_val.any() or is_val.all():
        raise DemonstrationError(
            "episode_id: one episode per task leaves none to hold out; record more, or pass val_fraction=0"
        )
    return (~is_val).nonzero().flatten(), is_val.nonzero().flatten()


def shuffle_across_tasks(instruction_id: Tensor, task_id: Tensor, seed: int) -> Tensor | None:
    """Return ids [n] in which every row has an instruction of another task; None when there is one task."""
    shuffled, tasks = instruction_id.clone(), task_id.unique()
    if len(tasks) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    for task in tasks:
        mine = (task_id == task).nonzero().flatten()
        others = instruction_id[task_id != task]
        pick = torch.randint(len(others), (len(mine),), generator=generator)
        shuffled[mine] = others[pick.to(others.device)]
    return shuffled


def perturbation(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return normal rows as those of `like` [n, S], each of a size drawn between 0 and 1: near and far are needed."""
    size = torch.rand(len(like), 1, generator=generator)
    return (size * torch.randn(like.shape, generator=generator)).to(like.device)
