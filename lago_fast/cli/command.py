"""What every command has."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import tyro


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One verb of the command line; its fields are the options."""

    debug: bool = False
    """Show the whole traceback of an error."""

    @classmethod
    def start(cls, preset: str, env: str) -> "Command | None":
        """Return the defaults that go with a preset or an environment; None: those of the fields."""
        del preset, env
        return None

    @abstractmethod
    def run(self) -> None:
        """Do it."""


def by_default(what: str) -> Any:
    """Return the mark of an option whose default, None or empty, needs words in the help."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})")
