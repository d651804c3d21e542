"""The report of the text-game experiment: tables, criteria and figures from the runs that are there.

    python -m bench.llm_priors.report OUT     # prints the tables; writes report.md, criteria.json and two figures

Intervals are 90 %, by Student's t over the seeds. Test: pytest tests/bench/test_llm_priors.py
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bench.llm_priors.run import read
from bench.llm_priors.work import FRACTIONS, GAMES, KL_COEF, PRIORS, SAMPLING_FRACTION

T_90 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
LAST = 3  # evaluations that "final success" averages over
COLOURS = {"": "0.4", "zero_shot": "tab:blue", "transfer": "tab:orange", "fitted": "tab:green"}
STYLES = {"dqn": "-", "dqn_prior": "-", "ppo": "-", "kl_ppo_loss": "-", "kl_ppo_reward": ":", "kl_ppo_both": "--"}
Rows = list[dict[str, Any]]


def of(rows: Rows, **wanted: Any) -> Rows:
    """Return the rows with these entries, by seed."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda row: row["seed"])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 90 % interval."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    return float(np.mean(values)), T_90[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def shown(values: Sequence[float], scale: float = 100, digits: int = 0) -> str:
    """Return mean and interval as text."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{scale * mean:.{digits}f}" + (f" ±{scale * half:.{digits}f}" if math.isfinite(half) else "")


def final(row: dict[str, Any]) -> float:
    """Return a run's final success: of its last evaluations where it learnt online."""
    return float(np.mean(row["curve"]["success"][-LAST:])) if "curve" in row else row["success"]


def mean_curve(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return evaluations' env steps, of walkthroughs included, and the success of each seed there [seeds, points]."""
    count = min(len(row["curve"]["success"]) for row in rows)
    steps = np.mean([np.array(r["curve"]["env_steps"][:count]) + r["walkthrough_steps"] for r in rows], axis=0)
    return steps, np.array([row["curve"]["success"][:count] for row in rows])


def steps_to(rows: Rows, success: float) -> float:
    """Return the env steps at which the seeds' mean success first is that high, infinity if never."""
    steps, each = mean_curve(rows)
    reached = np.flatnonzero(each.mean(axis=0) >= success - 1e-9)
    return float(steps[reached[0]]) if len(reached) else math.inf


def area(row: dict[str, Any]) -> float:
    """Return a run's mean success over its training."""
    return float(np.mean(row["curve"]["success"]))


def arms_of(rows: Rows, game: str) -> list[tuple[str, str]]:
    """Return the arms without data of a game, with their priors, as they are listed."""
    order = ["random", "prior", "dqn", "dqn_prior", "ppo", "kl_ppo_loss", "kl_ppo_reward", "kl_ppo_both"]
    found = {(row["arm"], row["prior"]) for row in rows if row["game"] == game and row["fraction"] == 0}
    return sorted(found, key=lambda a: (order.index(a[0]), ["", *PRIORS].index(a[1])))


def online(rows: Rows, game: str) -> Iterator[str]:
    """Yield the table of a game's arms without data."""
    yield "| arm | prior | walkthrough steps | final success, % | mean over training, % | steps to baseline | of it |"
    yield "|---|---|---|---|---|---|---|"
    for arm, prior in arms_of(rows, game):
        own = of(rows, game=game, arm=arm, prior=prior, fraction=0)
        spent = f"{np.mean([row['walkthrough_steps'] for row in own]):.0f}" if prior else ""
        cells = [arm, prior or "none", spent, shown([final(row) for row in own])]
        if "curve" in own[0]:
            base = of(rows, game=game, arm="dqn" if arm.startswith("dqn") else "ppo", prior="", fraction=0)
            steps, ratio = math.inf, math.nan
            if base:
                target = float(np.mean([final(row) for row in base]))
                steps, needed = steps_to(own, target), steps_to(base, target)
                ratio = steps / needed
            cells += [shown([area(row) for row in own])]
            cells += [f"{steps:,.0f}" if math.isfinite(steps) else "not reached"]
            cells += [f"{ratio:.2f}" if math.isfinite(ratio) else ""]
        yield f"| {' | '.join(cells + [''] * (7 - len(cells)))} |"


def offline(rows: Rows, game: str) -> Iterator[str]:
    """Yield the table of a game's fractions of data."""
    arms = [("cql", ""), ("cql_walk", ""), *(("cql_prior", prior) for prior in GAMES[game].priors)]
    yield "| of the data | transitions | " + " | ".join(f"{a} {p}".strip() for a, p in arms) + " |"
    yield "|---|---|" + "---|" * len(arms)
    for fraction in FRACTIONS:
        cells = []
        for arm, prior in arms:
            cells.append(shown([r["success"] for r in of(rows, game=game, arm=arm, prior=prior, fraction=fraction)]))
        counts = [row["transitions"] for row in of(rows, game=game, arm="cql", fraction=fraction)]
        if counts:
            yield f"| {100 * fraction:g} % | {np.mean(counts):,.0f} | {' | '.join(cells)} |"


def queries(rows: Rows) -> Iterator[str]:
    """Yield the table of questions per thousand env steps."""
    yield "| game | arm | prior | asked without the cache | with it (first sightings) | times fewer |"
    yield "|---|---|---|---|---|---|"
    for game in GAMES:
        for arm, prior in arms_of(rows, game):
            own = [row for row in of(rows, game=game, arm=arm, prior=prior, fraction=0) if "queries" in row]
            if own:
                without, with_it, times = query_figures(own)
                yield f"| {game} | {arm} | {prior} | {without:.0f} | {with_it:.1f} | {times:.1f} |"


def query_figures(own: Rows) -> tuple[float, float, float]:
    """Return questions per thousand env steps without and with the exact cache, and their ratio."""
    steps = sum(row["env_steps"] for row in own) / 1000
    without, with_it = sum(row["queries"] for row in own), sum(row["first_sightings"] for row in own)
    return without / steps, with_it / steps, without / with_it


def sampling(rows: Rows, game: str) -> Iterator[str]:
    """Yield the table of posterior sampling with the Q of a tenth of the data."""
    priors = GAMES[game].priors
    found = {prior: _sampling(rows, game, prior) for prior in priors}
    yield "| proposals | " + " | ".join(priors) + " |"
    yield "|---|" + "---|" * len(priors)
    ks = next((list(table) for table in found.values() if table), [])
    for k in ks:
        yield f"| {'all' if k is None else k} | " + " | ".join(shown(found[p].get(k, [])) for p in priors) + " |"


def _sampling(rows: Rows, game: str, prior: str) -> dict[int | None, list[float]]:
    found: dict[int | None, list[float]] = {}
    for row in of(rows, game=game, arm="cql_prior", prior=prior, fraction=SAMPLING_FRACTION):
        for entry in row["sampling"]:
            found.setdefault(entry["k"], []).append(entry["success"])
    return found


def criteria(rows: Rows) -> dict[str, Any]:
    """Return what was to be reached and what was, zero-shot and fitted priors apart."""
    found: dict[str, Any] = {"seeds": sorted({row["seed"] for row in rows})}
    for game, about in GAMES.items():
        for prior in about.priors:
            if about.offline:
                found[f"offline {game} {prior}"] = _offline_criterion(rows, game, prior)
            for arm in ("dqn_prior", *(f"kl_ppo_{placement}" for placement in KL_COEF)):
                own = of(rows, game=game, arm=arm, prior=prior, fraction=0)
                base = of(rows, game=game, arm="dqn" if arm == "dqn_prior" else "ppo", prior="", fraction=0)
                if own and base:
                    found[f"online {game} {arm} {prior}"] = _online_criterion(own, base)
    return found


def _offline_criterion(rows: Rows, game: str, prior: str) -> dict[str, Any]:
    """Return the smallest share of the transitions, walkthroughs included, at which CQL-Prior does as well as CQL."""
    whole = of(rows, game=game, arm="cql", fraction=1.0)
    if not whole:
        return {}
    target = float(np.mean([row["success"] for row in whole]))
    for fraction in FRACTIONS:
        own = of(rows, game=game, arm="cql_prior", prior=prior, fraction=fraction)
        success = float(np.mean([row["success"] for row in own])) if own else -1.0
        if success >= target - 1e-9:
            spent = np.mean([(row["transitions"] + row["walkthrough_steps"]) / row["full_transitions"] for row in own])
            return {"cql_on_everything": target, "success": success, "fraction": fraction, "share_spent": float(spent)}
    return {"cql_on_everything": target, "fraction": None}


def _online_criterion(own: Rows, base: Rows) -> dict[str, Any]:
    target = float(np.mean([final(row) for row in base]))
    steps, needed = steps_to(own, target), steps_to(base, target)
    by_seed = {row["seed"]: area(row) for row in base}
    difference = interval([area(row) - by_seed[row["seed"]] for row in own if row["seed"] in by_seed])
    return {
        "baseline_final": target,
        "steps": steps if math.isfinite(steps) else None,
        "baseline_steps": needed,
        "ratio": steps / needed if math.isfinite(steps) else None,
        "mean_success_minus_baseline": difference[0],
        "half_interval": difference[1] if math.isfinite(difference[1]) else None,
    }


def lines(rows: Rows) -> Iterator[str]:
    """Yield the whole report."""
    for game, about in GAMES.items():
        yield from ("", f"## {game}", "", *online(rows, game))
        if about.offline:
            yield from ("", f"### {game}: from recorded transitions", "", *offline(rows, game))
            yield from ("", f"### {game}: posterior sampling, success in %", "", *sampling(rows, game))
    yield from ("", "## Questions to the prior per thousand env steps", "", *queries(rows))


def _band(axis: Axes, x: Sequence[float] | np.ndarray, each: np.ndarray, label: str, **style: Any) -> None:
    """Draw the seeds' mean and its interval; `each` is [seeds, points]."""
    columns = [interval(column) for column in each.T.tolist()]
    mean = np.array([100 * m for m, _ in columns])
    half = np.array([100 * h if math.isfinite(h) else 0.0 for _, h in columns])
    axis.plot(x, mean, label=label, **style)
    axis.fill_between(x, np.clip(mean - half, 0, 100), np.clip(mean + half, 0, 100), color=style["color"], alpha=0.15)


def _finish(axis: Axes) -> None:
    axis.set_ylim(-2, 102)
    if axis.lines:
        axis.legend(fontsize=7)


def plot_online(rows: Rows, path: Path) -> None:
    """Draw success over env steps, values in the upper row and policies in the lower."""
    figure, axes = plt.subplots(2, len(GAMES), figsize=(5 * len(GAMES), 7), sharey=True)
    for column, game in enumerate(GAMES):
        for line, arms in enumerate((("dqn", "dqn_prior"), ("ppo", "kl_ppo_loss", "kl_ppo_reward", "kl_ppo_both"))):
            axis = axes[line][column]
            for arm, prior in arms_of(rows, game):
                if arm not in arms:
                    continue
                steps, each = mean_curve(of(rows, game=game, arm=arm, prior=prior, fraction=0))
                _band(axis, steps, each, f"{arm} {prior}".strip(), color=COLOURS[prior], linestyle=STYLES[arm])
            axis.set_title(game.replace("_", " "), fontsize=10)
            _finish(axis)
    figure.supxlabel("env steps, walkthroughs included")
    figure.supylabel("success, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_offline(rows: Rows, path: Path) -> None:
    """Draw success over the share of the data, and posterior sampling's over proposals per decision."""
    names = [game for game, about in GAMES.items() if about.offline]
    figure, axes = plt.subplots(2, len(names), figsize=(5 * len(names), 7), sharey=True)
    for column, game in enumerate(names):
        for arm, prior in (("cql", ""), ("cql_walk", ""), *(("cql_prior", prior) for prior in GAMES[game].priors)):
            at = [of(rows, game=game, arm=arm, prior=prior, fraction=fraction) for fraction in FRACTIONS]
            if all(at):
                spent = [
                    100 * np.mean([(r["transitions"] + r["walkthrough_steps"]) / r["full_transitions"] for r in own])
                    for own in at
                ]
                seeds = min(map(len, at))
                each = np.array([[row["success"] for row in own[:seeds]] for own in at]).T
                colour = "tab:red" if arm == "cql_walk" else COLOURS[prior]
                _band(axes[0][column], spent, each, f"{arm} {prior}".strip(), color=colour, marker="o")
        axes[0][column].set(title=game, xscale="log", xlabel="transitions, walkthroughs included, % of the data")
        for prior in GAMES[game].priors:
            table = _sampling(rows, game, prior)
            if table:
                seeds = min(map(len, table.values()))
                each = np.array([values[:seeds] for values in table.values()]).T
                _band(axes[1][column], range(len(table)), each, prior, color=COLOURS[prior], marker="o")
                axes[1][column].set_xticks(range(len(table)), ["all" if k is None else str(k) for k in table])
        axes[1][column].set_xlabel("proposals asked for at each decision")
        for axis in axes[:, column]:
            _finish(axis)
    figure.supylabel("success, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out
    rows = read(folder)
    text = "\n".join(lines(rows)).lstrip("\n") + "\n"
    print(text)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "criteria.json").write_text(json.dumps(criteria(rows), indent=1) + "\n", encoding="utf-8")
    plot_online(rows, folder / "online.png")
    plot_offline(rows, folder / "offline.png")


if __name__ == "__main__":
    main()
