"""Stage 1 of an experiment: demonstrations, the prior fitted to them, its student, and the instruction table.

Test: pytest tests/test_experiment.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lago_fast.demos import Demonstrations, load_demos, record_demos
from lago_fast.envs.metaworld import MetaworldArrayEnv, task_phrasings
from lago_fast.presets import Experiment
from lago_fast.priors.amortised import AmortisedPrior, StudentConfig
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior

STD_INIT = 0.5  # where a fitted std starts
ROLLOUT_SEED = 50_000  # apart from the seeds of training and of evaluation


class StageOne(NamedTuple):
    demos: Demonstrations
    prior: LatentActionPrior
    instructions: list[str]
    table: np.ndarray | None  # [M, r] float32, what policies see of the instructions; None with one task


def compact_table(latents: np.ndarray) -> np.ndarray:
    """Return instruction latents [M, Z] rotated into the few dimensions that they span, [M, r], r < M.

    Distances between instructions are kept up to one factor that gives the rows a mean length of 1, so that a policy
    network reads r numbers where it would read Z with the same information.
    """
    centred = latents - latents.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    kept = singular > 1e-4 * max(singular[0], 1e-12)
    rows = left[:, kept] * singular[kept]
    return (rows / np.linalg.norm(rows, axis=1).mean()).astype(np.float32)


def instructions_of(experiment: Experiment) -> list[str]:
    """Return every wording of the experiment's tasks, in the order of the env's instruction ids."""
    return [text for task in experiment.env.tasks for text in task_phrasings()[task]]


def paraphrase(demos: Demonstrations, instructions: list[str], seed: int) -> np.ndarray:
    """Return for each demonstrated row an instruction id [n], drawn among the phrasings of its task.

    The demonstration of a task is one whatever the words were, and the prior is to answer to all of them.
    """
    rng = np.random.default_rng(seed)
    phrasings = task_phrasings()
    ids = np.zeros(len(demos.states), dtype=np.int64)
    for k, task in enumerate(demos.tasks):
        choices = [instructions.index(text) for text in phrasings[task]]
        rows = demos.task_id == k
        ids[rows] = rng.choice(choices, size=int(rows.sum()))
    return ids


def record(experiment: Experiment, path: Path, *, overwrite: bool = False) -> Demonstrations:
    """Record the experiment's demonstrations at `path` and return them."""
    record_demos(
        experiment.env.tasks,
        experiment.demos.episodes_per_task,
        path,
        action_noise=experiment.demos.action_noise,
        seed=experiment.demos.seed,
        max_episode_steps=experiment.env.max_episode_steps,
        overwrite=overwrite,
    )
    return load_demos(path)


def fit(
    demos: Demonstrations,
    experiment: Experiment,
    folder: Path,
    *,
    random_init: bool = False,
    overwrite: bool = False,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> StageOne:
    """Fit the prior to demonstrations, in all wordings of their tasks, and save it as `folder`."""
    settings = experiment.prior
    instructions = instructions_of(experiment)
    prior = fit_prior(
        demos.states,
        demos.actions,
        paraphrase(demos, instructions, settings.seed),
        demos.episode_id,
        instructions,
        task_id=demos.task_id,
        backbone=settings.backbone,
        random_init=random_init or settings.random_init,
        loss=settings.loss,
        std=settings.std,
        std_init=settings.std_floor if settings.std == "fixed" else STD_INIT,
        std_floor=settings.std_floor,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.learning_rate,
        patience=settings.patience,
        input_noise=settings.input_noise,
        layers=settings.layers,
        seed=settings.seed,
        progress=progress,
    )
    prior.save(folder, overwrite=overwrite)
    table = compact_table(prior.instruction_table().numpy()) if len(experiment.env.tasks) > 1 else None
    return StageOne(demos, prior, instructions, table)


def amortise(stage: StageOne, experiment: Experiment, seed: int) -> AmortisedPrior:
    """Return a student of the prior, distilled on demonstrated states and on states that it steers into itself.

    The second kind is what the policy of stage 2 will visit: the student is fitted to the demonstrations, plays some
    noisy episodes, and is fitted again with their states added (DAgger, Ross et al., arXiv 1011.0686; the exact
    prior is the expert).
    """
    settings = experiment.prior
    student = AmortisedPrior(stage.prior, StudentConfig(**settings.student))
    states = torch.from_numpy(stage.demos.states)
    ids = torch.from_numpy(paraphrase(stage.demos, stage.instructions, seed))
    # whole episodes are held out, played ones too
    episodes = torch.from_numpy(stage.demos.episode_id)
    epochs, copies = settings.student_epochs, settings.noisy_copies
    student.fit(states, ids, episode_id=episodes, epochs=epochs, noisy_copies=copies)
    for noise in settings.rollout_noise:
        visited, visited_ids, env = _rollout_states(student, experiment, noise, seed)
        states, ids = torch.cat([states, visited]), torch.cat([ids, visited_ids])
        episodes = torch.cat([episodes, env + 1 + episodes.max()])
    if settings.rollout_noise:
        student.fit(states, ids, episode_id=episodes, epochs=epochs, noisy_copies=copies)
    return student


def _rollout_states(
    student: AmortisedPrior, experiment: Experiment, noise: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Play one episode in every env with the student's mean plus noise; return states, instruction ids and envs."""
    settings = experiment.env
    rng = np.random.default_rng(seed)
    env = MetaworldArrayEnv(
        settings.tasks,
        settings.num_envs,
        seed=ROLLOUT_SEED + seed,
        max_episode_steps=settings.max_episode_steps,
    )
    states, ids = [], []
    try:
        observation, instruction_id = env.reset()
        for _ in range(settings.max_episode_steps):
            state, which = torch.from_numpy(observation), torch.from_numpy(instruction_id)
            with torch.no_grad():
                mean = student.exact.bounded(student(state, which)).mean
            assert mean is not None
            states.append(state)
            ids.append(which)
            step = env.step(mean.numpy() + noise * rng.standard_normal(mean.shape))
            observation, instruction_id = step.observation, step.instruction_id
    finally:
        env.close()
    # every other step: neighbours say nearly the same
    kept = states[::2]
    return torch.cat(kept), torch.cat(ids[::2]), torch.arange(settings.num_envs).repeat(len(kept))
