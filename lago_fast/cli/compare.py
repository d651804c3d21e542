"""`lago compare`: the whole experiment, arms times seeds, from demonstrations to a report."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.cores import use_torch_threads
from lago_fast.errors import UnsupportedArgument
from lago_fast.presets import PRESETS, Experiment

SHOWN = (  # of a report, below its tables
    "budget",
    "prior_mode",
    "audit_kl_nats",
    "warm_start",
    "imitation",
    "raw_env_steps_per_s",
    "sb3_env_steps_per_s",
    "sb3_envpool_env_steps_per_s",
    "physics",
    "mujoco",
    "torch_threads",
    "implementations",
    "wall_s",
)


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Compare PPO with and without guidance on the same tasks, budget, seeds and network.

    Records demonstrations, fits the prior, trains every arm with every seed, evaluates them, and writes
    report.json and curves.png. A preset sets everything; each option replaces one of its values.
    """

    preset: str = "demo"
    """Named settings to start from: demo and long on Meta-World, clevr and clevr-all on CLEVR-Robot."""
    out: Path
    """Folder of the comparison; it holds the demonstrations, the priors and one run per arm and seed."""
    overwrite: bool = False
    """Replace the comparison that is already at --out."""
    workers: int = 1
    """Training runs at a time; more is faster, but then no run's speed is its own."""
    torch_threads: Annotated[int | None, by_default("one per usable core")] = None
    """Threads of the learner's updates and the prior; a policy that acts has one, as simulators use the others."""
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)

    @classmethod
    def start(cls, preset: str, env: str) -> "Compare":
        """Return the comparison of a preset."""
        del env
        return cls(preset=preset, out=tyro.MISSING, experiment=preset_named(preset))

    def run(self) -> None:
        """Check the settings, run the experiment, and print its table."""
        from lago_fast import runs
        from lago_fast.experiment import compare

        if self.workers < 1:
            raise UnsupportedArgument(f"workers: {self.workers}; give 1 or more")
        use_torch_threads(self.torch_threads)
        runs.check_free(self.out, overwrite=self.overwrite)
        experiment = replace(self.experiment, train=inputs.check_training(self.experiment.train))
        with console.progress_bar() as advance:
            report = compare(
                experiment,
                self.out,
                overwrite=self.overwrite,
                workers=self.workers,
                report=console.hint,
                progress=advance,
            )
        print_report(report)
        console.say(f"report: {self.out / runs.REPORT}")
        console.say(f"curves: {self.out / runs.FIGURE}")


def preset_named(name: str) -> Experiment:
    """Return a preset.

    Raises:
        UnsupportedArgument: no such preset.
    """
    if name not in PRESETS:
        raise UnsupportedArgument(f"preset: {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def print_report(report: dict[str, Any]) -> None:
    """Print a comparison's arms: over all tasks, and success on each."""
    columns = ("arm", "success", "95 % interval", "at the end", "return", "steps/s", "steps per task to 90 %")
    console.print_table("all tasks", columns, [(arm, *_cells(row)) for arm, row in report["arms"].items()])
    tasks = report["tasks"]
    rows = [
        (
            arm,
            *(console.percent(tasks[task][arm]["success"]) if arm in tasks[task] else None for task in tasks),
        )
        for arm in report["arms"]
    ]
    console.print_table("success by task", ("arm", *tasks), rows)
    if "splits" in report:
        _print_splits(report)
    console.print_facts("about", {name: report[name] for name in SHOWN if name in report})


def _print_splits(report: dict[str, Any]) -> None:
    """Print each split's and the mean success, the cost of each arm, and what the paper says."""
    splits = report["splits"]
    columns = ("arm", *splits, "95 % interval of the mean", "hours", "core-hours")
    rows = [
        (
            arm,
            *(console.percent(splits[name][arm]["success"]) for name in splits),
            console.interval(splits["mean"][arm]["success_ci95"] if "mean" in splits else None),
            row["wall_s"] / 3600 or None,
            row["core_hours"],
        )
        for arm, row in report["arms"].items()
    ]
    paper = report["published"]
    for arm in ("ppo", "lago"):
        success = {"mean": f"{100 * paper[f'{arm}_success']:.1f} %"}
        hours = f"{paper['gpu_hours']} GPU-hours"
        rows.append((f"{arm}, the paper's", *(success.get(name) for name in splits), None, hours, None))
    console.print_table("success by split; the mean weighs each split alike", columns, rows)
    console.say(f"The paper is {paper['source']}: {paper['note']}, so that its rows cannot be set against ours.")
    if report["lago_minus_ppo"] is not None:
        gap = report["lago_minus_ppo"]
        points = " to ".join(f"{100 * bound:.1f}" for bound in gap["ci95"])
        console.say(f"LaGO's mean minus PPO's: {100 * gap['mean']:.1f} points ({points}).")


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        console.percent(row["success"]),
        console.interval(row["success_ci95"]),
        console.percent(row["success_at_end"]),
        row["return"],
        row["env_steps_per_s"],
        row["steps_to_90"],
    )
