"""Learning curves as a figure: success against environment steps, per task and on average.

Drawn without pyplot, so that no window opens and no global state of matplotlib changes.
Test: pytest tests/test_plots.py
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from lago_fast.errors import UnsupportedArgument

Curve = tuple[Sequence[float], Sequence[float]]  # environment steps, success in 0..1
Curves = Mapping[str, Mapping[str, Sequence[Curve]]]  # task -> arm -> seeds

# Okabe and Ito's palette, which colour-blind readers can tell apart; a known arm has one colour everywhere
COLOURS = {"lago": "#0072B2", "ppo": "#D55E00", "bc_ppo": "#009E73", "lago_random": "#CC79A7"}
MORE_COLOURS = ("#E69F00", "#56B4E9", "#000000", "#F0E442")
PRIOR_COLOUR = "#555555"
COLUMNS = 4
FORMATS = (".png", ".pdf", ".svg")


def draw_curves(
    curves: Curves,
    path: str | os.PathLike[str],
    *,
    prior: Mapping[str, float] | None = None,
    x_label: str = "environment steps per task",
    title: str = "",
) -> Path:
    """Draw one panel per task and one for their mean, and return the path of the figure.

    Lines are means over seeds; a band goes from the lowest to the highest seed. The mean panel has the arms
    that ran on every task with the same number of seeds.

    Args:
        curves: task -> arm -> one (steps, success) per seed; steps rise, NaN points are left out.
        path: of the figure, .png, .pdf or .svg; written in one step.
        prior: task -> success of the prior alone, a dashed line.
        x_label: what the steps count.
        title: above all panels.

    Raises:
        UnsupportedArgument: nothing to draw, steps and success of different lengths, or another file format.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise UnsupportedArgument(f"path: {path.name!r} ends in no format known; use {', '.join(FORMATS)}")
    drawn = {
        task: {arm: seeds for arm, runs in arms.items() if (seeds := _points(task, arm, runs))}
        for task, arms in curves.items()
    }
    if not any(drawn.values()):
        raise UnsupportedArgument("curves: not one point to draw; train longer, until an episode ends")
    prior = prior or {}
    panels = dict(drawn)
    levels = dict(prior)
    if len(drawn) > 1:
        panels["mean"] = _mean_over_tasks(drawn)
        if set(drawn) <= set(prior):
            levels["mean"] = float(np.mean([prior[task] for task in drawn]))

    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.7 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    colours = _colours([arm for arms in drawn.values() for arm in arms])
    for axis, (name, arms) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, name, arms, levels.get(name), colours)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("success")
    for axis in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel(x_label)
    if title:
        figure.suptitle(title)
    shown = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    most = max(len(seeds) for arms in drawn.values() for seeds in arms.values())
    note = f"mean of {most} seeds, band: lowest to highest" if most > 1 else "one seed"
    ncols = min(len(shown), 2 * columns)  # more are wider than the panels
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=ncols, title=note, frameon=False)
    _save(figure, path)
    return path


def _points(task: str, arm: str, runs: Sequence[Curve]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the finite points of each seed that has any."""
    seeds = []
    for steps, success in runs:
        if len(steps) != len(success):
            raise UnsupportedArgument(
                f"curves: {task}, {arm}: {len(steps)} steps and {len(success)} successes; give one per step"
            )
        x, y = np.asarray(steps, float), np.asarray(success, float)
        kept = np.isfinite(y)
        if kept.any():
            seeds.append((x[kept], y[kept]))
    return seeds


def _on_one_grid(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps [P] that all seeds cover, and their successes [seeds, P] there, linear in between."""
    low, high = max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds)
    grid = np.unique(np.concatenate([x for x, _ in seeds]))
    # seeds without a common range meet where the shortest ends
    grid = grid[(grid >= low) & (grid <= high)] if low <= high else np.array([high])
    return grid, np.stack([np.interp(grid, x, y) for x, y in seeds])


def _mean_over_tasks(
    drawn: Mapping[str, Mapping[str, list[tuple[np.ndarray, np.ndarray]]]],
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Return for each arm that ran on every task alike one curve per seed, the mean over the tasks."""
    mean: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for arm in dict.fromkeys(arm for arms in drawn.values() for arm in arms):
        per_task = [arms.get(arm, []) for arms in drawn.values()]
        counts = {len(seeds) for seeds in per_task}
        if counts == {0} or len(counts) > 1:
            continue
        mean[arm] = []
        for seed in range(counts.pop()):
            grid, successes = _on_one_grid([seeds[seed] for seeds in per_task])
            mean[arm].append((grid, successes.mean(axis=0)))
    return mean


def _colours(arms: Sequence[str]) -> dict[str, str]:
    strangers = [arm for arm in dict.fromkeys(arms) if arm not in COLOURS]
    return COLOURS | {arm: MORE_COLOURS[i % len(MORE_COLOURS)] for i, arm in enumerate(strangers)}


def _draw_panel(
    axis: Axes,
    name: str,
    arms: Mapping[str, list[tuple[np.ndarray, np.ndarray]]],
    prior: float | None,
    colours: Mapping[str, str],
) -> None:
    for arm, seeds in arms.items():
        grid, successes = _on_one_grid(seeds)
        marker = "o" if len(grid) == 1 else None  # one point makes no line
        axis.plot(grid, successes.mean(axis=0), color=colours[arm], label=arm, linewidth=1.6, marker=marker)
        if len(seeds) > 1:
            axis.fill_between(
                grid, successes.min(axis=0), successes.max(axis=0), color=colours[arm], alpha=0.2, linewidth=0
            )
    if prior is not None:
        axis.axhline(prior, color=PRIOR_COLOUR, linestyle="--", linewidth=1.2, label="prior alone")
    axis.set_title(name, fontsize="medium")
    axis.set_xlim(left=0)
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    """Write beside the place, then move there: a crash leaves no half figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        figure.savefig(fresh, dpi=130)
        os.replace(fresh, path)
