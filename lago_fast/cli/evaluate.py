"""`lago eval`: how often a trained policy, or a prior alone, solves its tasks."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.errors import RunExists, UnsupportedArgument, check_seed
from lago_fast.presets import EnvSettings, start_of

if TYPE_CHECKING:
    import numpy as np

    from lago_fast.evaluate import Act, TaskResult


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
    env: Annotated[Literal["metaworld", "clevr-robot"] | None, by_default("metaworld; a run knows its own")] = None
    """For a prior: the environment that it plays."""
    tasks: Annotated[
        tuple[str, ...], by_default("all whose words it knows"), tyro.conf.arg(aliases=["--families"])
    ] = ()
    """The tasks that are played; a run plays those of its training, and on CLEVR-Robot any family."""
    actions: Annotated[Literal["likeliest", "drawn"] | None, by_default("as in training")] = None
    """Take the likeliest action, or draw one; drawn is for discrete actions only."""
    max_episode_steps: Annotated[int | None, by_default("as in training")] = None
    """Steps per episode."""
    prior_mode: Annotated[Literal["exact", "amortised"] | None, by_default("exact")] = None
    """For a prior: which of its forms plays, itself or its student."""
    device: str = "cpu"
    """cpu, cuda, or auto for CUDA where there is one."""
    json: Annotated[Path | None, by_default("no file")] = None
    """Write the results to this file too."""
    video: Annotated[Path | None, by_default("no film")] = None
    """Write one episode of the first task, with its instruction, as a .gif or .mp4; CLEVR-Robot only."""

    def run(self) -> None:
        """Play, and print a table."""
        from lago_fast import runs
        from lago_fast.evaluate import evaluate, pool

        if self.episodes < 1:
            raise UnsupportedArgument(f"episodes: {self.episodes}; play at least 1 per task")
        check_seed("seed", self.seed)
        for name, path in (("json", self.json), ("video", self.video)):
            if path is not None and path.exists():
                raise RunExists(f"{name}: {path} exists already; name another file")
        if not self.path.is_dir():
            raise UnsupportedArgument(f"path: {self.path} is no folder; name one of `lago train` or `lago fit-prior`")
        device = inputs.check_device(self.device)
        player = self._run_player(device) if runs.is_run(self.path) else self._prior_player(device)
        self._film(player)
        results = evaluate(
            player.act,
            player.settings,
            episodes_per_task=self.episodes,
            seed=self.seed,
            instruction_table=player.table,
        )
        shown = {task: result.summary() for task, result in results.items()}
        if len(results) > 1:
            shown["all"] = pool(list(results.values())).summary()
        console.print_table(
            f"{self.path}, seed {self.seed}",
            ("task", "success", "95 % interval", "at the end", "return", "episodes"),
            [(task, *_cells(summary)) for task, summary in shown.items()],
        )
        splits = _splits(player.settings, results)
        if splits:
            rows = [
                (name, console.percent(row["success"]), console.interval(row["success_ci95"]), row["episodes"])
                for name, row in splits.items()
            ]
            console.print_table("by split", ("split", "success", "95 % interval", "episodes"), rows)
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            found = {"path": self.path, "seed": self.seed, "tasks": shown}
            runs.write_json(self.json, {**found, **({"splits": splits} if splits else {})})
            console.say(f"written to {self.json}")

    def _film(self, player: "_Player") -> None:
        """Write the film that is asked for."""
        from lago_fast.evaluate import evaluated_tasks
        from lago_fast.film import film_episode

        if self.video is None:
            return
        self.video.parent.mkdir(parents=True, exist_ok=True)
        task = evaluated_tasks(player.settings)[0]
        film_episode(player.act, player.settings, task, self.video, seed=self.seed, instruction_table=player.table)
        console.say(f"an episode of {task} is written to {self.video}")

    def _run_player(self, device: str) -> "_Player":
        from lago_fast import runs
        from lago_fast.envs.suites import suite_named
        from lago_fast.evaluate import known_tasks, rows_for
        from lago_fast.training import policy_actor

        settings = runs.from_plain(EnvSettings, runs.read_config(self.path)["env"])
        suite = suite_named(settings.env)
        if self.prior_mode is not None or (self.tasks and not suite.splits):
            raise UnsupportedArgument("tasks, prior_mode: a run plays the tasks of its training, without a prior")
        if self.env not in (None, settings.env):
            raise UnsupportedArgument(f"env: {self.path} was trained on {settings.env}; leave --env out")
        model, table = inputs.read_policy(self.path, settings, device)
        asked = self._as_asked(settings)
        table = rows_for(settings, suite.texts(known_tasks(asked)), table)
        return _Player(policy_actor(model, sample=asked.sample_actions, seed=self.seed), asked, table)

    def _prior_player(self, device: str) -> "_Player":
        from lago_fast.training import prior_actor

        prior = inputs.read_prior(self.path, self.prior_mode or "exact", device)
        start = start_of(self.env or EnvSettings.env).env
        tasks = self.tasks or tuple(inputs.known_tasks(prior, start.env))
        inputs.check_fits(prior, tasks, start.env)
        settings = self._as_asked(replace(start, tasks=tasks, eval_tasks=()))
        return _Player(prior_actor(prior, sample=settings.sample_actions, seed=self.seed), settings, None)

    def _as_asked(self, settings: EnvSettings) -> EnvSettings:
        """Return the settings of the env with this command's options in place of the training's."""
        from lago_fast.envs.suites import suite_named

        suite = suite_named(settings.env)
        if self.actions == "drawn" and not suite.discrete:
            raise UnsupportedArgument(f"actions: those of {suite.title} are not discrete; leave it out")
        drawn = settings.sample_actions if self.actions is None else self.actions == "drawn"
        return replace(
            settings,
            eval_tasks=self.tasks or settings.eval_tasks,
            sample_actions=drawn,
            max_episode_steps=inputs.steps_or(self.max_episode_steps, settings.max_episode_steps),
        )


class _Player(NamedTuple):
    act: "Act"
    settings: EnvSettings  # whose evaluated tasks are played
    table: "np.ndarray | None"  # a row per wording that the settings know


def _splits(settings: EnvSettings, results: "dict[str, TaskResult]") -> dict[str, Any]:
    """Return the success on each split whose tasks were all played, and on the splits together."""
    from lago_fast.envs.suites import suite_named
    from lago_fast.report import splits_of

    of_one = {"it": {task: [result] for task, result in results.items()}}
    found = splits_of(suite_named(settings.env), of_one, tuple(results))
    return {name: arms["it"] for name, arms in found["splits"].items()} if found else {}


def _cells(summary: dict[str, Any]) -> tuple[Any, ...]:
    return (
        console.percent(summary["success"]),
        console.interval(summary["success_ci95"]),
        console.percent(summary["success_at_end"]),
        summary["return"],
        summary["episodes"],
    )
