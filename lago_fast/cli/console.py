"""What the commands print: tables to standard output; progress, log lines and errors to standard error."""

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

FILE_WIDTH = 120  # of tables that go to a file or a pipe
Advance = Callable[[str, float, float], None]  # what is being done, how much of it is done, how much there is


def quoted(path: Path) -> str:
    """Return a path as a shell reads it."""
    return shlex.quote(str(path))


def say(text: str) -> None:
    """Print a line, not wrapped, so that paths stay whole."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def hint(text: str) -> None:
    """Print what is under way to standard error."""
    Console(stderr=True).print(text, soft_wrap=True, markup=False, highlight=False)


def complain(name: str, message: str) -> None:
    """Print an error in one line to standard error, its name in red."""
    one_line = " ".join(message.split())
    Console(stderr=True).print(f"[bold red]{escape(name)}:[/] {escape(one_line)}", soft_wrap=True, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], texts: int = 1) -> None:
    """Print a table; the first `texts` columns are text, the others are figures, None is a dash."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if i < texts else "right")
    for row in rows:
        table.add_row(*(escape(figure(cell)) for cell in row))
    _print(table)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print names and values in two columns; a nested mapping becomes dotted names."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _flat(facts):
        table.add_row(escape(name), escape(figure(value)))
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(table)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def figure(value: Any) -> str:
    """Return a value as a table shows it: four digits of a float, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(figure(item) for item in value)
    return str(value)


def print_training(curve: Mapping[str, Any]) -> None:
    """Print how a training run ended, from what its curve.json holds."""
    rows = [
        (task, percent(points["success"][-1] if points["success"] else None), curve["steps_to_90"][task])
        for task, points in curve["tasks"].items()
    ]
    print_table("training", ("task", "success in the last episodes", "steps per task to 90 %"), rows)


def print_stages(title: str, stages: Mapping[str, Mapping[str, Any]], env_steps: int) -> None:
    """Print the time per stage of training, as `report.stages` returns it, and the ceiling that each implies."""
    rows = [
        (name, stage["seconds"], percent(stage["share"]), 1e6 * stage["seconds"] / env_steps, stage["speed_up"])
        for name, stage in stages.items()
    ]
    columns = ("stage", "seconds", "share", "µs per env step", "times faster without it")
    print_table(title, columns, rows)


def percent(share: float | None) -> str:
    """Return a share as whole percents."""
    return "-" if share is None else f"{100 * share:.0f} %"


def interval(bounds: Sequence[float] | None) -> str:
    """Return the bounds of an interval of shares as whole percents."""
    return "-" if bounds is None else f"{100 * bounds[0]:.0f} to {100 * bounds[1]:.0f} %"


@contextmanager
def progress_bar() -> Iterator[Advance]:
    """Show a bar on standard error while the block runs; it yields the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        shown: dict[str, Any] = {}

        def advance(label: str, done: float, total: float) -> None:
            if label not in shown:
                shown[label] = bars.add_task(escape(label), total=total)
            bars.update(shown[label], completed=done, total=max(total, done))  # a rollout may overshoot

        yield advance


class _ToStandardError(logging.Handler):
    """Log records as plain lines; the stream is looked up each time, for a progress bar may have taken it."""

    def emit(self, record: logging.LogRecord) -> None:
        hint(self.format(record))


@contextmanager
def log_of_the_package() -> Iterator[None]:
    """Show the package's own log lines while the block runs, and leave logging as it was."""
    log, handler = logging.getLogger("lago_fast"), _ToStandardError()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
