"""The tuning grid of a preset: the same cells, seed and number of runs for PPO and for LaGO.

    python bench/grid.py OUT --round 1 [--preset clevr] [--workers 2]

Meta-World ("demo"). First round: the initial std, which both arms share, and each arm's own regulariser (PPO's entropy
coefficient, LaGO's last KL coefficient). Second and third: changes of one arm's settings each, from the first round's
best shared cell. Fourth and fifth: with a reward scale per task, at the demo's budget. Sixth: a wider prior, whose KL
leaves the policy more noise to explore with ("std_floor"; the weight of the KL is scaled to the same pull on the mean).

CLEVR-Robot ("clevr"). First round: the learning rate, which both arms share, and each arm's own regulariser, as above.

Stage 1 is run once per round, unless OUT has a prior. One line of JSON per cell goes to OUT/grid.jsonl.
"""

import argparse
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lago_fast import evaluate as evaluation
from lago_fast import stage_one
from lago_fast.envs.suites import suite_named
from lago_fast.experiment import EVAL_SEED
from lago_fast.presets import PRESETS
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.report import splits_of
from lago_fast.runs import open_run
from lago_fast.training import policy_actor, train_run

SHORT = {"steps_per_task": 100_000, "kl_coef": 0.3, "kl_coef_until": 1.0}
SEED = 100  # no seed of a reported run
EPISODES = {"demo": 25, "clevr": 75}  # per task
FIRST = [
    (arm, {"log_std_init": log_std_init, name: value})
    for log_std_init in (-1.0, -0.5)
    for arm, name, values in (("ppo", "ent_coef", (0.0, 0.01)), ("lago", "kl_coef_end", (0.0, 0.1)))
    for value in values
]
# from the preset, which is the better shared cell of the first round
SECOND = [
    ("ppo", {"learning_rate": 1e-3}),
    ("lago", {"kl_coef": 0.1}),
    ("ppo", {"log_std_init": 0.0}),
    ("lago", {"kl_coef_until": 0.5}),
    ("ppo", {"n_epochs": 4}),
    ("lago", {"kl_coef": 0.1, "kl_coef_until": 0.5}),
]
# how fast the prior is taken over: gradient steps against the weight of the KL
THIRD = [
    ("lago", {"learning_rate": 1e-3}),
    ("lago", {"kl_coef": 1.0}),
    ("lago", {"learning_rate": 1e-3, "kl_coef": 1.0}),
    ("lago", {"log_std_init": -1.5, "kl_coef": 1.0}),
    ("ppo", {"learning_rate": 6e-4}),
    ("ppo", {"log_std_init": -1.5}),
    ("ppo", {"learning_rate": 1e-3, "log_std_init": -1.0}),
]
# at the budget of the demo: the shared learning rate, and one change of each arm's own
FULL = {"steps_per_task": 200_000, "kl_coef_until": 0.5}
FOURTH = [
    ("lago", FULL),
    ("ppo", FULL),
    ("lago", {**FULL, "learning_rate": 6e-4}),
    ("ppo", {**FULL, "learning_rate": 6e-4}),
    ("lago", {**FULL, "kl_coef_until": 1.0}),
    ("ppo", {**FULL, "ent_coef": 0.001}),
]
# from the better shared learning rate of the fourth: does a weight that never reaches 0 keep what the prior knows?
FASTER = {**FULL, "learning_rate": 6e-4}
FIFTH = [
    ("lago", {**FASTER, "kl_coef_end": 0.01}),
    ("lago", {**FASTER, "kl_coef_end": 0.03}),
    ("ppo", {**FASTER, "log_std_init": -1.0}),
    ("ppo", {**FASTER, "n_epochs": 4}),
]
WIDE = {**FASTER, "std_floor": 0.4, "kl_coef": 1.2}
SIXTH = [
    ("lago", {**FASTER, "kl_coef_end": 0.01}),
    ("lago", {**WIDE, "kl_coef": 1.0, "kl_coef_end": 0.01}),
    ("lago", {**WIDE, "kl_coef_end": 0.04}),
    ("lago", {**WIDE, "kl_coef_end": 0.04, "kl_coef_until": 0.25}),
    ("lago", {**WIDE, "std_floor": 0.6, "kl_coef": 2.7, "kl_coef_end": 0.09}),
    ("lago", {**WIDE, "std_floor": 0.6, "kl_coef": 2.7, "kl_coef_end": 0.03, "kl_coef_until": 0.25}),
]
# a fifth of the budget
CLEVR_SHORT = {"steps_per_task": 300_000}
CLEVR_FIRST = [
    (arm, {**CLEVR_SHORT, "learning_rate": learning_rate, name: value})
    for learning_rate in (3e-4, 1e-3)
    for arm, name, values in (("ppo", "ent_coef", (0.0, 0.01)), ("lago", "kl_coef_end", (0.01, 0.1)))
    for value in values
]
ROUNDS: dict[str, dict[int, list[tuple[str, dict[str, Any]]]]] = {
    "demo": {1: FIRST, 2: SECOND, 3: THIRD, 4: FOURTH, 5: FIFTH, 6: SIXTH},
    "clevr": {1: CLEVR_FIRST},
}


def run_cell(job: tuple[str, int, str, dict[str, Any], Path]) -> dict[str, Any]:
    """Train and evaluate one cell in a process of its own."""
    torch.set_num_threads(1)
    preset, index, arm, changes, out = job
    base = PRESETS[preset]
    student = AmortisedPrior.load(out / "student")
    settings = {**SHORT, **changes}
    if "std_floor" in settings:  # of the answers; the means of a prior with a fixed std do not depend on it
        student.exact.config = replace(student.exact.config, std_floor=settings.pop("std_floor"))
    experiment = replace(base, train=replace(base.train, **settings))
    table = stage_one.policy_table(stage_one.words_of(student, experiment.env), experiment.env)
    result = train_run(
        arm,
        SEED,
        experiment,
        folder=open_run(out / f"cell_{index}", experiment, overwrite=True),
        table=table,
        prior=student if arm == "lago" else None,
        num_threads=1,
    )
    scores = evaluation.evaluate(
        policy_actor(result.model, sample=experiment.env.sample_actions, seed=EVAL_SEED),
        experiment.env,
        episodes_per_task=EPISODES[preset],
        seed=EVAL_SEED + SEED,
        instruction_table=table,
    )
    suite = suite_named(experiment.env.env)
    splits = splits_of(suite, {arm: {task: [score] for task, score in scores.items()}}, tuple(scores))
    return {
        "arm": arm,
        **changes,
        **({"splits": {name: row[arm]["success"] for name, row in splits["splits"].items()}} if splits else {}),
        "success": evaluation.pool(list(scores.values())).summary()["success"],
        "tasks": {task: score.summary()["success"] for task, score in scores.items()},
        "return": {task: score.mean_return for task, score in scores.items()},
        "steps_to_90": result.curve["steps_to_90"],
        "audit_kl_nats": result.audit_kl_nats,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--round", type=int, required=True)
    parser.add_argument("--preset", choices=ROUNDS, default="demo")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    out = options.out.absolute()
    rounds, experiment = ROUNDS[options.preset], PRESETS[options.preset]
    if options.round not in rounds:
        parser.error(f"--round: {options.preset} has {', '.join(map(str, rounds))}")
    if not (out / "student").is_dir():
        demos = stage_one.record(experiment, out / "demos", overwrite=True)
        stage = stage_one.fit(demos, experiment, out / "prior", overwrite=True)
        stage_one.amortise(stage, experiment, SEED).save(out / "student", overwrite=True)
    jobs = [(options.preset, i, arm, changes, out) for i, (arm, changes) in enumerate(rounds[options.round])]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as workers, (out / "grid.jsonl").open("w", encoding="utf-8") as lines:
        for row in workers.imap(run_cell, jobs):
            print(json.dumps(row), file=lines, flush=True)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
