"""What several commands read: devices, demonstrations, priors; checked before any work begins."""

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lago_fast.errors import DemonstrationError, DeviceUnavailable, PriorMismatch, UnsupportedArgument
from lago_fast.presets import EnvSettings, Experiment, TrainSettings, start_of

if TYPE_CHECKING:
    import numpy as np

    from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
    from lago_fast.demos import Demonstrations
    from lago_fast.priors.amortised import AmortisedPrior
    from lago_fast.priors.latent_action import LatentActionPrior

    Prior = AmortisedPrior | LatentActionPrior

STUDENT, EXACT = "amortised", "exact"  # a prior's folder may hold its student's; a student's holds its prior's
STUDENT_ENVS = 16  # envs per task in which a student plays for the states that it is taught on


def check_device(device: str) -> str:
    """Return the name of a device that torch can use here; "auto" is CUDA where there is one.

    Raises:
        DeviceUnavailable: CUDA was asked for and is not there.
        UnsupportedArgument: no name of a device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UnsupportedArgument(f"device: {device!r} names no device known here; use cpu, cuda or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceUnavailable(f"device: {device!r} was asked for, but there is no CUDA device; use cpu or auto")
    return device


def check_training(train: TrainSettings) -> TrainSettings:
    """Return the settings with the device that they come to here, before anything is replaced.

    Raises:
        DeviceUnavailable, UnsupportedArgument: see `check_device`; or a CUDA graph that cannot be had.
    """
    device = check_device(train.device)
    if train.cuda_graph:
        from lago_fast.algorithms.refusals import check_graph

        check_graph(device, train.overlap)
    return replace(train, device=device)


# runs


def read_policy(folder: Path, settings: EnvSettings, device: str) -> "tuple[FastKLPPO, np.ndarray | None]":
    """Return the policy of a run, and the table [M, r] of what it sees of the instructions.

    Raises:
        UnsupportedArgument: its training did not end, or its table is missing or of another run.
    """
    from lago_fast import runs
    from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
    from lago_fast.envs.suites import suite_named

    suite = suite_named(settings.env)
    table = runs.load_table(folder) if suite.speaks(settings.tasks) else None
    if not zipfile.is_zipfile(folder / runs.MODEL):
        raise UnsupportedArgument(
            f"path: {folder} has no readable {runs.MODEL}, its training did not end: train it again, "
            "or name one of the runs below it"
        )
    model = FastKLPPO.load(folder / runs.MODEL, device=device)
    width = suite.state_dim + (0 if table is None else table.shape[1])
    if model.observation_space.shape != (width,):
        raise UnsupportedArgument(
            f"path: the policy of {folder} reads observations of {model.observation_space.shape}, but "
            f"with its {runs.TABLE} they are ({width},): it is missing or of another run; train again"
        )
    return model, table


def steps_or(max_episode_steps: int | None, usual: int) -> int:
    """Return the length of an episode that was asked for, or the usual one; UnsupportedArgument for none at all."""
    if max_episode_steps is None:
        return usual
    if max_episode_steps < 1:
        raise UnsupportedArgument(f"max_episode_steps: {max_episode_steps}; give at least 1 step per episode")
    return max_episode_steps


# demonstrations


def read_demos(path: Path, env: str) -> "Demonstrations":
    """Return demonstrations of an environment's tasks.

    Raises:
        DemonstrationError: missing, empty, corrupt, or recorded in another space than the environment's.
        UnknownTask: of a task that the environment does not have.
    """
    from lago_fast.demos import load_demos
    from lago_fast.envs.suites import suite_named

    demos, suite = load_demos(path), suite_named(env)
    discrete = demos.num_actions is not None
    found = (demos.states.shape[1], demos.num_actions if discrete else demos.actions.shape[1])
    if (*found, discrete) != (suite.state_dim, suite.action_dim, suite.discrete):
        raise DemonstrationError(
            f"demos: {path} has {_spaces(*found, discrete)}, {suite.title} has "
            f"{_spaces(suite.state_dim, suite.action_dim, suite.discrete)}; record them with `lago demos`, "
            "or name their --env"
        )
    suite.check_tasks(demos.tasks)
    return demos


def _spaces(state_dim: int, action_dim: int | None, discrete: bool) -> str:
    return f"states of {state_dim} numbers and " + (
        f"{action_dim} discrete actions" if discrete else f"actions of {action_dim} numbers"
    )


def only_tasks(demos: "Demonstrations", tasks: Sequence[str]) -> "Demonstrations":
    """Return the steps of some tasks, in the order of `tasks`.

    Raises:
        DemonstrationError: there is no step of one of them.
    """
    import numpy as np

    missing = [task for task in tasks if task not in demos.tasks]
    if missing:
        raise DemonstrationError(
            f"demos: no episode of {', '.join(missing)}; record some with `lago demos`, or leave them out"
        )
    new_id = np.array([tasks.index(task) if task in tasks else -1 for task in demos.tasks])[demos.task_id]
    rows = new_id >= 0
    return demos._replace(
        states=demos.states[rows],
        actions=demos.actions[rows],
        instruction_id=demos.instruction_id[rows],
        episode_id=demos.episode_id[rows],
        task_id=new_id[rows],
        tasks=list(tasks),
    )


# priors


def read_prior(
    folder: Path,
    mode: str,
    device: str,
    demos: "Demonstrations | None" = None,
    env: EnvSettings | None = None,
) -> "Prior":
    """Return a saved prior (mode "exact") or its student ("amortised"), distilled on `demos` where given.

    Args:
        folder: of the prior, with its student in `amortised/`, or of a student, with its prior in `exact/`.
        mode: which of the two.
        device: where it is to answer.
        demos: of exactly the tasks that the prior was fitted on.
        env: of the training to come, in which a student plays while it is distilled; needed with `demos`.

    Raises:
        PriorMismatch: no prior there.
        HashMismatch: its files or its language model's were altered.
        UnsupportedArgument: another mode, or no student there and no demonstrations to distil one on.
    """
    from lago_fast.priors.amortised import AmortisedPrior
    from lago_fast.priors.latent_action import LatentActionPrior

    if mode not in ("amortised", "exact"):
        raise UnsupportedArgument(f"prior_mode: {mode!r} is unknown; choose 'amortised' or 'exact'")
    if not (folder / "config.json").is_file():
        raise PriorMismatch(f"prior: {folder} holds no prior; make one with `lago fit-prior`")
    is_student = (folder / EXACT).is_dir()
    exact, student = (folder / EXACT, folder) if is_student else (folder, folder / STUDENT)
    if mode == "exact":
        return LatentActionPrior.load(exact, device)
    if demos is not None:
        prior = LatentActionPrior.load(exact, device)
        assert env is not None
        return distil(prior, demos, env, epochs=start_of(env.env).prior.student_epochs)
    if not student.is_dir():
        raise UnsupportedArgument(
            f"prior_mode: {folder} has no student ({STUDENT}/); fit the prior again without --no-student, "
            "name demonstrations to distil one on (--demos), or use --prior-mode exact"
        )
    return AmortisedPrior.load(student, device)


def has_student(folder: Path) -> bool:
    """Tell whether a prior's folder has its student beside it, or is a student's."""
    return (folder / STUDENT).is_dir() or (folder / EXACT).is_dir()


def distil(
    exact: "LatentActionPrior", demos: "Demonstrations", env: EnvSettings, *, seed: int = 0, epochs: int
) -> "AmortisedPrior":
    """Return a student of a prior, taught on demonstrated states and on those that it steers into.

    Args:
        exact: the prior.
        demos: of exactly the tasks that it was fitted on.
        env: environment and horizon of the episodes that it plays; its tasks are the demonstrations'.
        seed: of wording, noise and play.
        epochs: passes over the states.

    Raises:
        PriorMismatch: the prior was fitted on other tasks.
    """
    from lago_fast.stage_one import StageOne, amortise

    check_fits(exact, demos.tasks, env.env)
    order = tuple(sorted(demos.tasks, key=lambda task: exact.instructions.index(_first_words(env.env, task))))
    env = replace(env, tasks=order, eval_tasks=(), num_envs=STUDENT_ENVS * len(order))
    table = exact.instruction_table().cpu().numpy()
    stage = StageOne(only_tasks(demos, order), exact, exact.instructions, table)
    prior = replace(start_of(env.env).prior, student_epochs=epochs)
    return amortise(stage, Experiment(env=env, prior=prior), seed)


def _first_words(env: str, task: str) -> str:
    from lago_fast.envs.suites import suite_named

    return suite_named(env).goals(task)[0][0]


def check_fits(prior: "Prior", tasks: Sequence[str], env: str) -> None:
    """Raise PriorMismatch unless a prior fits the environment's spaces and knows the words of these tasks."""
    from lago_fast.envs.suites import suite_named

    suite = suite_named(env)
    if (prior.kind, prior.state_dim, prior.action_dim) != (suite.kind, suite.state_dim, suite.action_dim):
        raise PriorMismatch(
            f"prior: it is {prior.kind}, for states of {prior.state_dim} and actions of {prior.action_dim} "
            f"numbers; {suite.title} needs {suite.kind}, {suite.state_dim} and {suite.action_dim}: make it with "
            "`lago fit-prior`, or name its --env"
        )
    unknown = sorted(set(tasks) - set(known_tasks(prior, env)), key=list(tasks).index)
    if unknown:
        raise PriorMismatch(
            f"prior: it does not know the words of {', '.join(unknown)}, but of "
            f"{', '.join(known_tasks(prior, env)) or 'no task'}; fit one to demonstrations of them, or drop them"
        )


def known_tasks(prior: "Prior", env: str) -> list[str]:
    """Return the environment's tasks of which a prior knows every wording."""
    from lago_fast.envs.suites import suite_named

    suite, known = suite_named(env), set(prior.instructions)
    return [task for task in suite.all_tasks() if set(suite.texts([task])) <= known]


def instruction_table(
    env: EnvSettings, prior: "Prior | None", encoder: str | None
) -> "tuple[np.ndarray | None, dict[str, Any] | None]":
    """Return what policies see of the instructions, [M, r], and what made it; None and None with one goal.

    A control's prior has random weights; its table is made by the pretrained model of that name all the same,
    so that all arms see the same.

    Args:
        env: its tasks, and those that are evaluated, whose wordings the rows follow.
        prior: asked first.
        encoder: name of another language model; None: the prior's, or the default one.

    Raises:
        BackboneUnavailable, HashMismatch: as `find_backbone`.
        UnsupportedArgument: policies are to see a student's words, and there is none.
    """
    from lago_fast.envs.suites import suite_named
    from lago_fast.evaluate import known_tasks as known_in
    from lago_fast.priors.backbone import encode_instructions, find_backbone
    from lago_fast.priors.base import match_instructions
    from lago_fast.priors.locate import DEFAULT_BACKBONE
    from lago_fast.stage_one import policy_table, words_of

    suite = suite_named(env.env)
    if not suite.speaks(env.tasks):
        return None, None
    texts = suite.texts(known_in(env))
    reference = None if prior is None else exact_of(prior).reference
    if prior is not None and reference is not None and encoder is None and not reference["random_init"]:
        latents = words_of(prior, env)[match_instructions(prior, texts)]
        return policy_table(latents, env), {name: reference[name] for name in ("name", "sha256")}
    if env.words != "latents":
        raise UnsupportedArgument(
            "words='student': they are those of a --prior whose language model is pretrained, without "
            "--instruction-encoder; take --words latents, or `lago compare`, which shows them to every arm"
        )
    backbone = find_backbone(encoder or (reference["name"] if reference else DEFAULT_BACKBONE))
    latents = encode_instructions(texts, backbone)
    return policy_table(latents.numpy(), env), {"name": backbone.name, "sha256": backbone.sha256}


def exact_of(prior: "Prior") -> "LatentActionPrior":
    """Return the exact prior behind a student, or the prior itself."""
    from lago_fast.priors.amortised import AmortisedPrior

    return prior.exact if isinstance(prior, AmortisedPrior) else prior


def digests(prior: "Prior") -> dict[str, str]:
    """Return what a run records of its prior: the digest of the one that is asked, and of the exact one behind it."""
    return {"digest": prior.digest, "exact_digest": exact_of(prior).digest}
