"""What each episode of CLEVR-Robot starts with: a scene, a goal that does not hold in it yet, and a wording.

An episode is a pure function of its environment's key and its own number. Episodes are drawn many at a time and
kept until they are played. Tests: tests/envs/test_clevr_scenes.py.
"""

from dataclasses import dataclass, field

import numpy as np

from lago_fast.envs.clevr_goals import Goals, family_goals
from lago_fast.envs.clevr_judges import satisfied
from lago_fast.envs.clevr_language import family_wordings
from lago_fast.envs.clevr_scenes import below, hashed, sample_scenes
from lago_fast.errors import SceneUnsampled

KEPT = 64  # episodes of each environment that are drawn ahead
MAX_ROUNDS = 1000
# what an episode's keys are for, and the first number of each
_SCENE, _GOAL, _WORDING, _OTHER_SCENE, _NEXT_SCENES = np.arange(5)[:, None]
_FIRST = np.zeros(1, np.int64)


@dataclass
class Family:
    """The environments of one family, and the goals that they have now."""

    name: str
    rows: slice  # of the environments
    first_instruction: int  # where its wordings start among all
    phrasings: int  # wordings of each goal that are drawn from
    goals: Goals = field(init=False)  # all of the family
    now: Goals = field(init=False)  # [n, K], one row per environment
    offsets: tuple[np.ndarray, np.ndarray] = field(init=False)  # along and across [n, K], as it is now
    met: np.ndarray = field(init=False)  # [n, K] bool, which sub-goals hold now
    change_before: np.ndarray = field(init=False)  # [n] how many were gained in the last step

    def __post_init__(self) -> None:
        self.goals = family_goals(self.name)
        n = self.rows.stop - self.rows.start
        self.now = self.goals.take(np.zeros(n, np.int64))
        self.offsets = np.zeros(self.now.source.shape), np.zeros(self.now.source.shape)
        self.met = np.zeros(self.now.source.shape, bool)
        self.change_before = np.zeros(n, np.int64)

    def assign(self, local: np.ndarray, goal: np.ndarray) -> None:
        """Give the environments `local` [m], counted within the family, the goals [m]."""
        for column, all_goals in zip(self.now[1:], self.goals[1:], strict=True):
            column[local] = all_goals[goal]


def families_of(names: list[str], num_envs: int, phrasings: str) -> tuple[list[Family], list[str]]:
    """The families with their even share of the environments, and all instructions in order."""
    parts: list[Family] = []
    instructions: list[str] = []
    per_family = num_envs // len(names)
    for k, name in enumerate(names):
        chosen = [texts if phrasings == "all" else texts[:1] for texts in family_wordings(name)]
        rows = slice(k * per_family, (k + 1) * per_family)
        parts.append(Family(name, rows, len(instructions), len(chosen[0])))
        instructions += [text for texts in chosen for text in texts]
    return parts, instructions


class Episodes:
    """The episodes of N environments, drawn ahead.

    Args:
        families: with the rows that they cover.
        keys: [N] uint64, one per environment.
        gap: least distance between the surfaces of two balls, metres.
        judge: of relations, by which a start is checked.
        solved_start: whether the goal may hold from the start.
    """

    def __init__(self, families: list[Family], keys: np.ndarray, gap: float, judge: str, solved_start: bool) -> None:
        self._families, self._keys, self._gap = families, keys, gap
        self._judge, self._solved_start = judge, solved_start
        n = len(keys)
        self._episode = np.full(n, -KEPT)  # number of the first that is kept
        self._next = np.full(n, KEPT)  # among those kept
        self._scene = np.zeros((n, KEPT, *sample_scenes(keys[:0]).shape[1:]))
        self._goal, self._wording = np.zeros((2, n, KEPT), np.int64)

    def take(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scene [m, 5, 2], goal [m] and instruction [m] of the next episode of the environments `ids` [m]."""
        if (self._next[ids] == KEPT).any():
            self._refill()
        at = self._next[ids]
        self._next[ids] += 1
        return self._scene[ids, at], self._goal[ids, at], self._wording[ids, at]

    def stale_scenes(self, ids: np.ndarray) -> np.ndarray:
        """Scenes [m, 5, 2] that have nothing to do with those of the episodes that were taken last."""
        keys = hashed(self._keys[ids], self._episode[ids] + self._next[ids] - 1)
        return sample_scenes(hashed(keys, _OTHER_SCENE), self._gap)

    def _refill(self) -> None:
        """Draw for every environment that has used up more than half."""
        for family in self._families:
            ids = np.arange(family.rows.start, family.rows.stop)
            ids = ids[self._next[ids] > KEPT // 2]
            if not len(ids):
                continue
            self._episode[ids] += self._next[ids]
            self._next[ids] = 0
            keys = hashed(self._keys[ids, None], self._episode[ids, None] + np.arange(KEPT)).ravel()
            scene, goal = self._draw(family, keys)
            wording = below(hashed(keys, _WORDING), _FIRST, family.phrasings)
            shape = (len(ids), KEPT)
            self._scene[ids] = scene.reshape(*shape, *scene.shape[1:])
            self._goal[ids] = goal.reshape(shape)
            self._wording[ids] = (family.first_instruction + goal * family.phrasings + wording).reshape(shape)

    def _draw(self, family: Family, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scenes [m, 5, 2] and goals [m]. A goal that holds already is redrawn; if it is the only one, the scene is."""
        goals, goal_keys = family.goals, hashed(keys, _GOAL)
        count = len(goals.source)
        scene = sample_scenes(hashed(keys, _SCENE), self._gap)
        goal = below(goal_keys, _FIRST, count)
        if self._solved_start or goals.kind == "easy":
            return scene, goal
        solved = np.arange(len(keys))
        for number in range(1, MAX_ROUNDS):
            solved = solved[satisfied(goals.take(goal[solved]), scene[solved], self._judge).all(axis=1)]
            if not len(solved):
                return scene, goal
            if count > 1:
                goal[solved] = below(goal_keys[solved], np.array([number]), count)
            else:
                scene[solved] = sample_scenes(hashed(keys[solved], _NEXT_SCENES + number), self._gap)
        raise SceneUnsampled(
            f"family {family.name!r}: in {MAX_ROUNDS} draws the goal always held from the start; allow it by "
            "solved_start=True, or give a larger ball_gap"
        )
