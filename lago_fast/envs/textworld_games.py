"""TextWorld's games by level and number, generated with TextWorld's own generator.

A number is a seed: the same level and number give the same game. Tests: tests/envs/test_textworld.py.
"""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lago_fast.errors import MissingExtra

HELD_OUT = 100_000  # the number of the first game that is held out


@dataclass(frozen=True)
class Level:
    """A kind of games."""

    horizon: int
    answers: bool = False  # whether the answers are needed to play
    rooms: int = 1
    objects: int = 1
    quests: int = 1  # each rewards by 1
    quest_length: int = 1  # commands
    recipe: dict[str, Any] | None = None  # settings of a cooking game instead of a quest


LEVELS = {
    "easy": Level(horizon=20, rooms=2, objects=6, quest_length=3),
    "medium": Level(horizon=30, rooms=3, objects=8, quests=2, quest_length=3),
    "hard": Level(horizon=60, rooms=5, objects=12, quests=3, quest_length=4),
    "cooking": Level(
        horizon=40,
        answers=True,
        recipe={"recipe": 1, "take": 1, "go": 1, "open": True, "cook": True, "cut": True, "drop": False},
    ),
}


def import_textworld() -> ModuleType:
    """Return the package; MissingExtra says how to get it."""
    try:
        import textworld
    except ImportError as error:
        raise MissingExtra("text games need TextWorld: pip install 'lago_fast[text]'") from error
    module: ModuleType = textworld
    return module


@contextmanager
def unknown_to_the_interpreter() -> Iterator[None]:
    """Let no warning through that a game is none whose score the interpreter knows: TextWorld's say theirs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Game '.*' is not fully supported")
        yield


def generate(level: str, number: int, cache: Path) -> Path:
    """Return the game file of a level's game, made unless the cache has it; never a half written one."""
    textworld = import_textworld()
    folder = cache / f"{level}-{number}-textworld-{textworld.__version__}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making_", dir=cache) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            with unknown_to_the_interpreter():
                _make(textworld, LEVELS[level], number, made / "game.z8")
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was faster
                    raise
    return folder / "game.z8"


def _make(textworld: ModuleType, level: Level, seed: int, path: Path) -> None:
    options = textworld.GameOptions()
    options.seeds, options.path = seed, str(path)
    if level.recipe is not None:
        from textworld.challenges import CHALLENGES

        settings = {**level.recipe, "recipe_seed": seed, "split": None}
        game = CHALLENGES["tw-cooking"][1](settings, options)
        textworld.generator.compile_game(game, options)
        return
    options.nb_rooms, options.nb_objects = level.rooms, level.objects
    options.nb_parallel_quests, options.quest_length = level.quests, level.quest_length
    textworld.make(options)
