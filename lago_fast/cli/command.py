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

    @abstractmethod
    def run(self) -> None:
        """Do it."""


def by_default(what: str) -> Any:
    """Return the mark of an option whose default, None or empty, needs words in the help."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})")
