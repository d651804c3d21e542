"""Stage 1 of an experiment: demonstrations, the prior fitted to them, its student, and the instruction table.

Test: pytest tests/test_experiment.py
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lago_fast.demos import Demonstrations, load_demos, record_demos
from lago_fast.envs.suites import Suite, suite_named
from lago_fast.errors import DemonstrationError, UnsupportedArgument, check_seed
from lago_fast.evaluate import draw_actions, known_tasks
from lago_fast.presets import EnvSettings, Experiment
from lago_fast.priors.amortised import AmortisedPrior, StudentConfig
from lago_fast.priors.base import ActionPrior, PriorOutput, match_instructions
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior

STD_INIT = 0.5  # where a fitted std starts
ROLLOUT_SEED = 50_000  # apart from the seeds of training and of evaluation


class StageOne(NamedTuple):
    demos: Demonstrations
    prior: LatentActionPrior
    instructions: list[str]
    table: np.ndarray | None  # [M, r] float32, what policies see of the instructions; None with one task


def compact_table(latents: np.ndarray, *, fitted: int | None = None, explained: float = 1.0) -> np.ndarray:
    """Return instruction latents [M, Z] rotated into the few dimensions that they span, [M, r], r < M.

    Distances between instructions are kept up to one factor that gives the rows a mean length of 1, so that a policy
    network reads r numbers where it would read Z with the same information.

    Args:
        latents: one row per wording.
        fitted: centre, rotation and factor are those of so many first rows, the wordings of training; None: of all.
        explained: share of their variance that is kept, by the largest principal directions.

    Raises:
        UnsupportedArgument: a share that is none.
    """
    if not 0 < explained <= 1:
        raise UnsupportedArgument(f"explained_variance={explained}: give a share above 0, and at most 1")
    first = latents[:fitted]
    centre = first.mean(axis=0)
    left, singular, right = np.linalg.svd(first - centre, full_matrices=False)
    kept = singular > 1e-4 * max(singular[0], 1e-12)
    if explained < 1:
        share = np.cumsum(singular**2) / (singular**2).sum()
        kept &= np.concatenate([[0.0], share[:-1]]) < explained
    rows = left[:, kept] * singular[kept]
    others = (latents[len(rows) :] - centre) @ right[kept].T
    return (np.concatenate([rows, others]) / np.linalg.norm(rows, axis=1).mean()).astype(np.float32)


def instructions_of(experiment: Experiment) -> list[str]:
    """Return every wording of the tasks that are trained or evaluated, those of training first."""
    return suite_named(experiment.env.env).texts(known_tasks(experiment.env))


def policy_table(latents: np.ndarray, settings: EnvSettings) -> np.ndarray | None:
    """Return what policies see of the instructions, [M, r], rows as in `instructions_of`; None where there is one goal.

    `latents` [M, Z] are what `words_of` returns.

    The rotation is that of the wordings of training: others are put into the space that these span.
    """
    suite = suite_named(settings.env)
    if not suite.speaks(settings.tasks):
        return None
    return compact_table(latents, fitted=len(suite.texts(settings.tasks)), explained=settings.explained_variance)


def words_of(prior: ActionPrior, settings: EnvSettings) -> np.ndarray:
    """Return what a prior makes of its instructions, [M, Z], of which `policy_table` shows policies the most.

    Raises:
        UnsupportedArgument: the student's are wanted, and there is none.
    """
    if settings.words == "latents":
        return prior.instruction_table().cpu().numpy()
    if not isinstance(prior, AmortisedPrior):
        raise UnsupportedArgument("words='student': only an amortised prior has one; use prior_mode='amortised'")
    return prior.student.words(prior.instruction_table()).cpu().numpy()


def paraphrase(demos: Demonstrations, instructions: list[str], seed: int, *, suite: Suite | None = None) -> np.ndarray:
    """Return for each demonstrated row an instruction id [n], drawn among the wordings of its goal.

    The demonstration of a goal is one whatever the words were, and the prior is to answer to all of them.

    Args:
        demos: whose rows.
        instructions: what an id counts; every wording of the demonstrated goals is among them.
        seed: of the draw.
        suite: whose tasks these are; Meta-World's by default.
    """
    rng = np.random.default_rng(seed)
    suite = suite or suite_named(EnvSettings.env)
    index = {text: i for i, text in enumerate(instructions)}
    ids = np.zeros(len(demos.states), dtype=np.int64)
    for k, task in enumerate(demos.tasks):
        rows = np.flatnonzero(demos.task_id == k)
        for goal, mine in _by_goal(demos, suite.goals(task), rows):
            ids[mine] = rng.choice([index[text] for text in goal], size=len(mine))
    return ids


def paraphrases(
    demos: Demonstrations, instructions: list[str], seed: int, count: int, *, suite: Suite | None = None
) -> np.ndarray:
    """Return `count` instruction ids for each demonstrated row, [n, count], each column as `paraphrase` draws it.

    Raises UnsupportedArgument for a count below 1, and a seed that is negative.
    """
    if count < 1:
        raise UnsupportedArgument(f"wordings={count}: give at least 1")
    check_seed("seed", seed)
    return np.stack([paraphrase(demos, instructions, seed + k, suite=suite) for k in range(count)], axis=1)


def _by_goal(demos: Demonstrations, goals: list[list[str]], rows: np.ndarray) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield (wordings of a goal, those of a task's rows in which it was demonstrated)."""
    if len(goals) == 1:
        yield goals[0], rows
        return
    goal_of = {text: g for g, goal in enumerate(goals) for text in goal}
    strange = [text for text in demos.instructions if text not in goal_of]
    goal_id = np.array([goal_of.get(text, -1) for text in demos.instructions])[demos.instruction_id[rows]]
    if (goal_id < 0).any():
        raise DemonstrationError(f"demos: {strange[0]!r} is no wording that is known; record them with `lago demos`")
    for g in np.unique(goal_id):
        yield goals[g], rows[goal_id == g]


def record(experiment: Experiment, path: Path, *, overwrite: bool = False) -> Demonstrations:
    """Record the experiment's demonstrations at `path` and return them."""
    record_demos(
        experiment.env.tasks,
        experiment.demos.episodes_per_task,
        path,
        action_noise=experiment.demos.action_noise,
        noisy_tasks=experiment.demos.noisy_tasks,
        seed=experiment.demos.seed,
        max_episode_steps=experiment.env.max_episode_steps,
        success_only=experiment.demos.success_only,
        num_envs_per_task=experiment.demos.num_envs_per_task,
        overwrite=overwrite,
        env=experiment.env.env,
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
    prior = fit_to(demos, experiment, random_init=random_init, progress=progress)
    prior.save(folder, overwrite=overwrite)
    table = policy_table(prior.instruction_table().cpu().numpy(), experiment.env)
    return StageOne(demos, prior, instructions_of(experiment), table)


def fit_to(
    demos: Demonstrations,
    experiment: Experiment,
    *,
    random_init: bool = False,
    progress: Callable[[dict[str, float]], None] | None = None,
    before_weights: Callable[[], object] | None = None,
) -> LatentActionPrior:
    """Return the prior fitted to demonstrations, in all wordings of their tasks; callbacks as `fit_prior` has them."""
    settings = experiment.prior
    instructions = instructions_of(experiment)
    gaussian: dict[str, Any] = {}
    if demos.num_actions is None:
        std_init = settings.std_floor if settings.std == "fixed" else STD_INIT
        gaussian = {"std": settings.std, "std_init": std_init, "std_floor": settings.std_floor}
    return fit_prior(
        demos.states,
        demos.actions,
        paraphrases(demos, instructions, settings.seed, settings.wordings, suite=suite_named(experiment.env.env)),
        demos.episode_id,
        instructions,
        task_id=demos.task_id,
        num_actions=demos.num_actions,
        backbone=settings.backbone,
        random_init=random_init or settings.random_init,
        loss=settings.loss,
        **gaussian,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.learning_rate,
        patience=settings.patience,
        input_noise=settings.input_noise,
        wording_noise=settings.wording_noise,
        layers=settings.layers,
        head_hidden=settings.head_hidden,
        state_path=settings.state_path,
        attention=settings.attention,
        seed=settings.seed,
        progress=progress,
        before_weights=before_weights,
    )


def amortise(stage: StageOne, experiment: Experiment, seed: int) -> AmortisedPrior:
    """Return a student of the prior, distilled on demonstrated states and on states that it steers into itself.

    The second kind is what the policy of stage 2 will visit: the student is fitted to the demonstrations, plays some
    noisy episodes, and is fitted again with their states added (DAgger, Ross et al., arXiv 1011.0686; the exact
    prior is the expert).
    """
    settings = experiment.prior
    student = AmortisedPrior(stage.prior, StudentConfig(**settings.student))
    states = torch.from_numpy(stage.demos.states)
    suite = suite_named(experiment.env.env)
    ids = torch.from_numpy(paraphrase(stage.demos, stage.instructions, seed, suite=suite))
    # whole episodes are held out, played ones too, and those of the first fit in the second as well
    episodes = torch.from_numpy(stage.demos.episode_id)
    epochs, copies = settings.student_epochs, settings.noisy_copies
    student.fit(states, ids, episode_id=episodes, epochs=epochs, noisy_copies=copies)
    for level, noise in enumerate(settings.rollout_noise):
        # else all levels would start from the same states, and add little to each other
        play_seed = ROLLOUT_SEED + seed * len(settings.rollout_noise) + level
        visited, visited_ids, env = _rollout_states(student, experiment, noise, play_seed)
        states, ids = torch.cat([states, visited]), torch.cat([ids, visited_ids])
        episodes = torch.cat([episodes, env + 1 + episodes.max()])
    if settings.rollout_noise:
        student.fit(states, ids, episode_id=episodes, epochs=epochs, noisy_copies=copies)
    return student


def _rollout_states(
    student: AmortisedPrior, experiment: Experiment, noise: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Play one episode's steps in every env with the student plus noise; return states, instruction ids and envs.

    The student answers on its device, and everything that is returned is on the CPU, where the envs are.
    """
    settings = experiment.env
    rng = np.random.default_rng(seed)
    env = suite_named(settings.env).make(
        settings.tasks,
        settings.num_envs,
        seed=seed,
        max_episode_steps=settings.max_episode_steps,
    )
    known = match_instructions(student, env.instructions).numpy()
    states, ids = [], []
    try:
        observation, instruction_id = env.reset()
        for _ in range(settings.max_episode_steps):
            state, which = torch.from_numpy(observation), torch.from_numpy(known[instruction_id])
            with torch.no_grad():
                answer = student.exact.bounded(student(state.to(student.device), which.to(student.device)))
            states.append(state)
            ids.append(which)
            step = env.step(_noisy(answer, noise, rng))
            observation, instruction_id = step.observation, step.instruction_id
    finally:
        env.close()
    # every other step: neighbours say nearly the same
    kept = states[::2]
    return torch.cat(kept), torch.cat(ids[::2]), torch.arange(settings.num_envs).repeat(len(kept))


def _noisy(answer: PriorOutput, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Return the mean with Gaussian noise of that std, or a drawn action, replaced by any with that probability."""
    if answer.mean is not None:
        return answer.mean.cpu().numpy() + noise * rng.standard_normal(answer.mean.shape)
    assert answer.log_probs is not None
    drawn = draw_actions(answer.log_probs.cpu().numpy(), rng)
    return np.where(rng.random(len(drawn)) < noise, rng.integers(answer.log_probs.shape[1], size=len(drawn)), drawn)
