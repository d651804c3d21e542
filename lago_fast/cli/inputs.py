"""What several commands read: devices, demonstrations, priors; checked before any work begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lago_fast.errors import DemonstrationError, DeviceUnavailable, PriorMismatch, UnsupportedArgument
from lago_fast.presets import EnvSettings, Experiment, PriorSettings

if TYPE_CHECKING:
    import numpy as np

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


# demonstrations


def read_demos(path: Path) -> "Demonstrations":
    """Return demonstrations of Meta-World tasks.

    Raises:
        DemonstrationError: missing, empty, corrupt, or recorded in another space than Meta-World's.
        UnknownTask: of a task that Meta-World does not have.
    """
    from lago_fast.demos import load_demos
    from lago_fast.envs.metaworld import ACTION_DIM, STATE_DIM, check_tasks

    demos = load_demos(path)
    found = (demos.states.shape[1], demos.actions.shape[1])
    if found != (STATE_DIM, ACTION_DIM):
        raise DemonstrationError(
            f"demos: {path} has states of {found[0]} and actions of {found[1]} numbers, Meta-World has "
            f"{STATE_DIM} and {ACTION_DIM}; record them with `lago demos`"
        )
    check_tasks(demos.tasks)
    return demos


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
    episode_steps: int = EnvSettings.max_episode_steps,
) -> "Prior":
    """Return a saved prior (mode "exact") or its student ("amortised"), distilled on `demos` where given.

    Args:
        folder: of the prior, with its student in `amortised/`, or of a student, with its prior in `exact/`.
        mode: which of the two.
        device: where it is to answer.
        demos: of exactly the tasks that the prior was fitted on.
        episode_steps: of the episodes that a student plays while it is distilled.

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
        return distil(prior, demos, epochs=PriorSettings.student_epochs, episode_steps=episode_steps)
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
    exact: "LatentActionPrior", demos: "Demonstrations", *, seed: int = 0, epochs: int, episode_steps: int
) -> "AmortisedPrior":
    """Return a student of a prior, taught on demonstrated states and on those that it steers into.

    Args:
        exact: the prior.
        demos: of exactly the tasks that it was fitted on.
        seed: of wording, noise and play.
        epochs: passes over the states.
        episode_steps: of the episodes that it plays.

    Raises:
        PriorMismatch: the prior was fitted on other tasks.
    """
    from lago_fast.envs.metaworld import task_phrasings
    from lago_fast.stage_one import StageOne, amortise

    check_fits(exact, demos.tasks)
    order = sorted(known_tasks(exact), key=lambda task: exact.instructions.index(task_phrasings()[task][0]))
    demos = only_tasks(demos, order)
    env = EnvSettings(tasks=tuple(order), num_envs=STUDENT_ENVS * len(order), max_episode_steps=episode_steps)
    stage = StageOne(demos, exact, exact.instructions, exact.instruction_table().numpy())
    return amortise(stage, Experiment(env=env, prior=PriorSettings(student_epochs=epochs)), seed)


def check_fits(prior: "Prior", tasks: Sequence[str]) -> None:
    """Raise PriorMismatch unless a prior fits Meta-World's spaces and knows the words of these tasks."""
    from lago_fast.envs.metaworld import ACTION_DIM, STATE_DIM, task_phrasings

    if (prior.kind, prior.state_dim, prior.action_dim) != ("gaussian", STATE_DIM, ACTION_DIM):
        raise PriorMismatch(
            f"prior: it is {prior.kind}, for states of {prior.state_dim} and actions of {prior.action_dim} "
            f"numbers; Meta-World needs gaussian, {STATE_DIM} and {ACTION_DIM}: make it with `lago fit-prior`"
        )
    unknown = [task for task in tasks if not set(task_phrasings()[task]) <= set(prior.instructions)]
    if unknown:
        raise PriorMismatch(
            f"prior: it does not know the words of {', '.join(unknown)}, but of "
            f"{', '.join(known_tasks(prior)) or 'no task'}; fit one to demonstrations of them, or drop them"
        )


def known_tasks(prior: "Prior") -> list[str]:
    """Return the tasks of which a prior knows every wording."""
    from lago_fast.envs.metaworld import task_phrasings

    return [task for task, texts in task_phrasings().items() if set(texts) <= set(prior.instructions)]


def instruction_table(
    tasks: Sequence[str], prior: "Prior | None", encoder: str | None
) -> "tuple[np.ndarray | None, dict[str, Any] | None]":
    """Return what policies see of the instructions, [M, r], and what made it; None and None with one task.

    A control's prior has random weights; its table is made by the pretrained model of that name all the same,
    so that all arms see the same.

    Args:
        tasks: of the env, whose wordings the rows follow.
        prior: asked first.
        encoder: name of another language model; None: the prior's, or the default one.

    Raises:
        BackboneUnavailable, HashMismatch: as `find_backbone`.
    """
    from lago_fast.envs.metaworld import task_phrasings
    from lago_fast.priors.backbone import DEFAULT_BACKBONE, encode_instructions, find_backbone
    from lago_fast.priors.base import match_instructions
    from lago_fast.stage_one import compact_table

    if len(tasks) == 1:
        return None, None
    texts = [text for task in tasks for text in task_phrasings()[task]]
    reference = None if prior is None else exact_of(prior).reference
    if prior is not None and reference is not None and encoder is None and not reference["random_init"]:
        latents = prior.instruction_table()[match_instructions(prior, texts)].cpu()
        return compact_table(latents.numpy()), {name: reference[name] for name in ("name", "sha256")}
    backbone = find_backbone(encoder or (reference["name"] if reference else DEFAULT_BACKBONE))
    latents = encode_instructions(texts, backbone)
    return compact_table(latents.numpy()), {"name": backbone.name, "sha256": backbone.sha256}


def exact_of(prior: "Prior") -> "LatentActionPrior":
    """Return the exact prior behind a student, or the prior itself."""
    from lago_fast.priors.amortised import AmortisedPrior

    return prior.exact if isinstance(prior, AmortisedPrior) else prior
