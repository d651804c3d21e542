"""Run pytest as on a machine without some packages: python -m tests.bench.hidden MODULE,MODULE... ARGUMENT ..."""

import importlib.metadata
import sys
from typing import Any

import pytest


class Hiding:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, *arguments: Any) -> Any:
        """Find a module that is not hidden, nor in a package that is."""
        parents = {name.rsplit(".", k)[0] for k in range(name.count(".") + 1)}
        return None if parents & self.hidden else self.finder.find_spec(name, *arguments)

    def find_distributions(self, *arguments: Any) -> list[importlib.metadata.Distribution]:
        """Find installed packages that are not hidden."""
        find = getattr(self.finder, "find_distributions", lambda *_: [])
        return [found for found in find(*arguments) if found.metadata["Name"] not in self.hidden]


def main() -> int:
    hidden = set(sys.argv[1].split(","))
    sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
    return pytest.main(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
