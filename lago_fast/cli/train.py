"""`lago train`: stage 2, one arm with one seed in one run folder."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.presets import EnvSettings, Experiment, TrainSettings

if TYPE_CHECKING:
    import numpy as np

    from lago_fast.demos import Demonstrations


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train PPO on Meta-World, guided by a prior or not.

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
    """Language model that encodes the instruction for the policy, with several tasks."""
    torch_threads: int = 1
    """Threads of the learner; the simulators keep the other cores busy."""
    num_threads: Annotated[int | None, by_default("the cores shared among the tasks")] = None
    """Threads of each task's simulators."""
    profile: bool = False
    """Print where the time went, stage by stage; provenance.json and the log keep it in any case."""
    overwrite: bool = False
    """Replace the run that is already at --out."""
    env: tyro.conf.OmitArgPrefixes[EnvSettings] = field(default_factory=EnvSettings)
    train: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)

    def run(self) -> None:
        """Check every input, train, and print how it went."""
        import torch

        from lago_fast import report, runs
        from lago_fast.envs.metaworld import check_tasks
        from lago_fast.training import make_env, train_run

        torch.set_num_threads(self.torch_threads)
        runs.check_free(self.out, overwrite=self.overwrite)
        check_tasks(self.env.tasks)
        self._check_inputs()
        train = replace(self.train, device=inputs.check_device(self.train.device))
        demos = None if self.demos is None else inputs.read_demos(self.demos)
        prior = None
        if self.prior is not None:
            prior = inputs.read_prior(self.prior, train.prior_mode, train.device, demos, self.env.max_episode_steps)
            inputs.check_fits(prior, self.env.tasks)
            self._check_control(inputs.exact_of(prior).reference["random_init"])
        table, encoder = inputs.instruction_table(self.env.tasks, prior, self.instruction_encoder)
        cloned = self._cloned(demos, table) if demos is not None and self.arm == "bc_ppo" else None
        about = {
            "arm": self.arm,
            "seed": self.seed,
            "env": self.env,
            "train": train,
            "prior": None if prior is None else {"folder": self.prior, "digest": prior.digest},
            "demos": self.demos,
            "instruction_encoder": encoder,
        }
        # refuses settings of the env while the run that it would replace is still there
        make_env(self.env, self.seed, table, self.num_threads).close()
        folder = runs.open_run(self.out, about, overwrite=self.overwrite)
        runs.save_table(folder, table)
        with console.progress_bar() as advance:
            result = train_run(
                self.arm,
                self.seed,
                Experiment(arms=(self.arm,), seeds=(self.seed,), env=self.env, train=train),
                folder=folder,
                table=table,
                prior=prior,
                demonstrations=cloned,
                num_threads=self.num_threads,
                progress=lambda done, total: advance(f"training {self.arm}, steps", done, total),
            )
        stages = report.stages([result.stage_s])
        runs.note(folder, implementations=result.model.impls, stages=stages)
        console.print_training(result.curve)
        if self.profile:
            console.print_stages("where the time went", stages, result.env_steps)
        if result.audit_kl_nats is not None:
            console.say(f"student to prior: {result.audit_kl_nats:.3f} nats on average")
        speed = result.env_steps / result.wall_s
        console.say(f"{result.env_steps:,} steps in {result.wall_s:.0f} s, {speed:,.0f} per second")
        console.say(f"written to {folder}; next: lago eval {self.out}")

    def _check_inputs(self) -> None:
        """Raise UnsupportedArgument when the arm lacks an input, or would ignore one."""
        guided = self.arm.startswith("lago")
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
        if self.instruction_encoder is not None and len(self.env.tasks) == 1:
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
        """Return the demonstrations of the trained tasks, [n, O] as the policy sees them and [n, D]."""
        from lago_fast.envs.metaworld import task_phrasings
        from lago_fast.stage_one import paraphrase
        from lago_fast.training import observations

        wanted = inputs.only_tasks(demos, self.env.tasks)
        texts = [text for task in self.env.tasks for text in task_phrasings()[task]]
        return observations(wanted.states, paraphrase(wanted, texts, self.seed), table), wanted.actions
