"""Goals of CLEVR-Robot: five balls, four directions, seven families, four splits.

One convention for directions, that of the published language tasks, everywhere: seen from the front edge of the
table, behind is +y, front is -y, left is -x, right is +x. (The original environment's questions call +y front.)
Facts from https://github.com/google-research/clevr_robot_env, KALM (arXiv 2404.09248), ImagineBench
(arXiv 2505.10010). Tests: tests/envs/test_clevr_goals.py.
"""

import difflib
from collections.abc import Sequence
from functools import cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from lago_fast.envs.clevr_physics import BALLS as COLOURS
from lago_fast.errors import UnknownTask, UnsupportedArgument

NUM_BALLS = len(COLOURS)  # ball 0 is red, and so on
DIRECTIONS = ("behind", "left", "front", "right")
BEHIND, LEFT, FRONT, RIGHT = range(4)
AXES = np.array([(0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (1.0, 0.0)])  # unit vector of each direction

FAMILIES = ("real", "rephrase", "easy", "two-goals", "three-goals", "line", "gather")
HARD = ("two-goals", "three-goals", "line", "gather")
SPLITS: dict[str, tuple[str, ...]] = {"real": ("real",), "rephrase": ("rephrase",), "easy": ("easy",), "hard": HARD}

GATHER_AT = COLOURS.index("green")
# goals of several relations are far too many to word them all: so many of each family, spread over all
JOINT_GOALS = 120


class Goals(NamedTuple):
    """All goals of a family: G goals of K sub-goals, all of which must hold at once."""

    kind: str  # "relation", "easy", "line", "gather": how a sub-goal is judged
    source: np.ndarray  # [G, K] int64, the ball that is to be moved
    destination: np.ndarray  # [G, K] int64, the ball that it is seen from; of "easy": the ball itself
    direction: np.ndarray  # [G, K] int64, where the source is to lie; of "gather": no meaning

    def take(self, goal: np.ndarray) -> "Goals":
        """The rows of the goals [n], in that order."""
        return Goals(self.kind, self.source[goal], self.destination[goal], self.direction[goal])


def check_families(families: Sequence[str]) -> list[str]:
    """The family names as a list.

    Raises:
        UnknownTask: a name is none of the seven, with the nearest names.
        UnsupportedArgument: no family, a family twice, or one string instead of a list.
    """
    if isinstance(families, str):
        raise UnsupportedArgument(f"families={families!r}: give a list of names, [{families!r}]")
    for family in families:
        if family not in FAMILIES:
            raise UnknownTask(f"families: {family!r} is none of CLEVR-Robot's; {nearest(family, FAMILIES)}")
    if not families or len(set(families)) != len(families):
        raise UnsupportedArgument(f"families={list(families)!r}: give at least one family, and each only once")
    return list(families)


def split_families(split: str | Sequence[str]) -> list[str]:
    """The families of a split ("real", "rephrase", "easy", "hard"), or a list of families as it is.

    Raises:
        UnknownTask: neither a split nor a family, with the nearest names.
    """
    if not isinstance(split, str):
        return check_families(split)
    if split not in SPLITS:
        names = (*SPLITS, *(f"[{family!r}]" for family in HARD))
        raise UnknownTask(f"split={split!r} is none of CLEVR-Robot's; {nearest(split, names)}")
    return list(SPLITS[split])


def nearest(name: str, names: Sequence[str]) -> str:
    """What to try instead of a name that is unknown."""
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    return f"nearest names: {', '.join(near)}" if near else f"names: {', '.join(names)}"


@cache
def family_goals(family: str) -> Goals:
    """The goals of a family, in the order in which they are numbered.

    `real` and `rephrase`: each ordered pair of balls and each direction, 80 goals. `easy`: each ball and direction,
    20. `two-goals`, `three-goals`: so many relations at once, 120 goals each. `line`, `gather`: one goal.
    """
    if family in ("real", "rephrase"):
        return _relations([[relation] for relation in _all_relations()])
    if family in ("two-goals", "three-goals"):
        return _relations(_spread(_joint_relations(2 if family == "two-goals" else 3), JOINT_GOALS))
    balls = np.arange(NUM_BALLS)
    if family == "easy":
        ball = np.repeat(balls, 4)[:, None]
        return Goals("easy", ball, ball, np.tile(np.arange(4), NUM_BALLS)[:, None])
    if family == "line":
        return Goals("line", balls[None, 1:], balls[None, :-1], np.full((1, NUM_BALLS - 1), RIGHT))
    others = np.delete(balls, GATHER_AT)[None]
    return Goals("gather", others, np.full_like(others, GATHER_AT), np.full_like(others, RIGHT))


Relation = tuple[int, int, int]  # source, destination, direction


def _all_relations() -> list[Relation]:
    pairs = [(s, d) for s, d in product(range(NUM_BALLS), repeat=2) if s != d]
    return [(s, d, direction) for s, d in pairs for direction in range(4)]


def _joint_relations(count: int) -> list[list[Relation]]:
    """Every set of `count` relations that can hold at once: no cycle of balls, no three on one side of a ball."""
    relations = _all_relations()
    between = {pair: [r for r in relations if {*r[:2]} == {*pair}] for pair in combinations(range(NUM_BALLS), 2)}
    # of at most three pairs only a triangle is a cycle
    forests = [pairs for pairs in combinations(between, count) if len({b for pair in pairs for b in pair}) > count]
    sets = [list(chosen) for pairs in forests for chosen in product(*(between[pair] for pair in pairs))]
    return [chosen for chosen in sets if len({*_sides(chosen)}) > 1 or count < 3]


def _sides(chosen: list[Relation]) -> list[tuple[int, int] | int]:
    """Of each relation (the ball that all share, the side on which the other lies); else its number."""
    hubs = set.intersection(*({s, d} for s, d, _ in chosen))
    sides: list[tuple[int, int] | int] = []
    for number, (source, _, direction) in enumerate(chosen):
        hub = next(iter(hubs), None)
        side = direction if source != hub else (direction + 2) % 4
        sides.append(number if hub is None else (hub, side))
    return sides


def _spread(sets: list[list[Relation]], count: int) -> list[list[Relation]]:
    """`count` of them, by steps of the golden ratio, which no period of their order fits."""
    return [sets[int(len(sets) * (i * 0.6180339887498949 % 1.0))] for i in range(count)]


def _relations(goals: list[list[Relation]]) -> Goals:
    columns = np.array(goals, np.int64)  # [G, K, 3]
    return Goals("relation", columns[..., 0], columns[..., 1], columns[..., 2])
