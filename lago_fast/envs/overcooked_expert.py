"""A cook that knows the whole kitchen. Tests: tests/envs/test_overcooked.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lago_fast.envs.overcooked_kitchen import BOARDS, CHOPS, HAND, INGREDIENTS, PLATE, PLATED
from lago_fast.envs.overcooked_texts import ACTIONS

if TYPE_CHECKING:
    from lago_fast.envs.overcooked import Overcooked

_CHOP, _DELIVER = ACTIONS.index("chop"), ACTIONS.index("deliver")


def choices(kitchen: "Overcooked", admissible: Sequence[tuple[str, ...]], over: np.ndarray) -> np.ndarray:
    """Return for each row the index [N] of the next useful action among its admissible ones; 0 where it is over."""
    found = np.zeros(len(over), np.int64)
    for row in np.flatnonzero(~over).tolist():
        found[row] = admissible[row].index(ACTIONS[_next(kitchen, row)])
    return found


def _next(kitchen: "Overcooked", row: int) -> int:
    where, chops = kitchen.where[row].tolist(), kitchen.chops[row].tolist()
    plate, recipe = int(kitchen.plate[row]), kitchen.recipe
    free = [board for board in BOARDS if board not in where and plate != board]
    spoilt = any(where[item] == PLATED for item in range(len(INGREDIENTS)) if item not in recipe)
    missing = [item for item in recipe if where[item] != PLATED]
    raw = [item for item in missing if chops[item] < CHOPS]
    held = next((item for item in range(len(INGREDIENTS)) if where[item] == HAND), None)
    if plate == HAND:
        return _with_plate(missing, raw, spoilt, free)
    if held is not None:
        if held not in recipe:
            return _DELIVER  # it costs something, and clears the boards
        if chops[held] == CHOPS and not raw:
            return PLATE
        return free[0] if free else _DELIVER
    return _with_empty_hands(kitchen, row, raw, spoilt, free)


def _with_plate(missing: list[int], raw: list[int], spoilt: bool, free: list[int]) -> int:
    if spoilt or not missing:
        return _DELIVER
    ready = [item for item in missing if item not in raw]
    if ready:
        return ready[0]
    return free[0] if free else _DELIVER


def _with_empty_hands(kitchen: "Overcooked", row: int, raw: list[int], spoilt: bool, free: list[int]) -> int:
    where, station = kitchen.where[row].tolist(), int(kitchen.station[row])
    if spoilt or not raw:
        return PLATE
    lying = [item for item in raw if where[item] in BOARDS]
    if lying:
        return _CHOP if where[lying[0]] == station else where[lying[0]]
    if free:
        return raw[0]
    clutter = [item for item in range(len(INGREDIENTS)) if where[item] in BOARDS and item not in kitchen.recipe]
    return clutter[0] if clutter else PLATE
