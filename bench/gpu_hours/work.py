"""The fixed work of the comparison, and its stage 1: what protocol.md names, as data.

Test: pytest tests/bench/test_gpu_hours.py
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lago_fast.demos import Demonstrations, load_demos, record_demos
from lago_fast.envs.metaworld import ACTION_DIM, STATE_DIM
from lago_fast.envs.metaworld_tasks import task_phrasings
from lago_fast.evaluate import evaluate
from lago_fast.presets import STUDENT, EnvSettings, Experiment, PriorSettings
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.config import Attention, PriorConfig
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.locate import DEFAULT_BACKBONE
from lago_fast.priors.quantize import quantize_prior
from lago_fast.priors.student import StudentConfig
from lago_fast.stage_one import StageOne, amortise, paraphrase
from lago_fast.training import prior_actor

DEMO_SEED, EVAL_SEED = 1000, 10_000  # apart from the seeds of training


@dataclass(frozen=True)
class Work:
    """One rollout and its update, the same for every rung and peer."""

    task: str = "push"
    max_episode_steps: int = 200
    num_envs: int = 64
    n_steps: int = 128
    batch_size: int = 2048
    n_epochs: int = 10
    net_arch: tuple[int, ...] = (64, 64)
    learning_rate: float = 6e-4
    gamma: float = 0.99
    log_std_init: float = -0.5
    kl_coef: float = 0.1
    seed: int = 0
    device: str = "cpu"
    slice_steps: int = 8  # of a rollout, in the slice of an arm that is too slow for a whole one
    slice_rows: int = 512  # of a minibatch or a rollout about which the language model is asked in such a slice
    demo_episodes: int = 5
    prompt_epochs: int = 10  # passes over the demonstrations when the full prompt is fitted
    pooled_epochs: int = 40
    student_epochs: int = 20
    eval_episodes: int = 64

    @property
    def env_steps(self) -> int:
        """Return the env steps of one iteration."""
        return self.num_envs * self.n_steps

    def ppo(self) -> dict[str, Any]:
        """Return the keywords of Stable-Baselines3's PPO."""
        return {
            "n_steps": self.n_steps,
            "batch_size": self.batch_size,
            "n_epochs": self.n_epochs,
            "learning_rate": self.learning_rate,
            "gamma": self.gamma,
            "device": self.device,
            "seed": self.seed,
            "policy_kwargs": {"net_arch": list(self.net_arch), "log_std_init": self.log_std_init},
        }


def add_work(parser: argparse.ArgumentParser, default: Work) -> None:
    """Add an option for every number and name of the work."""
    for field in fields(Work):
        value = getattr(default, field.name)
        if isinstance(value, int | float | str):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(value), default=value)


def work_of(options: argparse.Namespace) -> Work:
    """Return the work that was asked for."""
    return replace(Work(), **{f.name: getattr(options, f.name) for f in fields(Work) if hasattr(options, f.name)})


class Form(NamedTuple):
    """A form of the prior, and what is known of it."""

    prior: Any
    facts: dict[str, Any]  # one_off_s, and success or KL


class Stage(NamedTuple):
    """The forms of the prior that the rungs ask."""

    prompt: Form  # the full prompt for every state
    shared: Form  # prefix KV of a decoder (exact), of the pooled instruction of an encoder (refit)
    quantized: Form
    student: Form
    backbone: str
    shared_is: str  # "exact" or "refit"
    weights: str  # "pretrained" or "random"


def fitted(work: Work, quantization: str, folder: Path) -> Stage:
    """Return every form on MiniLM, fitted to demonstrations of the task and evaluated; kept in `folder` once made."""
    if not (folder / "demos").exists():
        steps = work.max_episode_steps
        record_demos([work.task], work.demo_episodes, folder / "demos", seed=DEMO_SEED, max_episode_steps=steps)
    demos = load_demos(folder / "demos")

    def kept(name: str, kind: Any, make: Callable[[], Form]) -> Form:
        facts = folder / f"{name}.json"
        if not facts.exists():
            form = make()
            form.prior.save(folder / name, overwrite=True)
            facts.write_text(json.dumps(form.facts) + "\n", encoding="utf-8")
        return Form(kind.load(folder / name, work.device), json.loads(facts.read_text(encoding="utf-8")))

    prompt = kept("prompt", LatentActionPrior, lambda: _fit(work, demos, "prompt"))
    shared = kept("shared", LatentActionPrior, lambda: _fit(work, demos, "pooled"))
    student = kept("student", AmortisedPrior, lambda: _student(shared.prior, work, demos))
    quantized = _quantized(shared.prior, quantization, torch.from_numpy(demos.states).to(work.device))
    return Stage(prompt, shared, quantized, student, DEFAULT_BACKBONE, "refit", "pretrained")


def _fit(work: Work, demos: Demonstrations, form: str) -> Form:
    texts = task_phrasings()[work.task]
    started, epochs = time.perf_counter(), work.prompt_epochs if form == "prompt" else work.pooled_epochs
    prior = fit_prior(
        demos.states,
        demos.actions,
        paraphrase(demos, texts, work.seed),
        demos.episode_id,
        texts,
        form=form,  # type: ignore[arg-type]
        attention=attention_of(form),
        loss="mse",
        std="fixed",
        std_init=0.2,
        epochs=epochs,
        batch_size=64,
        patience=epochs,
        device=work.device,
    )
    return Form(prior, {"one_off_s": time.perf_counter() - started, **_success(prior, work)})


def attention_of(form: str) -> Attention:
    """Return who sees whom: a pooled instruction does not see the state, so that its keys and values are kept."""
    return "prefix" if form == "pooled" else "own"


def shaped(work: Work, backbone_folder: Path, quantization: str) -> Stage:
    """Return forms on a backbone of random weights: their speed is that of its shape, and nobody learns from them."""
    from bench.bench_prior import drawn_backbone  # which needs pytest, as no other comparison does

    backbone = drawn_backbone(backbone_folder, torch.device(work.device))
    box = ((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)
    text, decoder = task_phrasings()[work.task][0], backbone.kind == "decoder"

    def build(form: str, prefix_kv: bool | None) -> Any:
        torch.manual_seed(work.seed)
        attention = attention_of(form)
        config = PriorConfig("gaussian", STATE_DIM, ACTION_DIM, *box, form=form, attention=attention)  # type: ignore[arg-type]
        prior = LatentActionPrior(config, backbone, [text], prefix_kv=prefix_kv)
        return prior.freeze().to(work.device)

    generator = torch.Generator().manual_seed(work.seed)
    states = torch.randn(work.slice_rows, STATE_DIM, generator=generator).to(work.device)
    prompt = build("prompt", False)
    # one transformer serves both: a copy of seven billion weights would fill the device
    shared = build("prompt", True) if decoder else build("pooled", None)
    quantized = _quantized(shared, quantization, states)
    student = _untaught_student(shared, states)
    facts = {"one_off_s": 0.0, "success": None}
    return Stage(
        Form(prompt, facts),
        Form(shared, facts),
        quantized,
        student,
        backbone_folder.name,
        "exact" if decoder else "refit",
        "random",
    )


def _quantized(exact: Any, quantization: str, states: torch.Tensor) -> Form:
    started, ids = time.perf_counter(), torch.zeros(len(states), dtype=torch.int64)
    prior = quantize_prior(exact, quantization, states, ids, max_quantization_kl=float("inf"))  # type: ignore[arg-type]
    return Form(
        prior,
        {
            "one_off_s": time.perf_counter() - started,
            "quantization": quantization,
            "kl_nats": prior.metrics["quantization"]["kl_nats"],
        },
    )


def _student(exact: Any, work: Work, demos: Demonstrations) -> Form:
    """Distil a student as the presets do, on demonstrated states and on those that it steers into."""
    started = time.perf_counter()
    env = EnvSettings(tasks=(work.task,), num_envs=work.num_envs, max_episode_steps=work.max_episode_steps)
    settings = PriorSettings(student_epochs=work.student_epochs, noisy_copies=1, rollout_noise=(0.3, 1.0))
    stage = StageOne(demos, exact, exact.instructions, None)
    student = amortise(stage, Experiment(env=env, prior=settings), work.seed)
    return Form(student, {"one_off_s": time.perf_counter() - started, "kl_nats": student.heldout_kl_nats})


def _untaught_student(exact: Any, states: torch.Tensor) -> Form:
    """Distil one on a few random states: of an exact prior with random weights only the speed is asked."""
    config = StudentConfig(**{**STUDENT, "fallback_kl": None, "refresh_kl": 1e9})
    student = AmortisedPrior(exact, config).fit(states, torch.zeros(len(states), dtype=torch.int64), epochs=1)
    return Form(student, {"one_off_s": 0.0, "success": None})


def _success(prior: Any, work: Work) -> dict[str, Any]:
    env = EnvSettings(tasks=(work.task,), num_envs=work.num_envs, max_episode_steps=work.max_episode_steps)
    results = evaluate(prior_actor(prior), env, episodes_per_task=work.eval_episodes, seed=EVAL_SEED)
    return results[work.task].summary()


def plain(work: Work) -> dict[str, Any]:
    """Return the work as JSON holds it."""
    return {**asdict(work), "env_steps": work.env_steps}
