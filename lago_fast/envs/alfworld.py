"""ALFWorld's households in words, played through the `alfworld` package where its data are present.

Tests: tests/envs/test_alfworld.py, on a room of our own in its format. The package:
https://github.com/alfworld/alfworld (Shridhar et al., 2021).
"""

import json
import os
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lago_fast.envs.game_memo import Turn
from lago_fast.envs.story_games import StoryGames, content_of
from lago_fast.errors import CorruptFile, MissingExtra, UnknownTask, UnsupportedArgument

TASKS = {
    "pick-place": "pick_and_place_simple",
    "examine": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "pick-two": "pick_two_obj_and_place",
}
SPLITS = ("train", "valid_seen", "valid_unseen")
DATA, GAMES = "json_2.1.1", "game.tw-pddl"  # as `alfworld-download` lays them out
HOW_TO_GET_THEM = (
    "get the data with `alfworld-download` (about 2 GB, into ~/.cache/alfworld or $ALFWORLD_DATA), or give the folder "
    f"that holds {DATA}/ as data=..."
)
_TASK_MARK = "Your task is to:"


class AlfworldEngine:
    """One game file; its planner advises where `plan`, which is slow.

    The observation is the game's answer to the last command.
    """

    def __init__(self, path: Path, plan: bool) -> None:
        demangler, game, infos = _import_alfworld()
        asked = infos(admissible_commands=True, won=True, lost=True, facts=True, policy_commands=plan)
        self._game = demangler(game(asked))
        self._game.load(json.loads(path.read_text()))
        self._instruction = ""

    def reset(self) -> Turn:
        """Start the game anew."""
        state = self._game.reset()
        scene, _, task = state.feedback.partition(_TASK_MARK)
        self._instruction = " ".join(task.split())
        return self._turn(state, " ".join(scene.split()))

    def step(self, command: str) -> Turn:
        """Take an admissible command."""
        state, _, _ = self._game.step(command)
        return self._turn(state, " ".join(state.feedback.split()))

    def _turn(self, state: Any, observation: str) -> Turn:
        policy = state.policy_commands
        # What was looked at is kept as facts too, on which no rule and no text depends.
        facts = frozenset(str(fact) for fact in state.facts if fact.name != "checked")
        return Turn(
            key=(facts, observation),
            instruction=self._instruction,
            observation=observation,
            admissible=tuple(state.admissible_commands),
            score=float(state.won),
            won=bool(state.won),
            lost=bool(state.lost),
            advice=policy[0] if policy else None,
        )

    def close(self) -> None:
        """Free the game."""
        self._game.close()


def _import_alfworld() -> tuple[Any, Any, Any]:
    try:
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld import EnvInfos
        from textworld.envs import PddlEnv
    except ImportError as error:
        raise MissingExtra("ALFWorld's games need alfworld: pip install 'lago_fast[alfworld]'") from error
    return AlfredDemangler, PddlEnv, EnvInfos


class AlfworldGames(StoryGames):
    """N rows of ALFWorld's games; made by `make_alfworld`."""

    def __init__(self, num_envs: int, files: Sequence[Path], *, plan: bool, horizon: int, seed: int) -> None:
        super().__init__(num_envs, [partial(AlfworldEngine, file, plan) for file in files], horizon, seed)
        self.files, self._plans = list(files), plan

    def _games(self) -> list[Hashable]:
        return [(AlfworldEngine, self._plans, content_of(file)) for file in self.files]

    def expert(self) -> Any:
        """Return the planner's choices [N].

        Raises UnsupportedArgument without `plan`.
        """
        if not self._plans:
            raise UnsupportedArgument("plan=False: the expert is the planner; make the games with plan=True")
        return super().expert()


def make_alfworld(
    num_envs: int,
    data: str | os.PathLike[str] | None = None,
    *,
    split: Literal["train", "valid_seen", "valid_unseen"] = "train",
    tasks: Sequence[str] = ("pick-place",),
    num_games: int | None = None,
    plan: bool = False,
    horizon: int = 60,
    seed: int = 0,
) -> AlfworldGames:
    """Return `num_envs` rows of ALFWorld's games; nothing is downloaded.

    Args:
        num_envs: N.
        data: folder that holds json_2.1.1/; None is $ALFWORLD_DATA or ~/.cache/alfworld, as for the package.
        split: of the data.
        tasks: kinds of tasks: "pick-place", "examine", "clean", "heat", "cool", "pick-two".
        num_games: how many of these games, in the order of their names; None is all of them.
        plan: let the package's planner tell the expert what to do; each new state then costs a search.
        horizon: steps until an episode is truncated; the paper has 60.
        seed: decides which game an episode plays.

    Raises:
        UnknownTask: an unknown kind of tasks.
        UnsupportedArgument: no such data, with the way to get them; or a number out of range.
        CorruptFile: a game file that cannot be read.
        MissingExtra: alfworld is not installed.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UnknownTask(f"tasks={list(tasks)!r}: give some of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UnsupportedArgument(f"split={split!r}: give one of {', '.join(SPLITS)}")
    if num_games is not None and num_games < 1:
        raise UnsupportedArgument(f"num_games={num_games}: give 1 or more, or None")
    if data is None:
        data = os.environ.get("ALFWORLD_DATA", "~/.cache/alfworld")
    folder = Path(data).expanduser() / DATA / split
    if not folder.is_dir():
        raise UnsupportedArgument(f"data: there is no folder {str(folder)!r}; {HOW_TO_GET_THEM}")
    files = [path for path in sorted(folder.rglob(GAMES)) if _is_wanted(path, [TASKS[task] for task in tasks])]
    if not files:
        raise UnsupportedArgument(
            f"data: {str(folder)!r} holds no solvable {GAMES} of the tasks {list(tasks)!r}; {HOW_TO_GET_THEM}"
        )
    return AlfworldGames(num_envs, files[:num_games], plan=plan, horizon=horizon, seed=seed)


def _is_wanted(path: Path, kinds: list[str]) -> bool:
    """Whether a game is of one of the kinds, solvable, and without what the package's text games do not support."""
    if any("movable" in part or "Sliced" in part for part in path.parts):
        return False
    try:
        kind = json.loads(path.with_name("traj_data.json").read_text())["task_type"]
        return kind in kinds and bool(json.loads(path.read_text())["solvable"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CorruptFile(
            f"data: {str(path)!r} or its traj_data.json is unreadable ({error}); download it again"
        ) from error
