"""The rewards of CLEVR-Robot: ours, and those that were published with its language tasks.

Which reward LaGO's authors used is not known. Source of the published ones: KALM (arXiv 2404.09248), ImagineBench
(arXiv 2505.10010), https://github.com/google-research/clevr_robot_env. Tests: tests/envs/test_clevr_rewards.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lago_fast.envs.clevr_goals import NUM_BALLS, Goals
from lago_fast.envs.clevr_judges import GATHER_DISTANCE_M, LINE_SLOPE

SCALE = 10.0  # per metre, or per sub-goal
BONUS = 10.0
BESIDE_M = 0.3  # where `progress` wants the source: beside the destination, inside of every judge's bounds
KALM_BESIDE_M, KALM_SUCCESS = 0.195, 100.0
CARELESS_M, CARELESS_PENALTY, NOTICED_M = 0.20, 10.0, 0.1
CLEVR_REFERENCE_M, CLEVR_MOVED_M, CLEVR_MOVEMENT_BONUS = 0.36, 0.05, 0.25


Offsets = tuple[np.ndarray, np.ndarray]  # along and across [n, K], as `clevr_judges.offsets` gives them


class Moved(NamedTuple):
    """One step of n environments of one family."""

    goals: Goals  # one row per environment
    before: np.ndarray  # [n, 5, 2] ball centres, metres
    after: np.ndarray  # [n, 5, 2]
    offsets_before: Offsets
    offsets_after: Offsets
    success: np.ndarray  # [n] bool
    change: np.ndarray  # [n] sub-goals gained, less those lost


def remaining(kind: str, offsets: Offsets) -> np.ndarray:
    """[n] metres still to go, over all sub-goals; 0 for "easy".

    A relation: from the source to a point 0.3 m beside the destination. The line: how far each ball is from the
    sector to the right of its neighbour. Gathering: what is beyond 0.325 m.
    """
    along, across = offsets
    if kind == "easy":
        return np.zeros(len(along))
    if kind == "line":
        short = np.maximum(np.abs(across) - LINE_SLOPE * along, 0.0)
    elif kind == "gather":
        short = np.maximum(np.hypot(along, across) - GATHER_DISTANCE_M, 0.0)
    else:
        short = np.hypot(along - BESIDE_M, across)
    return short.sum(axis=1)


def _closer(moved: Moved, beside: float) -> np.ndarray:
    """10 per metre that the source of a single relation came closer to a point so far beside the destination."""
    (along, across), (now_along, now_across) = moved.offsets_before, moved.offsets_after
    return SCALE * (np.hypot(along - beside, across) - np.hypot(now_along - beside, now_across))[:, 0]


def _shifts(moved: Moved) -> np.ndarray:
    """[n, 5] metres that each ball moved."""
    return np.hypot(*np.moveaxis(moved.after - moved.before, 2, 0))


def _others(*named: np.ndarray) -> np.ndarray:
    """[n, 5] bool: the balls that are none of the named [n, 1]."""
    return np.logical_and.reduce([np.arange(NUM_BALLS) != ball for ball in named])


def progress(moved: Moved) -> np.ndarray:
    """10 per metre that `remaining` shrank, and 10 more at success."""
    kind = moved.goals.kind
    gained = remaining(kind, moved.offsets_before) - remaining(kind, moved.offsets_after)
    return SCALE * gained + BONUS * moved.success


def sparse(moved: Moved) -> np.ndarray:
    """1 at success, else 0."""
    return moved.success.astype(np.float64)


def kalm(moved: Moved) -> np.ndarray:
    """10 per metre that the source came closer to 0.195 m beside the destination; at success 100 instead."""
    return np.where(moved.success, KALM_SUCCESS, _closer(moved, KALM_BESIDE_M))


def careless(moved: Moved) -> np.ndarray:
    """[n] bool: a ball that is neither source nor destination moved more than 0.2 m."""
    shifts = _shifts(moved) * _others(moved.goals.source, moved.goals.destination)
    return shifts.max(axis=1) > CARELESS_M


def kalm_careful(moved: Moved) -> np.ndarray:
    """`kalm`, less the largest shift of another ball from 0.1 m on; less 10, and the end, from beyond 0.2 m on."""
    shift = (_shifts(moved) * _others(moved.goals.source, moved.goals.destination)).max(axis=1)
    return kalm(moved) - np.where(shift >= NOTICED_M, shift, 0.0) - CARELESS_PENALTY * careless(moved)


def imagine(moved: Moved) -> np.ndarray:
    """ImagineBench's: 10 per metre between the two balls; "easy" 1 at success; the hard families 10 per sub-goal."""
    if moved.goals.kind == "easy":
        return sparse(moved)
    if moved.goals.kind == "relation" and moved.goals.source.shape[1] == 1:
        return _closer(moved, 0.0)
    return SCALE * moved.change


def clevr(moved: Moved) -> np.ndarray:
    """1 at success if the destination moved less than 0.36 m in this step, else 0."""
    rows = np.arange(len(moved.before))
    still = _shifts(moved)[rows, moved.goals.destination[:, 0]] < CLEVR_REFERENCE_M
    return (moved.success & still).astype(np.float64)


def clevr_movement(moved: Moved) -> np.ndarray:
    """`clevr`, and 0.25 where some ball moved more than 0.05 m without success."""
    some = _shifts(moved).max(axis=1) > CLEVR_MOVED_M
    return clevr(moved) + CLEVR_MOVEMENT_BONUS * (some & ~moved.success)


def clevr_quiet(moved: Moved) -> np.ndarray:
    """`clevr`, and where it pays half of exp(-7 metres that all balls but the source moved)."""
    paid = clevr(moved)
    noise = (_shifts(moved) * _others(moved.goals.source)).sum(axis=1)
    return paid + paid * 0.5 * np.exp(-7.0 * noise)


REWARDS: dict[str, Callable[[Moved], np.ndarray]] = {
    "progress": progress,
    "sparse": sparse,
    "kalm": kalm,
    "kalm-careful": kalm_careful,
    "imagine": imagine,
    "clevr": clevr,
    "clevr-movement": clevr_movement,
    "clevr-quiet": clevr_quiet,
}
# defined by their sources for goals of one relation only
SINGLE_RELATION = ("kalm", "kalm-careful", "clevr", "clevr-movement", "clevr-quiet")
