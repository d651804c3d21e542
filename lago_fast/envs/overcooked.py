"""A kitchen in words, partially observed: salads are made by going, taking, chopping and delivering.

The rewards, the seven by seven kitchen, the view of two tiles and the number of actions are those of "Efficient
Reinforcement Learning with Large Language Model Priors" (arXiv 2410.07927), whose environment was not released with
it; the layout and the rules of each action are our own. Tests: tests/envs/test_overcooked.py.

One step is one action, with its walk. An action that is admissible may still do nothing: whether the tomato is
chopped cannot be seen from everywhere.
"""

from typing import Literal

import numpy as np

from lago_fast.envs import overcooked_expert
from lago_fast.envs.overcooked_kitchen import BOARDS, CHOPS, FLOOR, HAND, HATCH, HOME, INGREDIENTS, PLATE, PLATED, STAND
from lago_fast.envs.overcooked_texts import ACTIONS, INSTRUCTIONS, RECIPES, KitchenTexts
from lago_fast.envs.text_games import Outcome, TextGames
from lago_fast.errors import UnsupportedArgument

Task = Literal["tomato-salad", "tomato-lettuce-salad"]
REWARD_SUBTASK, REWARD_CORRECT, REWARD_WRONG, REWARD_STEP = 0.2, 1.0, -0.1, -0.001
GET_PLATE, TO_BOARD, CHOP, DELIVER = 3, 4, 6, 7  # indices into ACTIONS; below GET_PLATE they get an ingredient


class Overcooked(TextGames):
    """N kitchens with one cook each, who starts on a random tile.

    Each ingredient of the recipe rewards once by 0.2 when it is chopped and once by 0.2 when it lies on the plate. A
    delivery of the whole recipe and nothing else rewards by 1 and ends the episode with success; any other costs 0.1
    and puts what was delivered back to where it is kept, whole. Each step costs 0.001.
    """

    max_actions = len(ACTIONS)

    def __init__(
        self,
        num_envs: int,
        task: Task = "tomato-salad",
        *,
        memory: bool = False,
        horizon: int = 30,
        seed: int = 0,
    ) -> None:
        if task not in RECIPES:
            raise UnsupportedArgument(f"task={task!r}: give one of {', '.join(RECIPES)}")
        super().__init__(num_envs, horizon, seed)
        self.recipe = RECIPES[task]
        self._instruction = INSTRUCTIONS[task]
        self._wanted = np.isin(np.arange(len(INGREDIENTS)), self.recipe)
        self._texts = KitchenTexts(num_envs, memory)
        self.tile = np.zeros((num_envs, 2), np.int64)  # row and column
        self.station = np.full(num_envs, -1)  # where the cook works, -1 at the start
        self.where = np.full((num_envs, len(INGREDIENTS)), HOME)
        self.chops = np.zeros((num_envs, len(INGREDIENTS)), np.int64)
        self.plate = np.full(num_envs, HOME)
        self._rewarded = np.zeros((num_envs, 2, len(INGREDIENTS)), bool)
        self._macro = np.zeros((num_envs, len(ACTIONS)), np.int64)  # per row, the actions that its choices mean

    def expert(self) -> np.ndarray:
        """Return the expert's choices [N]; it knows the whole kitchen."""
        return overcooked_expert.choices(self, self._admissible, self._over)

    def _start(self, rows: np.ndarray) -> None:
        tile = self._draw(rows, len(FLOOR))
        self.tile[rows], self.station[rows] = FLOOR[tile], -1
        self.where[rows], self.chops[rows], self.plate[rows] = HOME, 0, HOME
        self._rewarded[rows] = False
        self._texts.forget(rows)

    def _play(self, choice: np.ndarray, playing: np.ndarray) -> Outcome:
        macro = np.where(playing, self._macro[np.arange(self.num_envs), choice], -1)
        for action in set(macro[playing].tolist()) - {DELIVER}:
            self._act(np.flatnonzero(macro == action), action)
        correct, wrong = self._deliver(macro == DELIVER)
        reached = np.stack([self.chops == CHOPS, self.where == PLATED], axis=1) & self._wanted
        new = reached & ~self._rewarded
        self._rewarded |= reached
        reward = REWARD_STEP + REWARD_SUBTASK * new.sum((1, 2)) + REWARD_CORRECT * correct + REWARD_WRONG * wrong
        return Outcome(reward.astype(np.float32), correct, correct)

    def _act(self, rows: np.ndarray, action: int) -> None:
        if action < GET_PLATE:
            self._get(rows, action)
        elif action == GET_PLATE:
            self._get_plate(rows)
        elif action == CHOP:
            self._chop(rows)
        else:
            self._use_board(rows, BOARDS[action - TO_BOARD])

    def _go(self, rows: np.ndarray, station: np.ndarray | int) -> None:
        self.station[rows] = station
        self.tile[rows] = STAND[self.station[rows]]

    def _holding(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ingredient in the hand, -1 for none, and whether the hand holds the plate; both [M]."""
        held = self.where[rows] == HAND
        return np.where(held.any(1), held.argmax(1), -1), self.plate[rows] == HAND

    def _get(self, rows: np.ndarray, item: int) -> None:
        """Go to the ingredient and take it, with the plate if it lies on that; or put it on the plate in the hand."""
        where, plate = self.where[rows, item], self.plate[rows]
        held, has_plate = self._holding(rows)
        with_plate = where == PLATED
        self._go(rows, np.where(with_plate, _station_of(plate, PLATE), _station_of(where, item)))
        free = (held < 0) & ~has_plate
        self.plate[rows[free & with_plate]] = HAND
        self.where[rows[free & ~with_plate], item] = HAND
        self.where[rows[has_plate & (self.chops[rows, item] == CHOPS)], item] = PLATED

    def _get_plate(self, rows: np.ndarray) -> None:
        """Go to the plate and take it, and put on it what is in the hand, which is chopped."""
        held, _ = self._holding(rows)
        self._go(rows, _station_of(self.plate[rows], PLATE))
        self.plate[rows] = HAND
        full = held >= 0
        self.where[rows[full], held[full]] = PLATED

    def _use_board(self, rows: np.ndarray, board: int) -> None:
        """Go to the board and put down what is in the hand, or put what is chopped onto the plate."""
        self._go(rows, board)
        held, has_plate = self._holding(rows)
        lying = self.where[rows] == board
        there, item = lying.any(1), lying.argmax(1)
        plate_there = self.plate[rows] == board
        put = (held >= 0) & ~there & ~plate_there
        self.where[rows[put], held[put]] = board
        onto = (held >= 0) & plate_there & (self.chops[rows, held] == CHOPS)
        self.where[rows[onto], held[onto]] = PLATED
        lift = has_plate & there & (self.chops[rows, item] == CHOPS)
        self.where[rows[lift], item[lift]] = PLATED
        self.plate[rows[has_plate & ~there]] = board

    def _chop(self, rows: np.ndarray) -> None:
        """Cut once what lies on the board here, with empty hands."""
        held, has_plate = self._holding(rows)
        lying = self.where[rows] == self.station[rows, None]
        cut = lying.any(1) & (held < 0) & ~has_plate
        item = lying.argmax(1)[cut]
        self.chops[rows[cut], item] = np.minimum(self.chops[rows[cut], item] + 1, CHOPS)

    def _deliver(self, delivering: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which deliveries are correct and which are wrong, both [N] bool; things delivered go home, whole."""
        self._go(np.flatnonzero(delivering), HATCH)
        plated, has_plate = self.where == PLATED, self.plate == HAND
        correct = delivering & has_plate & (plated == self._wanted).all(1)
        wrong = delivering & ~correct
        gone = wrong[:, None] & ((plated & has_plate[:, None]) | (self.where == HAND))
        self.where[gone], self.chops[gone] = HOME, 0
        self.plate[wrong & has_plate] = HOME
        return correct, wrong

    def _see(self) -> tuple[list[str], list[str], list[tuple[str, ...]]]:
        observation, admissible, self._macro = self._texts.look(
            self.tile, self.station, self.where, self.chops, self.plate
        )
        return [self._instruction] * self.num_envs, observation, admissible


def _station_of(where: np.ndarray, home: int) -> np.ndarray:
    """The station at which a thing is that is on no plate and in no hand."""
    return np.where(where == HOME, home, where)


def make_overcooked(
    num_envs: int,
    task: Task = "tomato-salad",
    *,
    memory: bool = False,
    horizon: int = 30,
    seed: int = 0,
) -> Overcooked:
    """Return `num_envs` partially observed kitchens in which a salad is to be made.

    Args:
        num_envs: N.
        task: "tomato-salad" or "tomato-lettuce-salad".
        memory: what was seen before in the episode and is out of view is described as remembered; otherwise it is
            not described.
        horizon: steps until an episode is truncated; the paper has 30, and 50 for its offline data.
        seed: decides on which tiles the cook starts.

    Raises:
        UnsupportedArgument: an unknown task, or a number out of range.
    """
    return Overcooked(num_envs, task, memory=memory, horizon=horizon, seed=seed)
