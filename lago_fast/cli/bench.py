"""`lago bench`: env steps per second on this machine, and where the time goes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.cores import use_torch_threads
from lago_fast.errors import RunExists, UnsupportedArgument
from lago_fast.presets import EnvSettings, Experiment, TrainSettings

if TYPE_CHECKING:
    from lago_fast.priors.base import ActionPrior


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure training speed: env steps per second, and where the time goes.

    The arms take turns, one rollout with its update each: bare stepping without a learner, FastKLPPO without a
    prior and with each form of --prior, Stable-Baselines3's PPO on the same simulators and on Python Meta-World.
    """

    prior: Annotated[Path | None, by_default("none")] = None
    """Folder of `lago fit-prior`; its exact form is timed, and its student where there is one."""
    tasks: tuple[str, ...] = ("push",)
    """Names such as drawer-open push."""
    num_envs: int = 64
    """Simulators side by side, in all; a multiple of the number of tasks."""
    groups: Annotated[int | None, by_default("2 for 16 simulators per task, else 1")] = None
    """Groups of simulators that step in turn; with 2 the policy answers for one while the other steps."""
    max_episode_steps: int = 500
    """Steps per episode."""
    n_steps: int = 128
    """Steps of each simulator between two updates."""
    batch_size: int = 2048
    """Steps per gradient step."""
    n_epochs: int = 10
    """Passes over the collected steps per update."""
    rounds: int = 5
    """Timed rollouts of each arm; the median is shown."""
    python: bool = False
    """Time Python Meta-World too, which takes a minute or more."""
    torch_threads: Annotated[int | None, by_default("one per usable core")] = None
    """Threads of the learner's updates and the prior; a policy that acts has one, as simulators use the others."""
    device: str = "cpu"
    """cpu, cuda, or auto for CUDA where there is one."""
    json: Annotated[Path | None, by_default("no file")] = None
    """Write the results to this file too."""

    def run(self) -> None:
        """Measure, and print two tables."""
        from lago_fast import runs, throughput
        from lago_fast.checks import check_trainer

        if self.rounds < 1:
            raise UnsupportedArgument(f"rounds: {self.rounds}; time at least 1")
        if self.json is not None and self.json.exists():
            raise RunExists(f"json: {self.json} is there already; name another file")
        use_torch_threads(self.torch_threads)
        experiment = self._experiment()
        check_trainer(experiment.env, experiment.train, (0,))
        priors: dict[str, ActionPrior | None] = {"ppo": None, **self._priors(experiment.train.device)}
        table, _ = inputs.instruction_table(experiment.env, priors.get("lago_exact"), None)  # type: ignore[arg-type]
        console.hint("measuring")
        rates = throughput.interleaved(experiment, table, priors, self.rounds)
        python = throughput.on_python(experiment, throughput.plainest_rows(self.tasks, table)) if self.python else {}
        windows = {**rates.windows, **{name: [rate] for name, rate in python.items()}}
        print_rates(windows)
        steps = self.rounds * throughput.rollouts_of(experiment) * self.n_steps * self.num_envs
        for arm, stages in rates.stages.items():
            console.print_stages(f"where the time of {arm} went", stages, steps)
        if self.json is not None:
            about = {"settings": experiment, "windows": windows, "stages": rates.stages, **runs.provenance()}
            self.json.parent.mkdir(parents=True, exist_ok=True)
            runs.write_json(self.json, about)
            console.say(f"written to {self.json}")

    def _experiment(self) -> Experiment:
        return Experiment(
            env=EnvSettings(
                tasks=self.tasks,
                num_envs=self.num_envs,
                max_episode_steps=self.max_episode_steps,
                groups=self.groups,
            ),
            train=TrainSettings(
                n_steps=self.n_steps,
                batch_size=self.batch_size,
                n_epochs=self.n_epochs,
                device=inputs.check_device(self.device),
            ),
        )

    def _priors(self, device: str) -> "dict[str, ActionPrior]":
        """Return the forms of the prior that lie in its folder."""
        if self.prior is None:
            return {}
        forms = {"lago_exact": inputs.read_prior(self.prior, inputs.EXACT, device)}
        if inputs.has_student(self.prior):
            forms["lago_amortised"] = inputs.read_prior(self.prior, inputs.STUDENT, device)
        for prior in forms.values():
            inputs.check_fits(prior, self.tasks, EnvSettings.env)
        return dict(forms)


def print_rates(windows: dict[str, list[float]]) -> None:
    """Print env steps per second of each arm, median and range, and as a share of bare stepping."""
    from statistics import median

    raw = median(windows["raw"])
    rows: list[tuple[Any, ...]] = [
        (arm, median(rates), min(rates), max(rates), console.percent(median(rates) / raw))
        for arm, rates in windows.items()
    ]
    console.print_table("env steps per second", ("arm", "median", "least", "most", "of raw"), rows)
