"""The tuning grid of the Meta-World preset: the same cells, seed and number of runs for PPO and for LaGO.

    python bench/grid.py OUT --round 1 [--workers 2]

First round: the initial std, which both arms share, and each arm's own regulariser (PPO's entropy coefficient,
LaGO's last KL coefficient). Second and third: changes of one arm's settings each, from the first round's
best shared cell. Fourth and fifth: with a reward scale per task, at the demo's
budget. Stage 1 is run once per round. One line of JSON per cell goes to OUT/grid.jsonl.
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
from lago_fast.experiment import EVAL_SEED
from lago_fast.presets import PRESETS
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.runs import open_run
from lago_fast.training import policy_actor, train_run

SHORT = {"steps_per_task": 100_000, "kl_coef_until": 1.0}
SEED = 100  # no seed of a reported run
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
ROUNDS: dict[int, list[tuple[str, dict[str, Any]]]] = {1: FIRST, 2: SECOND, 3: THIRD, 4: FOURTH, 5: FIFTH}


def run_cell(job: tuple[int, str, dict[str, Any], Path]) -> dict[str, Any]:
    """Train and evaluate one cell in a process of its own."""
    torch.set_num_threads(1)
    index, arm, changes, out = job
    base = PRESETS["demo"]
    experiment = replace(base, train=replace(base.train, **{**SHORT, **changes}))
    student = AmortisedPrior.load(out / "student")
    table = stage_one.compact_table(student.instruction_table().numpy())
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
        policy_actor(result.model),
        experiment.env,
        episodes_per_task=25,
        seed=EVAL_SEED + SEED,
        instruction_table=table,
    )
    return {
        "arm": arm,
        **changes,
        "success": evaluation.pool(list(scores.values())).summary()["success"],
        "tasks": {task: score.summary()["success"] for task, score in scores.items()},
        "return": {task: score.mean_return for task, score in scores.items()},
        "steps_to_90": result.curve["steps_to_90"],
        "audit_kl_nats": result.audit_kl_nats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--round", type=int, choices=ROUNDS, required=True)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    out = options.out.absolute()
    experiment = PRESETS["demo"]
    demos = stage_one.record(experiment, out / "demos", overwrite=True)
    stage = stage_one.fit(demos, experiment, out / "prior", overwrite=True)
    stage_one.amortise(stage, experiment, SEED).save(out / "student", overwrite=True)
    jobs = [(i, arm, changes, out) for i, (arm, changes) in enumerate(ROUNDS[options.round])]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as workers, (out / "grid.jsonl").open("w", encoding="utf-8") as lines:
        for row in workers.imap(run_cell, jobs):
            print(json.dumps(row), file=lines, flush=True)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
