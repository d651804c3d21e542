"""`lago fit-prior`: stage 1, a language-model prior fitted to demonstrations."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.errors import UnsupportedArgument
from lago_fast.presets import EnvSettings, PriorSettings, start_of

if TYPE_CHECKING:
    from lago_fast.demos import Demonstrations


@dataclass(frozen=True, kw_only=True)
class FitPrior(Command):
    """Fit a prior over actions to demonstrations, on a pretrained language model.

    The folder that it writes is what `lago train --prior` reads: the prior, and a fast student of it.
    """

    env: Literal["metaworld", "clevr-robot"] = EnvSettings.env
    """The environment that was demonstrated."""
    eval_tasks: Annotated[tuple[str, ...], by_default("for CLEVR-Robot all families")] = EnvSettings.eval_tasks
    """Tasks whose words the prior is to know too, without a demonstration."""
    demos: Path
    """Dataset of `lago demos`."""
    out: Path
    """Folder of the new prior."""
    backbone: str = PriorSettings.backbone
    """The language model: a folder, or a name on the Hugging Face hub."""
    random_init: bool = False
    """Draw the language model's weights at random instead: a control that shows what pretraining adds."""
    finetune: Literal["frozen", "lora", "qlora", "full"] = "frozen"
    """Which of the language model's weights are fitted: none, small adapters, adapters on 4-bit weights, or all."""
    form: Literal["auto", "pooled", "prompt"] = "auto"
    """What it reads: the instruction as one vector (fast), or all its words; auto: by the kind of model."""
    attention: Literal["own", "prefix"] = PriorSettings.attention
    """Own: as the model was pretrained; prefix: an encoder's text does not see the state, which answers faster."""
    layers: int = PriorSettings.layers or 0
    """Use only so many of its first layers, which is faster; 0 for all."""
    head_hidden: Annotated[int | None, by_default("no such layer")] = None
    """Width of a hidden layer between the language model and the action."""
    state_path: Literal["token", "token_and_head"] = PriorSettings.state_path
    """Who reads the state: the language model alone, or the hidden layers behind it too."""
    wordings: int = PriorSettings.wordings
    """Ways to say its goal that each step is fitted in, one of them in a pass."""
    std: Literal["state_independent", "state_dependent", "fixed"] = PriorSettings.std
    """How the prior's standard deviation is found: one per action, by the state, or fixed at --std-init."""
    std_init: Annotated[float | None, by_default("0.5, or the floor of a fixed one")] = None
    """Standard deviation that the fit starts from."""
    std_floor: float = PriorSettings.std_floor
    """Smallest standard deviation that the prior answers with; experts alone would drive it to zero."""
    loss: Literal["nll", "mse"] = PriorSettings.loss
    """Negative log-likelihood, or squared error of the mean action."""
    epochs: int = PriorSettings.epochs
    """Passes over the demonstrations, at most."""
    batch_size: int = PriorSettings.batch_size
    """Steps of the demonstrations per update."""
    learning_rate: float = PriorSettings.learning_rate
    """Largest learning rate."""
    weight_decay: float = 1e-4
    """Pull of the weights towards zero."""
    input_noise: float = PriorSettings.input_noise
    """Noise on the states while fitting, in standard deviations; makes the prior less brittle."""
    wording_noise: float = PriorSettings.wording_noise
    """Noise on the instructions' latents while fitting: the prior carries over to more wordings; encoders only."""
    val_fraction: float = 0.1
    """Share of each task's episodes that is held out to measure the prior; 0 for none."""
    patience: int = PriorSettings.patience
    """Stop after so many passes without a better result on the held-out episodes."""
    max_seconds: Annotated[float | None, by_default("no limit")] = None
    """Stop after so many seconds."""
    gradient_checkpointing: bool = False
    """Compute the language model's layers twice instead of keeping them: less memory, more time."""
    gradient_accumulation_steps: int = 1
    """Read each batch in so many parts, one after the other: the same fit in less memory."""
    quantization: Literal["none", "bf16", "int8", "nf4", "fp8"] = "none"
    """Bits of the language model's weights once it is fitted: less memory, and answers that are a little off."""
    max_quantization_kl: float = 0.05
    """How far off, in nats on average, they may be for `lago train` to take the prior."""
    trust_rows: int = 512
    """Demonstrated states to remember, by which each answer says how far it may be trusted; 0 for none."""
    no_student: bool = False
    """Leave out the fast student that --prior-mode amortised uses."""
    student_epochs: int = PriorSettings.student_epochs
    """Passes of the student over its states."""
    student_episode_steps: int = EnvSettings.max_episode_steps
    """Length of the episodes that the student plays to find more states, as in the training to come."""
    seed: int = PriorSettings.seed
    """Decides split, initial weights and order."""
    device: str = "cpu"
    """cpu, cuda, or auto for CUDA where there is one."""
    overwrite: bool = False
    """Replace the prior that is already at --out."""

    @classmethod
    def start(cls, preset: str, env: str) -> "FitPrior":
        """Return the settings of an environment's preset."""
        del preset
        start = start_of(env)
        same = ("std", "std_floor", "loss", "epochs", "batch_size", "learning_rate", "input_noise", "patience")
        more = ("head_hidden", "state_path", "attention", "wordings", "wording_noise", "student_epochs")
        chosen: dict[str, Any] = {name: getattr(start.prior, name) for name in (*same, *more)}
        steps, tasks = start.env.max_episode_steps, start.env.eval_tasks
        chosen |= {"layers": start.prior.layers or 0, "student_episode_steps": steps, "eval_tasks": tasks}
        return cls(env=start.env.env, demos=tyro.MISSING, out=tyro.MISSING, **chosen)

    def run(self) -> None:
        """Fit, print what was measured, and save."""
        from lago_fast.envs.suites import suite_named
        from lago_fast.priors.finetune import fit_prior
        from lago_fast.priors.folder import check_free
        from lago_fast.stage_one import paraphrases

        if not self.no_student and self.student_epochs < 1:
            raise UnsupportedArgument(f"student_epochs: {self.student_epochs}; give at least 1, or pass --no-student")
        check_free(self.out, overwrite=self.overwrite)
        device = inputs.check_device(self.device)
        demos, suite = inputs.read_demos(self.demos, self.env), suite_named(self.env)
        suite.check_evaluated(demos.tasks, self.eval_tasks)
        gaussian = self._gaussian(demos)
        instructions = suite.texts(list(dict.fromkeys((*demos.tasks, *self.eval_tasks))))
        with console.progress_bar() as advance:
            prior = fit_prior(
                demos.states,
                demos.actions,
                paraphrases(demos, instructions, self.seed, self.wordings, suite=suite),
                demos.episode_id,
                instructions,
                task_id=demos.task_id,
                num_actions=demos.num_actions,
                backbone=self.backbone,
                random_init=self.random_init,
                finetune=self.finetune,
                form=None if self.form == "auto" else self.form,
                layers=self.layers or None,
                head_hidden=self.head_hidden,
                state_path=self.state_path,
                attention=self.attention,
                **gaussian,
                loss=self.loss,
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.learning_rate,
                weight_decay=self.weight_decay,
                input_noise=self.input_noise,
                wording_noise=self.wording_noise,
                val_fraction=self.val_fraction,
                patience=self.patience,
                max_seconds=self.max_seconds,
                gradient_checkpointing=self.gradient_checkpointing,
                gradient_accumulation_steps=self.gradient_accumulation_steps,
                quantization=self.quantization,
                max_quantization_kl=self.max_quantization_kl,
                trust_rows=self.trust_rows,
                seed=self.seed,
                device=device,
                progress=lambda at: advance("fitting, passes over the demonstrations", at["epoch"], at["epochs"]),
            )
        prior.save(self.out, overwrite=self.overwrite)
        console.print_facts("prior", prior.metrics)
        if not self.no_student:
            console.hint("distilling the student")
            student = inputs.distil(
                prior,
                demos,
                replace(start_of(self.env).env, max_episode_steps=self.student_episode_steps),
                seed=self.seed,
                epochs=self.student_epochs,
            )
            student.save(self.out / inputs.STUDENT)
            console.print_facts("student", student.metrics)
        env = "" if self.env == EnvSettings.env else f"--env {self.env} "
        console.say(f"written to {self.out}; next: lago train {env}--prior {console.quoted(self.out)} --out runs/lago")

    def _gaussian(self, demos: "Demonstrations") -> dict[str, Any]:
        """Return what a fit to continuous actions is told; UnsupportedArgument where it would be ignored."""
        from lago_fast.stage_one import STD_INIT

        if demos.num_actions is None:
            usual = self.std_floor if self.std == "fixed" else STD_INIT
            return {
                "action_low": demos.action_low.tolist(),
                "action_high": demos.action_high.tolist(),
                "std": self.std,
                "std_init": usual if self.std_init is None else self.std_init,
                "std_floor": self.std_floor,
            }
        start = start_of(self.env).prior
        unset: dict[str, Any] = {"std": start.std, "std_init": None, "std_floor": start.std_floor}
        for name, value in unset.items():
            if getattr(self, name) != value:
                raise UnsupportedArgument(f"{name}: the actions of {self.env} are discrete and have none; leave it out")
        return {}
