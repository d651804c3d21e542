"""`lago train`: stage 2, one arm with one seed in one run folder."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.cli.prior_options import PriorOptions
from lago_fast.cli.recorded import recorded_settings
from lago_fast.cores import use_torch_threads
from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.presets import EnvSettings, Experiment, TrainSettings, start_of

if TYPE_CHECKING:
    import numpy as np

    from lago_fast.demos import Demonstrations

GUIDANCE = (  # training settings that say how a prior guides, other than by what is left out
    "kl_coef",
    "kl_coef_end",
    "kl_coef_until",
    "kl_direction",
    "guard_floor",
    "imitate_passes",
    "prior_mode",
)


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train PPO, guided by a prior or not.

    Arms: lago is PPO drawn towards the prior of --prior. ppo is PPO alone. bc_ppo is PPO that starts from a
    copy of the demonstrations of --demos. lago_random_init is lago with a prior fitted with --random-init.
    """

    arm: Literal["lago", "ppo", "bc_ppo", "lago_random_init"] = "lago"
    """What guides PPO: a prior, nothing, cloned demonstrations, or the control's prior."""
    out: Path
    """Folder of the new run."""
    prior: Annotated[Path | None, by_default("none")] = None
    """Folder of `lago fit-prior`; the arms lago and lago_random_init need it."""
    demos: Annotated[Path | None, by_default("none")] = None
    """Dataset of `lago demos`; bc_ppo needs it, and lago can distil the prior's student on it."""
    seed: int = 0
    """Decides initial weights, start positions, goals and wording."""
    instruction_encoder: Annotated[str | None, by_default("the prior's")] = None
    """Language model that encodes the instruction for the policy, with several goals."""
    torch_threads: Annotated[int | None, by_default("one per usable core")] = None
    """Threads of the learner's updates and the prior; a policy that acts has one, as simulators use the others."""
    num_threads: Annotated[int | None, by_default("the cores shared among the tasks")] = None
    """Threads of each task's simulators."""
    profile: bool = False
    """Print where the time went, stage by stage; provenance.json and the log keep it in any case."""
    overwrite: bool = False
    """Replace the run that is already at --out."""
    resume: bool = False
    """Go on with the run at --out from its last whole iteration; all settings are the run's own."""
    checkpoint_every: int = 25
    """Iterations between two checkpoints, from which --resume goes on."""
    env: tyro.conf.OmitArgPrefixes[EnvSettings] = field(default_factory=EnvSettings)
    train: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)
    asking: tyro.conf.OmitArgPrefixes[PriorOptions] = field(default_factory=PriorOptions)

    @classmethod
    def start(cls, preset: str, env: str) -> "Train":
        """Return the settings of an environment's preset, with a student only for who asks for it."""
        del preset
        settings = start_of(env)
        return cls(out=tyro.MISSING, env=settings.env, train=replace(settings.train, prior_mode="exact"))

    def run(self) -> None:
        """Check every input, train, and print how it went."""
        (as_recorded(self) if self.resume else self)._train()

    def _train(self) -> None:
        from lago_fast import report, runs
        from lago_fast.algorithms.stopping import StopOnSignals
        from lago_fast.envs.suites import suite_named
        from lago_fast.evaluate import known_tasks
        from lago_fast.training import train_run

        use_torch_threads(self.torch_threads)
        if not self.resume:
            runs.check_free(self.out, overwrite=self.overwrite)
        suite = suite_named(self.env.env)
        suite.check_evaluated(self.env.tasks, self.env.eval_tasks)
        self._check_inputs(suite.speaks(self.env.tasks))
        train = inputs.check_training(self.train)
        demos = None if self.demos is None else inputs.read_demos(self.demos, self.env.env)
        prior = None
        if self.prior is not None:
            prior = inputs.read_prior(self.prior, train.prior_mode, train.device, demos, self.env)
            inputs.check_fits(prior, known_tasks(self.env), self.env.env)
            self._check_control(inputs.exact_of(prior).reference["random_init"])
        if self.resume:
            table, encoder = runs.load_table(self.out.expanduser()), None
        else:
            table, encoder = inputs.instruction_table(self.env, prior, self.instruction_encoder)
        cache = None if prior is None else self.asking.apply(prior)
        cloned = self._cloned(demos, table) if demos is not None and self.arm == "bc_ppo" else None
        guide = None if prior is None else {"folder": self.prior, **inputs.digests(prior)}
        folder = self._reopened() if self.resume else self._opened(train, guide, table, encoder)
        try:
            with console.progress_bar() as advance, StopOnSignals() as stop:
                result = train_run(
                    self.arm,
                    self.seed,
                    Experiment(arms=(self.arm,), seeds=(self.seed,), env=self.env, train=train),
                    folder=folder,
                    table=table,
                    prior=cache or prior,
                    demonstrations=cloned,
                    num_threads=self.num_threads,
                    progress=lambda done, total: advance(f"training {self.arm}, steps", done, total),
                    resume=self.resume,
                    stop=stop,
                    checkpoint_every=self.checkpoint_every,
                )
        except SystemExit:
            console.hint(f"go on with: lago train --resume --out {console.quoted(self.out)}")
            raise
        stages = report.stages([result.stage_s])
        runs.note(folder, implementations=result.model.impls, overlap=result.model.overlap, stages=stages)
        if cache is not None:
            runs.note(folder, prior_cache=cache.cache.stats())
            console.print_facts("cache of the prior's answers", cache.cache.stats())
            cache.close()
        console.print_training(result.curve)
        if self.profile:
            console.print_stages("where the time went", stages, result.env_steps)
        if result.audit_kl_nats is not None:
            console.say(f"student to prior: {result.audit_kl_nats:.3f} nats on average")
        speed = result.env_steps / result.wall_s
        console.say(f"{result.env_steps:,} steps in {result.wall_s:.0f} s, {speed:,.0f} per second")
        console.say(f"written to {folder}; next: lago eval {console.quoted(self.out)}")

    def _opened(self, train: TrainSettings, prior: Any, table: "np.ndarray | None", encoder: Any) -> Path:
        """Make the run folder, with all settings in it."""
        from lago_fast import runs
        from lago_fast.checks import check_trainer

        about = {
            "arm": self.arm,
            "seed": self.seed,
            "env": self.env,
            "train": train,
            "prior": prior,
            "asking": self.asking,
            "demos": self.demos,
            "instruction_encoder": encoder,
        }
        # refuses settings of env and trainer while the run that it would replace is still there
        check_trainer(self.env, train, (self.seed,), table, self.num_threads)
        folder = runs.open_run(self.out, about, overwrite=self.overwrite)
        runs.save_table(folder, table)
        return folder

    def _reopened(self) -> Path:
        """Note in the run folder that it is resumed."""
        from lago_fast import runs

        folder = self.out.expanduser().absolute()
        before = runs.read_json(folder / runs.PROVENANCE).get("resumed", [])
        runs.note(folder, resumed=[*before, {**runs.code_version(), "command_line": sys.argv}])
        return folder

    def _check_inputs(self, speaks: bool) -> None:
        """Raise UnsupportedArgument when the arm lacks an input, or would ignore one."""
        from lago_fast.training import check_student

        guided = self.arm.startswith("lago")
        self.asking.check(self.arm, guided, self.train.prior_mode)
        if guided:
            check_student(self.env, self.train)
        usual = self.start("", self.env.env).train
        given = [name for name in GUIDANCE if getattr(self.train, name) != getattr(usual, name)]
        if given and not guided:
            raise UnsupportedArgument(f"{given[0]}: the arm {self.arm} has no prior; leave it out, or take --arm lago")
        if guided and self.prior is None:
            raise UnsupportedArgument(
                f"prior: the arm {self.arm} needs one; make it with `lago fit-prior` and name its folder"
            )
        if not guided and self.prior is not None:
            raise UnsupportedArgument(f"prior: the arm {self.arm} has no use for it; leave it out, or take --arm lago")
        if self.arm == "bc_ppo" and self.demos is None:
            raise UnsupportedArgument("demos: the arm bc_ppo needs them; record them with `lago demos`")
        distils = guided and self.train.prior_mode == "amortised"
        if self.demos is not None and self.arm != "bc_ppo" and not distils:
            raise UnsupportedArgument(
                f"demos: the arm {self.arm} with --prior-mode {self.train.prior_mode} has no use for them; "
                "leave them out"
            )
        if self.instruction_encoder is not None and not speaks:
            raise UnsupportedArgument("instruction_encoder: with one task the policy sees no instruction; leave it out")

    def _check_control(self, random_init: bool) -> None:
        """Raise PriorMismatch when a result would carry the wrong name."""
        if random_init != (self.arm == "lago_random_init"):
            weights, arm = ("random", "lago_random_init") if random_init else ("pretrained", "lago")
            raise PriorMismatch(
                f"prior: the language model of {self.prior} has {weights} weights, so the arm is {arm}; "
                f"take --arm {arm}, or another prior"
            )

    def _cloned(self, demos: "Demonstrations", table: "np.ndarray | None") -> "tuple[np.ndarray, np.ndarray]":
        """Return the demonstrations of the trained tasks, [n, O] as the policy sees them, and their actions."""
        from lago_fast.envs.suites import suite_named
        from lago_fast.stage_one import paraphrase
        from lago_fast.training import observations

        wanted, suite = inputs.only_tasks(demos, self.env.tasks), suite_named(self.env.env)
        ids = paraphrase(wanted, suite.texts(self.env.tasks), self.seed, suite=suite)
        return observations(wanted.states, ids, table), wanted.actions


def as_recorded(command: Train) -> Train:
    """Return the command with the settings of the run at its --out.

    Raises:
        UnsupportedArgument: no run of `lago train` is there, or an option says something else than it did.
    """
    if command.overwrite:
        raise UnsupportedArgument("overwrite: --resume goes on with the run that --overwrite would delete; take one")
    if command.instruction_encoder is not None:
        raise UnsupportedArgument("instruction_encoder: --resume reads the run's own table; leave it out")
    settings = recorded_settings(command.out)
    plain = Train(out=command.out)
    for name, value in settings.items():
        if getattr(command, name) not in (getattr(plain, name), value):
            raise UnsupportedArgument(
                f"{name}: the run at {command.out} was made with {value}, and --resume goes on with it; leave it out"
            )
    return replace(command, **settings)
