"""`lago eval`: how often a trained policy, or a prior alone, solves its tasks."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.errors import RunExists, UnsupportedArgument
from lago_fast.presets import EnvSettings

if TYPE_CHECKING:
    from lago_fast.evaluate import TaskResult


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Play whole episodes without learning and count successes.

    The path is a run of `lago train`, whose policy plays, or a prior of `lago fit-prior`, which plays alone.
    The intervals are Wilson's, at 95 %.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a prior."""
    episodes: int = 50
    """Episodes per task."""
    seed: int = 10_000
    """Decides start positions, goals and wording; keep it apart from the seeds of training."""
    tasks: Annotated[tuple[str, ...], by_default("all that it was fitted on")] = ()
    """For a prior: the tasks that it plays; a run plays those of its training."""
    max_episode_steps: Annotated[int | None, by_default("as in training")] = None
    """Steps per episode."""
    prior_mode: Annotated[Literal["exact", "amortised"] | None, by_default("exact")] = None
    """For a prior: which of its forms plays, itself or its student."""
    device: str = "cpu"
    """cpu, cuda, or auto for CUDA where there is one."""
    json: Annotated[Path | None, by_default("no file")] = None
    """Write the results to this file too."""

    def run(self) -> None:
        """Play, and print a table."""
        from lago_fast import runs
        from lago_fast.evaluate import pool

        if self.episodes < 1:
            raise UnsupportedArgument(f"episodes: {self.episodes}; play at least 1 per task")
        if self.json is not None and self.json.exists():
            raise RunExists(f"json: {self.json} exists already; name another file")
        device = inputs.check_device(self.device)
        results = self._play_run(device) if runs.is_run(self.path) else self._play_prior(device)
        shown = {task: result.summary() for task, result in results.items()}
        if len(results) > 1:
            shown["all"] = pool(list(results.values())).summary()
        console.print_table(
            f"{self.path}, seed {self.seed}",
            ("task", "success", "95 % interval", "at the end", "return", "episodes"),
            [(task, *_cells(summary)) for task, summary in shown.items()],
        )
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            runs.write_json(self.json, {"path": self.path, "seed": self.seed, "tasks": shown})
            console.say(f"written to {self.json}")

    def _play_run(self, device: str) -> "dict[str, TaskResult]":
        from lago_fast import runs
        from lago_fast.evaluate import evaluate
        from lago_fast.training import policy_actor

        if self.tasks or self.prior_mode is not None:
            raise UnsupportedArgument("tasks, prior_mode: a run plays the tasks of its training, without a prior")
        settings = runs.from_plain(EnvSettings, runs.read_config(self.path)["env"])
        model, table = inputs.read_policy(self.path, settings, device)
        return evaluate(
            policy_actor(model),
            self._with_horizon(settings),
            episodes_per_task=self.episodes,
            seed=self.seed,
            instruction_table=table,
        )

    def _play_prior(self, device: str) -> "dict[str, TaskResult]":
        from lago_fast.envs.metaworld import task_phrasings
        from lago_fast.evaluate import evaluate
        from lago_fast.priors.base import match_instructions
        from lago_fast.training import prior_actor

        prior = inputs.read_prior(self.path, self.prior_mode or "exact", device)
        tasks = self.tasks or tuple(inputs.known_tasks(prior))
        inputs.check_fits(prior, tasks)
        # the env counts the wordings of these tasks alone, the prior those of all its tasks
        texts = [text for task in tasks for text in task_phrasings()[task]]
        prior_id, act = match_instructions(prior, texts).numpy(), prior_actor(prior)
        return evaluate(
            lambda view: act(view._replace(instruction_id=prior_id[view.instruction_id])),
            self._with_horizon(EnvSettings(tasks=tasks)),
            episodes_per_task=self.episodes,
            seed=self.seed,
        )

    def _with_horizon(self, settings: EnvSettings) -> EnvSettings:
        return replace(settings, max_episode_steps=self.max_episode_steps or settings.max_episode_steps)


def _cells(summary: dict[str, Any]) -> tuple[Any, ...]:
    return (
        console.percent(summary["success"]),
        console.interval(summary["success_ci95"]),
        console.percent(summary["success_at_end"]),
        summary["return"],
        summary["episodes"],
    )
