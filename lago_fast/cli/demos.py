"""`lago demos`: record the scripted experts, or measure all of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.errors import RunExists, UnsupportedArgument
from lago_fast.presets import DemoSettings, EnvSettings, start_of

_FULL_LENGTH = {"metaworld": 500, "clevr-robot": 50}  # steps of the environment's own episodes


@dataclass(frozen=True, kw_only=True)
class Demos(Command):
    """Record demonstrations of an environment's scripted experts.

    They become a Minari dataset that `lago fit-prior` reads. With --table nothing is recorded: the experts
    are played, and a table says how often each succeeds.
    """

    env: Literal["metaworld", "clevr-robot"] = EnvSettings.env
    """The environment."""
    tasks: Annotated[
        tuple[str, ...], by_default("those of the preset; with --table all"), tyro.conf.arg(aliases=["--families"])
    ] = ()
    """Names such as drawer-open push, or CLEVR-Robot's families such as real."""
    episodes: Annotated[int | None, by_default("as in the preset; with --table 20")] = None
    """Episodes per task."""
    out: Annotated[Path | None, by_default("none")] = None
    """Folder of the new dataset; needed unless --table is given."""
    action_noise: float = DemoSettings.action_noise
    """Standard deviation of noise on the expert's actions, which lie in -1..1; 0 for none, and for CLEVR-Robot."""
    noisy_tasks: Annotated[tuple[str, ...], by_default("all")] = ()
    """The tasks whose expert gets that noise."""
    success_only: bool = False
    """Keep only episodes in which the task was solved."""
    seed: int = DemoSettings.seed
    """Decides start positions, goals, wording and noise."""
    max_episode_steps: Annotated[int | None, by_default("as in training; with --table 500")] = None
    """Steps per episode."""
    overwrite: bool = False
    """Replace the dataset that is already at --out."""
    table: bool = False
    """Record nothing; print how often each expert succeeds."""
    json: Annotated[Path | None, by_default("no file")] = None
    """With --table: write its rows to this file too."""

    def run(self) -> None:
        """Record, or play and print."""
        if self.table:
            self._measure()
        else:
            self._record()

    def _record(self) -> None:
        from lago_fast.demos import load_demos, record_demos

        if self.out is None:
            raise UnsupportedArgument("out: name the folder of the new dataset, for example --out runs/demos")
        if self.json is not None:
            raise UnsupportedArgument("json: only --table has rows to write; leave it out, or add --table")
        start = start_of(self.env)
        with console.progress_bar() as advance:
            path = record_demos(
                self.tasks or start.env.tasks,
                start.demos.episodes_per_task if self.episodes is None else self.episodes,
                self.out,
                action_noise=self.action_noise,
                noisy_tasks=self.noisy_tasks,
                success_only=self.success_only,
                seed=self.seed,
                max_episode_steps=inputs.steps_or(self.max_episode_steps, start.env.max_episode_steps),
                num_envs_per_task=start.demos.num_envs_per_task,
                overwrite=self.overwrite,
                env=self.env,
                progress=advance,
            )
        demos = load_demos(path)
        rows = []
        for k, task in enumerate(demos.tasks):
            mine = demos.task_id == k
            episodes = sorted(set(demos.episode_id[mine].tolist()))
            success = console.percent(float(demos.success[episodes].mean()))
            rows.append((task, len(episodes), int(mine.sum()), success))
        console.print_table("demonstrations", ("task", "episodes", "steps", "success"), rows)
        env = "" if self.env == EnvSettings.env else f"--env {self.env} "
        console.say(f"written to {path}; next: lago fit-prior {env}--demos {console.quoted(self.out)} --out runs/prior")

    def _measure(self) -> None:
        from lago_fast.demos import expert_table
        from lago_fast.runs import write_json

        for name, given in (
            ("out", self.out),
            ("noisy_tasks", self.noisy_tasks),
            ("success_only", self.success_only),
            ("overwrite", self.overwrite),
        ):
            if given:
                raise UnsupportedArgument(f"{name}: --table records nothing; leave out one of the two")
        if self.json is not None and self.json.exists():
            raise RunExists(f"json: {self.json} exists already; name another file")
        with console.progress_bar() as advance:
            rows = expert_table(
                self.tasks or None,
                20 if self.episodes is None else self.episodes,
                action_noise=self.action_noise,
                seed=self.seed,
                max_episode_steps=inputs.steps_or(self.max_episode_steps, _FULL_LENGTH[self.env]),
                env=self.env,
                progress=advance,
            )
        console.print_table(
            "scripted experts",
            ("task", "episodes", "success", "at the end", "return"),
            [_cells(row) for row in rows],
        )
        good = sum(row["success"] >= 0.8 for row in rows)
        console.say(f"{good} of {len(rows)} succeed in 80 % of the episodes or more")
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.json, {"experts": rows, "at_80_percent": good})
            console.say(f"written to {self.json}")


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    success, at_end = console.percent(row["success"]), console.percent(row["success_at_end"])
    return row["task"], row["episodes"], success, at_end, row["return"]
