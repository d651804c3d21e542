"""TextWorld's games: generated here or given as files, played by their own interpreter.

Tests: tests/envs/test_textworld.py. The package: https://github.com/microsoft/TextWorld (Côté et al., 2018).
"""

import os
import tempfile
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lago_fast.envs.game_memo import Turn
from lago_fast.envs.story_games import StoryGames, content_of
from lago_fast.envs.textworld_games import (
    HELD_OUT,
    LEVELS,
    Level,
    generate,
    import_textworld,
    unknown_to_the_interpreter,
)
from lago_fast.errors import UnknownTask, UnsupportedArgument

FILE_HORIZON = 50


class TextWorldEngine:
    """One game file in TextWorld's interpreter.

    The observation is what the game says when asked to look and for the inventory; with `answers` the game's answer
    to the last command stands before it.
    """

    def __init__(self, path: Path, answers: bool) -> None:
        textworld = import_textworld()
        asked = textworld.EnvInfos(
            admissible_commands=True,
            description=True,
            inventory=True,
            objective=True,
            score=True,
            won=True,
            lost=True,
            policy_commands=True,
        )
        with unknown_to_the_interpreter():
            self._game, self._answers = textworld.start(str(path), request_infos=asked), answers

        self._places: dict[str, str] = {}
        self._moved: list[str] = []  # things that changed their place, the last one last

    def reset(self) -> Turn:
        """Start the game anew."""
        state = self._game.reset()
        self._places, self._moved = _places(state), []
        return self._turn(state, "")

    def step(self, command: str) -> Turn:
        """Take an admissible command."""
        state, _, _ = self._game.step(command)
        return self._turn(state, _answer(state.feedback) if self._answers else "")

    def _turn(self, state: Any, answer: str) -> Turn:
        policy, places = state.policy_commands, _places(state)
        gone = [thing for thing in {**self._places, **places} if self._places.get(thing) != places.get(thing)]
        self._moved = [thing for thing in self._moved if thing not in gone] + gone
        self._places = places
        return Turn(
            key=(_world(state, self._moved, places), answer),
            instruction=_plain(state.objective),
            observation=" ".join(filter(None, (answer, _plain(state.description), _plain(state.inventory)))),
            admissible=tuple(state.admissible_commands),
            score=float(state.score),
            won=bool(state.won),
            lost=bool(state.lost),
            advice=policy[0] if policy else None,
        )

    def close(self) -> None:
        """Stop the interpreter."""
        self._game.close()


def _world(state: Any, moved: Sequence[str], places: dict[str, str]) -> Hashable:
    """All that decides what follows: the facts, which quests are still open, and the order in which things are told.

    The interpreter names the things of one place in an order that depends on when each was last put there.
    """
    quests = state["_game_progression"].quest_progressions
    shared = {place for place, count in Counter(places.values()).items() if count > 1}
    order = frozenset((place, tuple(thing for thing in moved if places.get(thing) == place)) for place in shared)
    progress = tuple((quest.nb_completions, quest.done) for quest in quests)
    return frozenset(state["_facts"]), progress, state.score, order


def _places(state: Any) -> dict[str, str]:
    """Where each thing lies, by their names in the facts."""
    facts = (fact for fact in state["_facts"] if fact.name in ("in", "on", "at") and fact.names[0] != "P")
    return {fact.names[0]: fact.names[1] for fact in facts}


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())


def _answer(feedback: str) -> str:
    """The game's answer without the prompt and the status line after it."""
    return _plain(feedback.rsplit("\n>", 1)[0])


class Scratch:
    """A temporary folder of games that goes when the last environment that plays them lets go of it."""

    def __init__(self) -> None:
        self._folder, self._holders = tempfile.TemporaryDirectory(prefix="lago_textworld_"), 0
        self.path = Path(self._folder.name)

    def hold(self) -> None:
        """Count one more environment."""
        self._holders += 1

    def let_go(self) -> None:
        """Count one less."""
        self._holders -= 1
        if self._holders == 0:
            self._folder.cleanup()


class TextWorldGames(StoryGames):
    """N rows of TextWorld's games; made by `make_textworld`."""

    def __init__(
        self,
        num_envs: int,
        files: Sequence[Path],
        *,
        answers: bool,
        horizon: int,
        seed: int,
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__(num_envs, [partial(TextWorldEngine, file, answers) for file in files], horizon, seed)
        self.files, self._answers = list(files), answers
        self._scratch: list[Scratch] = []  # where the games of the memos lie, and `files`
        self._hold([] if scratch is None else [scratch])

    def _hold(self, folders: Sequence[Scratch]) -> None:
        for folder in folders:
            if folder not in self._scratch:
                folder.hold()
                self._scratch.append(folder)

    def share(self, other: StoryGames) -> None:
        super().share(other)
        if isinstance(other, TextWorldGames):
            self._hold(other._scratch)

    def _games(self) -> list[Hashable]:
        # the .json beside it may list the same facts in another order
        return [(TextWorldEngine, self._answers, content_of(file)) for file in self.files]

    def close(self) -> None:
        """Free the interpreters, and games in a temporary folder once nobody plays them; a second call does nothing."""
        super().close()
        while self._scratch:
            self._scratch.pop().let_go()


def make_textworld(
    num_envs: int,
    games: str | Sequence[str | os.PathLike[str]] = "easy",
    *,
    split: Literal["train", "test"] = "train",
    num_games: int = 1,
    cache: str | os.PathLike[str] | None = None,
    answers: bool | None = None,
    horizon: int | None = None,
    seed: int = 0,
) -> TextWorldGames:
    """Return `num_envs` rows of TextWorld's games.

    A game of a level takes two to four seconds to make, and is made once per `cache`.

    Args:
        num_envs: N.
        games: a level, "easy", "medium", "hard" or "cooking"; or paths of game files (.z8, their .json beside them).
        split: of a level: the games to train on, or others that are held out.
        num_games: how many games of the level, from the first on.
        cache: folder in which generated games are kept and found again; None is a temporary one.
        answers: whether an observation holds the game's answer to the last command, beside what is seen and carried.
            Without it an observation depends on the world's state alone. None is True for files and for "cooking",
            whose recipe is read in an answer, and False for the other levels.
        horizon: steps until an episode is truncated; None is the level's own, 50 for files.
        seed: decides which game an episode plays.

    Raises:
        UnknownTask: an unknown level.
        UnsupportedArgument: a file that is no game of TextWorld's, or a number out of range.
        MissingExtra: textworld is not installed.
    """
    if num_games < 1:
        raise UnsupportedArgument(f"num_games={num_games}: give 1 or more")
    if split not in ("train", "test"):
        raise UnsupportedArgument(f"split={split!r}: give 'train' or 'test'")
    scratch = None
    if isinstance(games, str):
        level = _level(games)
        if cache is None:
            scratch = Scratch()
            cache = scratch.path
        first = HELD_OUT if split == "test" else 0
        files = [generate(games, number, Path(cache)) for number in range(first, first + num_games)]
        answers = level.answers if answers is None else answers
        horizon = level.horizon if horizon is None else horizon
    else:
        files = [_checked(Path(path)) for path in games]
        if not files:
            raise UnsupportedArgument("games=[]: give at least one game file, or the name of a level")
        answers = True if answers is None else answers
        horizon = FILE_HORIZON if horizon is None else horizon
    return TextWorldGames(num_envs, files, answers=answers, horizon=horizon, seed=seed, scratch=scratch)


def _level(name: str) -> Level:
    if name not in LEVELS:
        raise UnknownTask(f"games={name!r}: give one of the levels {', '.join(LEVELS)}, or a list of game files")
    return LEVELS[name]


def _checked(path: Path) -> Path:
    import_textworld()
    if path.suffix != ".z8" or not path.is_file():
        raise UnsupportedArgument(f"games: {str(path)!r} is no game file; give the .z8 file of a game of TextWorld's")
    if not path.with_suffix(".json").is_file():
        raise UnsupportedArgument(f"games: {str(path)!r} has no .json file beside it; TextWorld writes both")
    return path
