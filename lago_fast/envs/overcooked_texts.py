"""The kitchen in words: what the cook sees, remembers and may do. Each text is made once, whatever the number of rows.

Tests: tests/envs/test_overcooked.py.
"""

import numpy as np

from lago_fast.envs.overcooked_kitchen import BOARDS, CHOPS, HAND, HOME, INGREDIENTS, PLATE, PLATED, STATION, VIEW

RECIPES = {"tomato-salad": (0,), "tomato-lettuce-salad": (0, 1)}  # indices into INGREDIENTS
INSTRUCTIONS = {
    "tomato-salad": "Make a tomato salad: put a chopped tomato on the plate and deliver it.",
    "tomato-lettuce-salad": (
        "Make a tomato and lettuce salad: put a chopped tomato and chopped lettuce on the plate and deliver it."
    ),
}
ACTIONS = (
    "get the tomato",
    "get the lettuce",
    "get the onion",
    "get the plate",
    "go to the first cutting board",
    "go to the second cutting board",
    "chop",
    "deliver",
)
_STATIONS = (
    "the place of the tomato",
    "the place of the lettuce",
    "the place of the onion",
    "the place of the plate",
    "the first cutting board",
    "the second cutting board",
    "the serving hatch",
)
_CUTS = ("whole", "once cut", "twice cut", "chopped")
_CODES = 6 * (CHOPS + 1)  # a thing's place and cuts as one number; the next one is "unknown"
_UNKNOWN = _CODES
Sight = tuple[str, tuple[str, ...], np.ndarray]


class KitchenTexts:
    """Observations and admissible actions by what is seen; `memory` keeps what was seen before in the episode."""

    def __init__(self, num_envs: int, memory: bool) -> None:
        self._memory = memory
        self._known = np.full((num_envs, len(INGREDIENTS) + 1), _UNKNOWN)  # codes last seen
        self._sights: dict[int, Sight] = {}

    def forget(self, rows: np.ndarray) -> None:
        """Start the memory of the rows [M] anew."""
        self._known[rows] = _UNKNOWN

    def look(
        self, tile: np.ndarray, station: np.ndarray, where: np.ndarray, chops: np.ndarray, plate: np.ndarray
    ) -> tuple[list[str], list[tuple[str, ...]], np.ndarray]:
        """Return what all rows observe, their admissible actions, and [N, 8] which ACTIONS these are."""
        place = np.concatenate([where, plate[:, None]], axis=1)
        code = place * (CHOPS + 1) + np.pad(chops, ((0, 0), (0, 1)))
        seen = self._in_view(tile, place)
        self._known = np.where(seen, code, self._recall() if self._memory else _UNKNOWN)
        key = (tile[:, 0] * 8 + tile[:, 1]) * 8 + station + 1
        for thing in range(code.shape[1]):
            key = (key * 2 + seen[:, thing]) * (_CODES + 1) + self._known[:, thing]
        sights, known = [], self._sights
        for row, number in enumerate(key.tolist()):
            sight = known.get(number)
            if sight is None:
                sight = known[number] = _sight(tile[row], int(station[row]), self._known[row], seen[row])
            sights.append(sight)
        return [s[0] for s in sights], [s[1] for s in sights], np.array([s[2] for s in sights])

    def _recall(self) -> np.ndarray:
        """What is known of things out of view: what was carried and is gone was delivered, and went back whole."""
        place = self._known // (CHOPS + 1)
        held = place == HAND
        return np.where(held | ((place == PLATED) & held[:, PLATE:]), HOME, self._known)

    def _in_view(self, tile: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Whether each thing is within VIEW of the cook, [N, 4]; what is in the hand always is."""
        home = np.broadcast_to(np.arange(place.shape[1]), place.shape)
        station = np.where(place == PLATED, place[:, -1:], place)  # a thing on the plate is where the plate is
        held = station == HAND
        at_home = np.where(place == PLATED, PLATE, home)
        station = np.where(station == HOME, at_home, station)
        distance = np.abs(STATION[np.where(held, 0, station)] - tile[:, None]).max(axis=-1)
        return held | (distance <= VIEW)


def _sight(tile: np.ndarray, station: int, codes: np.ndarray, seen: np.ndarray) -> Sight:
    place, cuts = np.divmod(codes, CHOPS + 1)
    admissible = _admissible(station, place, cuts)
    text = " ".join([_standing(tile, station), _hands(place, cuts), *_counters(tile, place, cuts, seen)])
    return text, tuple(ACTIONS[k] for k in admissible), np.pad(admissible, (0, len(ACTIONS) - len(admissible)))


def _admissible(station: int, place: np.ndarray, cuts: np.ndarray) -> list[int]:
    """What the cook can try, by what is in the hands: the rest of the kitchen may be out of view."""
    held = [item for item in range(PLATE) if place[item] == HAND]
    has_plate = place[PLATE] == HAND
    if has_plate:
        get = [item for item in range(PLATE) if place[item] != PLATED]
    elif held:
        get = [PLATE] if cuts[held[0]] == CHOPS else []
    else:
        get = [*range(PLATE), PLATE]
    return [*get, 4, 5, *([6] if station in BOARDS else []), *([7] if held or has_plate else [])]


def _standing(tile: np.ndarray, station: int) -> str:
    if station >= 0:
        return f"You stand at {_STATIONS[station]}."
    return f"You stand on the floor in row {tile[0]}, column {tile[1]}."


def _hands(place: np.ndarray, cuts: np.ndarray) -> str:
    if place[PLATE] == HAND:
        return f"You hold the plate with {_on_plate(place)}."
    for item in range(PLATE):
        if place[item] == HAND:
            return f"You hold the {_CUTS[cuts[item]]} {INGREDIENTS[item]}."
    return "Your hands are empty."


def _on_plate(place: np.ndarray) -> str:
    return " and ".join(f"chopped {INGREDIENTS[k]}" for k in range(PLATE) if place[k] == PLATED) or "nothing on it"


def _counters(tile: np.ndarray, place: np.ndarray, cuts: np.ndarray, seen: np.ndarray) -> list[str]:
    """A sentence for each thing that lies somewhere and is seen or remembered, and for each board seen empty."""
    sentences = []
    for thing in range(PLATE + 1):
        if place[thing] in (HAND, PLATED, _UNKNOWN // (CHOPS + 1)):
            continue
        at = _STATIONS[thing if place[thing] == HOME else place[thing]]
        what = (
            f"the plate with {_on_plate(place)}" if thing == PLATE else f"the {_CUTS[cuts[thing]]} {INGREDIENTS[thing]}"
        )
        sentences.append(f"{'You see' if seen[thing] else 'You remember'} {what} at {at}.")
    for board in BOARDS:
        if np.abs(STATION[board] - tile).max() <= VIEW and board not in place:
            sentences.append(f"You see that {_STATIONS[board]} is empty.")
    return sentences
