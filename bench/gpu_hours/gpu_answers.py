"""What the files of `gpu_report.py` say to the questions that only a GPU can answer, under plain names.

Needs the standard library alone. Test: pytest tests/bench/test_gpu_report.py
"""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

FUSED = ("cuda", "triton")
PER_MILLION = 1e6 / 3600


class Question(NamedTuple):
    """A figure that is asked for, where it stands in `figures`, and its limit."""

    text: str
    cell: str  # of the kernels; "" asks the ladder
    figure: str
    wanted: float
    at_most: bool = False


FULL = ("categorical 1048576x40 float32 loss_and_grads", "B = 1,048,576, A = 40, float32")
REPLAY = ("categorical 32768x4 float32 graph replay", "512 x 64 rows, A = 4, by graph replay")
QUESTIONS = (
    Question(f"{FULL[1]}: share of the measured copy bandwidth", FULL[0], "share_of_copy_bandwidth", 0.8),
    Question(f"{FULL[1]}: times faster than eager", FULL[0], "times_faster_than_eager", 8),
    Question(f"{FULL[1]}: times faster than inductor", FULL[0], "times_faster_than_inductor", 2),
    Question(f"{REPLAY[1]}: microseconds forward and backward", REPLAY[0], "us", 8, at_most=True),
    Question("7B-shaped prior, last exact rung: times fewer GPU-hours than rung 1", "", "times_fewer_than_rung_1", 100),
    Question("7B-shaped prior, last exact rung: times fewer GPU-hours than rung 2", "", "times_fewer_than_rung_2", 10),
)


def figures(out: Path) -> dict[str, Any]:
    """Return the figures of the kernels' cells, of the ladder and of the update; a file that is not there has none."""
    kernels, ladder, update = (read(out / f"{name}.json") for name in ("kernels", "ladder", "update"))
    return {
        "kernels": {} if kernels is None else kernel_figures(kernels),
        "ladder": {} if ladder is None else ladder_figures(ladder),
        "update_ms_per_minibatch": {} if update is None else update_figures(update),
    }


def read(path: Path) -> Any:
    """Return what a file holds; None where there is none, or where a part that was stopped left half of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def kernel_figures(result: dict[str, Any]) -> dict[str, Any]:
    """Return cell -> implementation -> figures, by the GPU's own clock."""
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for one in result["benchmarks"]:
        x = one["extra_info"]
        if "device_s" in x:
            shape = "x".join(map(str, x["shape"]))
            name = " ".join(filter(None, (x["op"], shape, x["dtype"], x.get("entry"))))
            found = {"us": 1e6 * x["device_s"], "share_of_copy_bandwidth": x["ratio_to_copy"]}
            found |= {"gb_per_s": x["gb_per_s"], "copy_gb_per_s": x["copy_gb_per_s"]}
            cells.setdefault(name, {})[x["impl"]] = found
    for cell in cells.values():
        for impl, peer in (("reference", "eager"), ("inductor", "inductor")):
            for name in (name for name in FUSED if name in cell and impl in cell):
                cell[name][f"times_faster_than_{peer}"] = cell[impl]["us"] / cell[name]["us"]
    return cells


def ladder_figures(result: dict[str, Any]) -> dict[str, Any]:
    """Return each arm's GPU-hours, how many times fewer than those of rungs 1 and 2, and the last exact rung's.

    By rounds, as the report; where no round was finished by the warm-ups, which is said.
    """
    arms = result["arms"]
    by_rounds = all(arm["rounds"] for arm in arms.values())
    times = {name: arm["rounds"] if by_rounds else [arm["warm_up"]] for name, arm in arms.items()}
    hours = {name: [one["wall_s"] / one["env_steps"] * PER_MILLION for one in each] for name, each in times.items()}
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        found[name] = {"tag": arm["tag"], "gpu_hours_per_million_steps": statistics.median(hours[name])}
        for base in (base for base in ("1 first user", "2 careful user") if base in hours):
            pairs = zip(hours[base], hours[name], strict=False)
            found[name][f"times_fewer_than_rung_{base[0]}"] = statistics.median(a / b for a, b in pairs)
    exact = [name for name, arm in arms.items() if arm["tag"] == "exact" and name[0].isdigit()]
    last = {"last_exact_rung": exact[-1], **found[exact[-1]]} if exact else {}
    about = {name: result.get(name) for name in ("backbone", "weights", "carried", "skipped")}
    return {**last, "measured_by": "rounds" if by_rounds else "warm-ups alone", "arms": found, **about}


def update_figures(result: dict[str, Any]) -> dict[str, float]:
    """Return milliseconds per minibatch, by rows and arm."""
    found = [one["extra_info"] for one in result["benchmarks"]]
    return {f"{x['rows']} rows, {x['impl']}": x["ms_per_minibatch"] for x in found if "ms_per_minibatch" in x}


def answers(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each question and fused implementation: wanted, measured, and whether the one meets the other.

    What was not measured is None, and met by nobody.
    """
    lines = []
    for question in QUESTIONS:
        for impl in FUSED if question.cell else ("",):
            where = found["kernels"].get(question.cell, {}).get(impl, {}) if impl else found["ladder"]
            value = where.get(question.figure)
            met = value is not None and (value <= question.wanted if question.at_most else value >= question.wanted)
            line = {
                "question": question.text,
                "wanted": f"at {'most' if question.at_most else 'least'} {question.wanted:g}",
            }
            lines.append({**line, **({"impl": impl} if impl else {}), "measured": value, "met": met})
    return lines
