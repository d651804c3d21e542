"""A comparison: arms x seeds on the same tasks, with the same budget, evaluated alike, in one report.

Writes `report.json`, `curves.png`, the stage-1 folders, and a run folder per arm and seed.
Test: pytest tests/test_experiment.py
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lago_fast import evaluate as evaluation
from lago_fast import runs as run_folders
from lago_fast import stage_one, throughput
from lago_fast.checks import check_experiment
from lago_fast.demos import load_demos
from lago_fast.envs.suites import suite_named
from lago_fast.evaluate import TaskResult, evaluated_tasks
from lago_fast.plots import draw_curves
from lago_fast.presets import Experiment
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.base import ActionPrior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.report import Outcome, curves_of, make_report
from lago_fast.training import observations, policy_actor, prior_actor, train_run

EVAL_SEED = 10_000  # apart from the seeds of training
STUDENT_SEED = 0
HEADLINE = ("ppo", "lago")
# where the prior of a guided arm and its student lie in the comparison's folder
PRIORS = {"lago": ("prior", "student"), "lago_random_init": ("prior_random_init", "student_random_init")}
Progress = Callable[[str, int, int], None]  # what, done, in all


class Job(NamedTuple):
    """One training run of a comparison, as a worker process gets it."""

    arm: str
    seed: int
    experiment: Experiment
    folder: Path  # the comparison's
    overwrite: bool
    num_threads: int | None  # simulator threads per task


def compare(
    experiment: Experiment,
    out: str | Path,
    *,
    overwrite: bool = False,
    workers: int = 1,
    report: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every arm with every seed and return the report.

    Args:
        experiment: what to run.
        out: folder of the results.
        overwrite: replace a comparison that is there.
        workers: runs at a time; with more than one, each has one thread, and its `env_steps_per_s` is a share of a
            busy machine.
        report: called with a line per stage.
        progress: called during training with (run, steps done, steps in all); with one worker only.

    Raises:
        RunExists: `out` holds a run and `overwrite` is False.
        UnsupportedArgument and more: as `check_experiment`, before anything is written.
    """
    check_experiment(experiment)
    started = time.perf_counter()
    folder = run_folders.open_run(out, experiment, overwrite=overwrite)
    cpu_started = time.process_time()
    stage = _stage_one(experiment, folder, overwrite, report)
    of_stage_one = {
        "stage_one_wall_s": time.perf_counter() - started,
        "stage_one_cpu_s": time.process_time() - cpu_started,
    }
    references: dict[str, dict[str, list[TaskResult]]] = {}
    for arm, act in _reference_actors(experiment, stage).items():
        report(f"evaluating {arm}")
        per_seed = [_evaluate(act, experiment, seed, None) for seed in experiment.seeds]
        references[arm] = {task: [results[task] for results in per_seed] for task in evaluated_tasks(experiment.env)}
    rates: dict[str, Any] = dict(of_stage_one)
    if experiment.measure_baselines:
        rates |= throughput.measure(experiment, stage, _student(experiment, stage, folder), report)

    # a report after every run: one that is stopped keeps what was finished
    runs: dict[str, list[Outcome]] = {}
    summary: dict[str, Any] = {}
    for outcome in _run_all(_jobs(experiment, folder, overwrite, workers), workers, report, progress):
        runs.setdefault(outcome.arm, []).append(outcome)
        elapsed = time.perf_counter() - started
        summary = make_report(experiment, references, runs, stage.prior.metrics, rates, elapsed)
        run_folders.write_json(folder / run_folders.REPORT, summary)
        prior_lines = {task: arms["prior"]["success"] for task, arms in summary["tasks"].items()}
        draw_curves(curves_of(experiment, runs), folder / run_folders.FIGURE, prior=prior_lines)
    return summary


def _jobs(experiment: Experiment, folder: Path, overwrite: bool, workers: int) -> list[Job]:
    """Return one job per arm and seed, the two headline arms before the controls."""
    num_threads = None if workers == 1 else 1
    jobs = [Job(a, s, experiment, folder, overwrite, num_threads) for s in experiment.seeds for a in experiment.arms]
    return sorted(jobs, key=lambda job: job.arm not in HEADLINE)


def _stage_one(
    experiment: Experiment, folder: Path, overwrite: bool, report: Callable[[str], None]
) -> stage_one.StageOne:
    """Record, fit, distil and save; return what guides the arm "lago"."""
    report(f"recording {experiment.demos.episodes_per_task} demonstrations per task")
    demos = stage_one.record(experiment, folder / "demos", overwrite=overwrite)
    stages = {}
    for arm in PRIORS:
        if arm != "lago" and arm not in experiment.arms:
            continue
        exact, student = PRIORS[arm]
        report(f"fitting the {exact} to {len(demos.states):,} steps")
        stages[arm] = stage_one.fit(
            demos, experiment, folder / exact, random_init=arm == "lago_random_init", overwrite=overwrite
        )
        if experiment.train.prior_mode == "amortised":
            report(f"distilling the {student}")
            amortised = stage_one.amortise(stages[arm], experiment, STUDENT_SEED)
            amortised.save(folder / student, overwrite=overwrite)
            if experiment.env.words == "student":
                table = stage_one.policy_table(stage_one.words_of(amortised, experiment.env), experiment.env)
                stages[arm] = stages[arm]._replace(table=table)
    run_folders.save_table(folder, stages["lago"].table)
    return stages["lago"]


def _run_all(
    jobs: list[Job], workers: int, report: Callable[[str], None], progress: Progress | None
) -> Iterator[Outcome]:
    if workers == 1:
        for job in jobs:
            report(f"training {job.arm}, seed {job.seed}")
            yield run_job(job, progress)
        return
    report(f"training {len(jobs)} runs, {workers} at a time")
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for outcome in pool.imap(run_job, jobs):
            report(f"trained {outcome.arm}, seed {outcome.seed}")
            yield outcome


def run_job(job: Job, progress: Progress | None = None) -> Outcome:
    """Train and evaluate one arm with one seed, in its own run folder."""
    table = run_folders.load_table(job.folder)
    name = f"{job.arm}_{job.seed}"
    about = {"arm": job.arm, "seed": job.seed, **run_folders.to_plain(job.experiment)}
    folder = run_folders.open_run(job.folder / "runs" / name, about, overwrite=job.overwrite)
    run_folders.save_table(folder, table)
    result = train_run(
        job.arm,
        job.seed,
        job.experiment,
        folder=folder,
        table=table,
        prior=_load_prior(job),
        demonstrations=_demonstrations(job, table),
        num_threads=job.num_threads,
        progress=None if progress is None else lambda done, total: progress(name, done, total),
    )
    run_folders.note(folder, implementations=result.model.impls, overlap=result.model.overlap)
    act = policy_actor(result.model, sample=job.experiment.env.sample_actions, seed=EVAL_SEED + job.seed)
    tasks = _evaluate(act, job.experiment, job.seed, table)
    return Outcome(
        job.arm,
        job.seed,
        result.curve,
        result.env_steps,
        result.wall_s,
        result.audit_kl_nats,
        result.model.impls,
        tasks,
        result.stage_s,
        result.cpu_s,
    )


def _student(experiment: Experiment, stage: stage_one.StageOne, folder: Path) -> ActionPrior:
    """Return the amortised prior, distilled now where the arms ask the exact one."""
    if experiment.train.prior_mode == "amortised":
        return AmortisedPrior.load(folder / PRIORS["lago"][1])
    return stage_one.amortise(stage, experiment, STUDENT_SEED)


def _load_prior(job: Job) -> ActionPrior | None:
    """Return a run's own copy of its prior (a student is refitted by the states that its run visits)."""
    if job.arm not in PRIORS:
        return None
    exact, student = PRIORS[job.arm]
    if job.experiment.train.prior_mode == "amortised":
        return AmortisedPrior.load(job.folder / student)
    return LatentActionPrior.load(job.folder / exact)


def _demonstrations(job: Job, table: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
    if job.arm != "bc_ppo":
        return None
    demos = load_demos(job.folder / "demos")
    suite = suite_named(job.experiment.env.env)
    ids = stage_one.paraphrase(demos, stage_one.instructions_of(job.experiment), job.seed, suite=suite)
    return observations(demos.states, ids, table), demos.actions


def _reference_actors(experiment: Experiment, stage: stage_one.StageOne) -> dict[str, evaluation.Act]:
    suite = suite_named(experiment.env.env)
    return {
        "random": evaluation.random_actor(suite.action_dim, seed=EVAL_SEED, discrete=suite.discrete),
        **evaluation.script_actors(experiment.env),
        "prior": prior_actor(stage.prior, sample=experiment.env.sample_actions, seed=EVAL_SEED),
    }


def _evaluate(
    act: evaluation.Act, experiment: Experiment, seed: int, table: np.ndarray | None
) -> dict[str, TaskResult]:
    return evaluation.evaluate(
        act,
        experiment.env,
        episodes_per_task=experiment.eval_episodes,
        seed=EVAL_SEED + seed,
        instruction_table=table,
    )
