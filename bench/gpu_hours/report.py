"""Table, JSON, CSV and figure of a comparison; the last line printed is one JSON object.

    python -m bench.gpu_hours.report RESULT.json [MORE.json ...] [--out FOLDER] [--curve RUN/curve.json]

Reads what compare.py wrote; several files of the same work, such as repeated runs, are pooled round by round.
Test: pytest tests/bench/test_gpu_hours.py
"""

import argparse
import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.gpu_hours.accounting import WATTS_PER_CORE

BOOTSTRAPS, SEED = 2000, 0
MILLION = 1e6
# LaGO's CLEVR-Robot and Meta-World runs, arXiv 2606.24669: env steps, and what they took there
PAPER = {
    "CLEVR-Robot, 1.5 million steps": {"env_steps": 1.5e6, "gpu_hours": 36.0},
    "Meta-World, 20 million steps": {"env_steps": 20e6, "gpu_hours": 210.0},
}
PAPER_HARDWARE = "RTX A6000: 38.7 TFLOPS float32, 155 TFLOPS bfloat16 dense, 768 GB/s (data sheet)"
# data sheets: TFLOPS of float32 and of dense bfloat16, GB/s
DATA_SHEETS = {"A6000": (38.7, 155, 768), "H100": (67, 989, 3350), "H200": (67, 989, 4800), "A100": (19.5, 312, 2039)}


def hours_per_million(one: dict[str, Any], cores: int, devices: int) -> dict[str, float | None]:
    """Return what a million env steps cost at the rate of one iteration.

    Args:
        one: a measured iteration as compare.py writes it.
        cores: that the process holds, used or not.
        devices: GPUs that it holds.
    """
    per_step = MILLION / one["env_steps"] / 3600
    busy, joules = one["gpu_busy_s"], one["gpu_joules"]
    return {
        "wall_hours": one["wall_s"] * per_step,
        "core_hours": one["wall_s"] * per_step * cores,
        "cpu_hours_used": one["cpu_s"] * per_step,
        "gpu_hours": one["wall_s"] * per_step * devices if devices else None,
        "gpu_hours_busy": None if busy is None else busy * per_step,
        "gpu_kwh": None if joules is None else joules * per_step / 1000,
        "cpu_kwh_modelled": one["cpu_s"] * per_step * WATTS_PER_CORE / 1000,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the ends of its 95 % bootstrap interval over rounds."""
    rng = np.random.default_rng(SEED)
    drawn = np.median(rng.choice(np.asarray(values), (BOOTSTRAPS, len(values))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return statistics.median(values), float(low), float(high)


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return how many times `theirs` is more than `ours`: the median over rounds, and its 95 % interval.

    Rounds are pairs, since the arms took turns; where one has fewer, the later rounds of the other are left out.
    """
    return median_interval([b / a for a, b in zip(ours, theirs, strict=False)])


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of one or several results of the same work.

    Raises:
        ValueError: they are of different work, machine or prior.
    """
    first = records[0]
    for other in records[1:]:
        for key in ("work", "cores", "devices", "backbone", "weights", "carried"):
            if first.get(key) != other.get(key):
                raise ValueError(f"{key}: results of different work cannot be pooled; report them one by one")
    cores, devices = first["cores"], first["devices"]
    measure = "gpu_hours" if devices else "core_hours"
    rounds: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for name, arm in record["arms"].items():
            rounds.setdefault(name, []).extend(hours_per_million(one, cores, devices) for one in arm["rounds"])
    arms = {name: _arm(record_of(records, name), costs, rounds, measure) for name, costs in rounds.items()}
    return {
        "measure": measure,
        "hardware": first["hardware"],
        "work": first["work"],
        "backbone": first.get("backbone"),
        "weights": first.get("weights"),
        "rounds": {name: len(costs) for name, costs in rounds.items()},
        "arms": arms,
        "paper": {**PAPER, "hardware": PAPER_HARDWARE, "hardware_ratio": hardware_ratio(first["hardware"]["gpu"])},
        "skipped": [line for record in records for line in record["skipped"]],
        "student_audit_kl_nats": [record.get("student_audit_kl_nats") for record in records],
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "commits": sorted({str(record["commit"]) for record in records}),
    }


def record_of(records: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return an arm's entry in the first result that has it."""
    return next(record["arms"][name] for record in records if name in record["arms"])


def _arm(
    about: dict[str, Any], costs: list[dict[str, Any]], rounds: dict[str, list[dict[str, Any]]], measure: str
) -> dict[str, Any]:
    hours = [cost[measure] for cost in costs]
    middle, low, high = median_interval(hours)
    found: dict[str, Any] = {
        "tag": about["tag"],
        "adds": about["adds"],
        "facts": about["facts"],
        f"{measure}_per_million": middle,
        f"{measure}_per_million_ci95": [low, high],
        "env_steps_per_s": MILLION / statistics.median(cost["wall_hours"] for cost in costs) / 3600,
        "cpu_hours_used_per_million": statistics.median(cost["cpu_hours_used"] for cost in costs),
        "cpu_kwh_modelled_per_million": statistics.median(cost["cpu_kwh_modelled"] for cost in costs),
        "one_off_hours": about["facts"].get("one_off_s", 0.0) / 3600,
        "extrapolated_hours": {name: middle * paper["env_steps"] / MILLION for name, paper in PAPER.items()},
        "parts_s": _parts(about),
        "peak_memory_grew_bytes": about["peak_memory_grew_bytes"],
    }
    for name in ("gpu_hours_busy", "gpu_kwh"):
        if costs[0][name] is not None:
            found[f"{name}_per_million"] = statistics.median(cost[name] for cost in costs)
    if costs[0]["gpu_kwh"] is not None:
        found["gpu_kwh_are"] = about["rounds"][0]["gpu_joules_are"]
    for base in ("1 first user", "2 careful user"):
        if base in rounds:
            theirs = [cost[measure] for cost in rounds[base]]
            found[f"times_fewer_than_{base.split()[0]}"] = list(ratio_interval(hours, theirs))
    return found


def _parts(about: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of each part of an iteration, scaled to the whole of it."""
    names = [part["name"] for part in about["rounds"][0]["parts"]]
    return {
        name: statistics.median(one["parts"][k]["wall_s"] * one["parts"][k]["times"] for one in about["rounds"])
        for k, name in enumerate(names)
    }


def hardware_ratio(gpu: str | None) -> str:
    """Return in words how this machine's GPU compares with the paper's, by data sheets."""
    if gpu is None:
        return "no GPU here: hours of CPU cores stand beside hours of an RTX A6000, and no ratio of them is meant"
    known = next((name for name in DATA_SHEETS if name in gpu), None)
    if known is None:
        return f"{gpu}: no data sheet is noted here"
    pairs = zip(DATA_SHEETS[known], DATA_SHEETS["A6000"], ("float32", "bfloat16", "memory"), strict=True)
    return f"{gpu} over RTX A6000: " + ", ".join(f"{what} {a / b:.1f}x" for a, b, what in pairs)


def evidence(arm: dict[str, Any]) -> str:
    """Return what an arm's tag stands on."""
    facts = arm["facts"]
    if facts.get("kl_nats") is not None:
        return f"KL {facts['kl_nats']:.3f} nats"
    if facts.get("success") is not None:
        return f"prior's success {100 * facts['success']:.0f} %"
    return "random weights" if facts else "-"


def energy(arm: dict[str, Any]) -> str:
    """Return an arm's kWh per million steps, and which of them are modelled."""
    cpu = f"{arm['cpu_kwh_modelled_per_million']:.3g} CPU, modelled"
    gpu = arm.get("gpu_kwh_per_million")
    return cpu if gpu is None else f"{gpu:.3g} GPU, {arm['gpu_kwh_are']}; {cpu}"


def table(report: dict[str, Any]) -> str:
    """Return the report as a table in Markdown."""
    measure = report["measure"]
    lines = [
        f"| arm | tag | stands on | {measure.replace('_', '-')} per million steps (95 %) | env steps/s | fewer than 1 "
        f"| fewer than 2 | kWh per million steps | extrapolated to 1.5 / 20 million |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        low, high = arm[f"{measure}_per_million_ci95"]
        cells = [
            name,
            arm["tag"],
            evidence(arm),
            f"{arm[f'{measure}_per_million']:.3g} ({low:.3g} to {high:.3g})",
            f"{arm['env_steps_per_s']:,.0f}",
            *(_times(arm.get(f"times_fewer_than_{k}")) for k in (1, 2)),
            energy(arm),
            " / ".join(f"{hours:.3g}" for hours in arm["extrapolated_hours"].values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.1f}x ({interval[1]:.1f} to {interval[2]:.1f})"


def write_csv(report: dict[str, Any], path: Path) -> None:
    """Write one row per arm."""
    flat = [
        {
            "arm": name,
            **{k: v for k, v in arm.items() if isinstance(v, str | int | float)},
            **{f"extrapolated_{k}": v for k, v in arm["extrapolated_hours"].items()},
        }
        for name, arm in report["arms"].items()
    ]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)


def curve_of(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return {"arm", "env_steps", "success"} of the work's task from what `lago train` wrote."""
    run = json.loads(path.read_text(encoding="utf-8"))
    return {"arm": run["arm"], **run["tasks"][report["work"]["task"]]}


def draw(report: dict[str, Any], path: Path, curve: dict[str, Any] | None) -> None:
    """Draw the ladder as bars, and, given a curve of success against env steps, success against hours."""
    measure = report["measure"]
    unit = measure.replace("_", "-")
    rungs = {name: arm for name, arm in report["arms"].items() if name[0].isdigit()}
    figure = Figure(figsize=(8 if curve is None else 14, 4.5))
    axes = figure.subplots(1, 1 if curve is None else 2, squeeze=False)
    bars = axes[0, 0]
    names = list(rungs)[::-1]
    colours = {"baseline": "tab:red", "exact": "tab:blue", "refit": "tab:cyan", "approximate": "tab:orange"}
    hours = [rungs[name][f"{measure}_per_million"] for name in names]
    bars.barh(names, hours, color=[colours.get(rungs[name]["tag"], "tab:gray") for name in names])
    for y, (name, value) in enumerate(zip(names, hours, strict=True)):
        bars.text(value, y, f" {value:.3g}  {rungs[name]['tag']}", va="center", fontsize=8)
    bars.set_xscale("log")
    bars.set_xlim(right=max(hours) * 8)
    bars.set_xlabel(f"{unit} per million env steps ({report['weights']} {report['backbone']})")
    if curve is not None:
        lines = axes[0, 1]
        for name, arm in rungs.items():
            per_step = arm[f"{measure}_per_million"] / MILLION
            lines.plot(np.array(curve["env_steps"]) * per_step, curve["success"], label=name)
        lines.set_xscale("log")
        lines.set_xlabel(
            f"{unit}: the measured curve of one run of {curve['arm']}, its steps at each rung's measured cost"
        )
        lines.set_ylabel("success of the last training episodes")
        lines.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder of report.json, report.csv and ladder.png; default: beside")
    parser.add_argument("--curve", type=Path, help="curve.json of a run of `lago train` on the same task")
    options = parser.parse_args(words)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    report = summarise(records)
    out = options.out or options.results[0].parent
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_csv(report, out / "report.csv")
    if any(name[0].isdigit() for name in report["arms"]):
        draw(report, out / "ladder.png", None if options.curve is None else curve_of(options.curve, report))
    print(table(report))
    paper = [f"{name}: {entry['gpu_hours']:g} GPU-hours" for name, entry in PAPER.items()]
    print(f"extrapolated from rates, not run. The paper's: {'; '.join(paper)}, on {PAPER_HARDWARE}.")
    print(report["paper"]["hardware_ratio"])
    for line in report["skipped"]:
        print(f"skipped: {line}")
    brief = {name: arm[f"{report['measure']}_per_million"] for name, arm in report["arms"].items()}
    print(json.dumps({"measure": f"{report['measure']} per million env steps", "arms": brief}))


if __name__ == "__main__":
    main()
