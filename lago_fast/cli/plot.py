"""`lago plot`: learning curves of run folders, or of a comparison, as one figure."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lago_fast.cli import console
from lago_fast.cli.command import Command
from lago_fast.errors import RunExists, UnsupportedArgument


@dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """Draw success against environment steps.

    Runs of the same arm with several seeds become one line with a band from the lowest to the highest.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of `lago train` or `lago compare`; all runs below a folder are drawn."""
    out: Path = Path("curves.png")
    """The figure: .png, .pdf or .svg."""
    title: str = ""
    """Written above the panels."""
    overwrite: bool = False
    """Replace the figure that is already there."""

    def run(self) -> None:
        """Read the curves and draw them."""
        from lago_fast.plots import draw_curves

        if not self.runs:
            raise UnsupportedArgument("runs: name at least one folder of `lago train` or `lago compare`")
        if self.out.exists() and not self.overwrite:
            raise RunExists(f"out: {self.out} exists already; name another file, or replace it with --overwrite")
        curves: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
        levels: dict[str, float] = {}
        for folder in self.runs:
            for curve in read_curves(folder):
                for task, points in curve["tasks"].items():
                    seeds = curves.setdefault(task, {}).setdefault(curve["arm"], [])
                    seeds.append((points["env_steps"], points["success"]))
            levels.update(prior_levels(folder))
        path = draw_curves(curves, self.out, prior=levels, title=self.title)
        console.say(f"written to {path}")


def read_curves(folder: Path) -> list[dict[str, Any]]:
    """Return the curves of a run folder, or of all run folders below it.

    Raises:
        UnsupportedArgument: there is none.
    """
    from lago_fast import runs

    folder = folder.parent if folder.name == runs.REPORT else folder
    paths = sorted(folder.rglob(runs.CURVE))
    if not paths:
        raise UnsupportedArgument(f"runs: no {runs.CURVE} in or below {folder}; name a folder of `lago train`")
    return [runs.read_json(path) for path in paths]


def prior_levels(folder: Path) -> dict[str, float]:
    """Return the success of the prior alone on each task, where a comparison's report has it."""
    from lago_fast import runs

    path = folder if folder.name == runs.REPORT else folder / runs.REPORT
    if not path.is_file():
        return {}
    tasks = runs.read_json(path)["tasks"]
    return {task: arms["prior"]["success"] for task, arms in tasks.items() if "prior" in arms}
