"""Does a wrong prior hurt, and does the guard keep what a good one gives? PPO against LaGO with and without it.

    python -m bench.guard OUT.jsonl [--workers 2]     # one line of JSON per run; rows that are there are not run again
    python -m bench.guard OUT.jsonl --report [--plot OUT.png]

The protocol, fixed before the first run:

- Tasks: TASKS of guard_tasks.py, one at a time, with steps at which plain PPO was on its way up in a pilot with a seed
  of its own; of CLEVR-Robot the real goals, which policies see as numbers.
- Paired seeds: SEEDS decide policy, minibatches and env of every arm; nothing else differs between the arms of a seed.
- Settings: those of the presets (learning rate, network, epochs), KL weight 0.3 to 0.01 at half of the steps; on
  Meta-World 16 envs and episodes of 100 steps. The guard has the floor of the presets, 1, for the schedule lets go, and
  imitates.
- Priors: multilayer perceptrons. "good": fitted to episodes of the scripted expert; "few": to a random hundredth of
  their rows; "other_task": to as many episodes of another task, on CLEVR-Robot: taking each wording for that of another
  goal; "uniform": no action is liked more than another; "adversarial": the good one's mean negated, on CLEVR-Robot its
  actions shuffled. Each says how far it is to be trusted, by the demonstrations that it was fitted to.
- Success: EPISODES episodes after the training, any step of the episode; on CLEVR-Robot actions are drawn, as its
  preset has it.
- Criteria: with the guard and each bad prior, the mean difference to PPO is at least -5 points, its 90 % interval (t,
  over the seeds and tasks) printed; with the good prior, the guard keeps at least 90 % of the steps that the unguarded
  KL saves on the way to PPO's last training success (of the last 50 episodes; on Meta-World).

Runs are ordered by seed, those that the criteria need first, so that a run that is cut leaves whole seeds.
"""

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from stable_baselines3.common.logger import configure

from bench.guard_tasks import PRIORS, TASKS, make_prior, policy_table, record
from lago_fast import evaluate as evaluation
from lago_fast import runs
from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.algorithms.guard import GuardSettings
from lago_fast.training import SuccessCurve, kl_schedule, make_env, policy_actor, ppo_settings

BAD = PRIORS[1:]
SEEDS = (0, 1, 2, 3, 4, 5)
EPISODES, EVAL_SEED = 100, 900_000
NEEDED = [("ppo", ""), ("lago", "good"), *(("guarded", kind) for kind in PRIORS)]  # by the criteria
BESIDE = [("lago", kind) for kind in BAD]
ARMS = NEEDED + BESIDE
# of Student's t, by degrees of freedom
T_90 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833, 10: 1.812, 11: 1.796,
        12: 1.782, 13: 1.771, 14: 1.761, 15: 1.753, 16: 1.746, 17: 1.740}  # fmt: skip


def run(job: tuple[str, int, str, str, Path]) -> dict[str, Any]:
    """Train and evaluate one arm with one seed."""
    task, seed, arm, kind, folder = job
    torch.set_num_threads(1)
    settings, train, table = TASKS[task].settings, TASKS[task].train, policy_table(task)
    prior = make_prior(kind, task, folder) if kind else None
    env = make_env(settings, seed, table, num_threads=1)
    model = FastKLPPO(
        "MlpPolicy",
        env,
        seed=seed,
        **ppo_settings(train, settings),
        prior=prior,
        kl_coef=kl_schedule(train) if prior else 0.0,
        guard=GuardSettings(floor=1.0) if arm == "guarded" else None,
    )
    with tempfile.TemporaryDirectory() as log:
        model.set_logger(configure(log, ["csv"]))
        lane = env.array_lane
        curve, started = SuccessCurve(lane.tasks, lane.task_id), time.perf_counter()
        model.learn(train.steps_per_task, callback=curve, log_interval=1)
        wall_s = time.perf_counter() - started
        with (Path(log) / "progress.csv").open(encoding="utf-8") as file:
            header = file.readline().strip().split(",")
            guard = [line.split(",")[header.index("prior/guard_weight")] for line in file] if arm == "guarded" else []
        model.logger.close()
    env.close()
    scores = evaluation.evaluate(
        policy_actor(model, sample=settings.sample_actions, seed=seed), settings, episodes_per_task=EPISODES,
        seed=EVAL_SEED + seed, instruction_table=table,
    )[settings.tasks[0]]  # fmt: skip
    return {
        "task": task,
        "seed": seed,
        "arm": arm,
        "prior": kind,
        "success": scores.summary()["success"],
        "return": scores.mean_return,
        "curve": curve.curve[settings.tasks[0]],
        "guard_weight": [float(w) for w in guard if w],
        "wall_s": wall_s,
        "commit": runs.provenance()["commit"],
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows that were run."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def key(row: dict[str, Any]) -> tuple[str, int, str, str]:
    return row["task"], row["seed"], row["arm"], row["prior"]


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 90 % interval."""
    if len(values) < 2:
        return float(np.mean(values)), math.inf
    return float(np.mean(values)), T_90[len(values) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def steps_to(curve: dict[str, list[float]], success: float) -> float:
    """Return the env steps at which the training success first was that high, all of them if never."""
    reached = [n for n, s in zip(curve["env_steps"], curve["success"], strict=True) if s >= success]
    return min([*reached, curve["env_steps"][-1]])


def report(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table's lines and the criteria, over the seeds for which all arms concerned are there."""
    found = {key(row): row for row in rows}
    yield "| prior | arm | " + " | ".join(TASKS) + " | minus PPO, points | 90 % interval | runs |"
    yield "|---|---|" + "---|" * len(TASKS) + "---|---|---|"
    for arm, kind in sorted(ARMS, key=lambda a: (a[1] != "", PRIORS.index(a[1]) if a[1] else 0, a[0] != "lago")):
        means, differences = [], []
        for task in TASKS:
            own = {row["seed"]: row["success"] for row in rows if key(row)[::2] == (task, arm) and row["prior"] == kind}
            means.append(f"{100 * np.mean(list(own.values())):.0f}" if own else "")
            ppo = {seed: found[task, seed, "ppo", ""]["success"] for seed in own if (task, seed, "ppo", "") in found}
            differences += [100 * (own[seed] - ppo[seed]) for seed in ppo]
        if not differences:
            continue
        mean, half = interval(differences)
        shown = "" if arm == "ppo" else f"{mean:+.1f} | {mean - half:+.1f} to {mean + half:+.1f}"
        yield f"| {kind or 'none'} | {arm} | {' | '.join(means)} | {shown or ' | '} | {len(differences)} |"
    gains: dict[str, list[tuple[float, float]]] = {task: [] for task in TASKS}  # without the guard, with it
    for task, about in TASKS.items():
        if about.settings.env == "clevr-robot":
            continue  # a success ends its episodes, and of the first that end most are successes: the curve starts at 1
        for seed in SEEDS:
            three = [found.get((task, seed, *arm)) for arm in (("ppo", ""), ("lago", "good"), ("guarded", "good"))]
            if None in three:
                continue
            ppo, *others = three
            last = ppo["curve"]["success"][-1]
            needed, *own = (steps_to(row["curve"], last) for row in (ppo, *others))
            gains[task].append((1 - own[0] / needed, 1 - own[1] / needed))
    for name, pairs in {**gains, "all": [pair for own in gains.values() for pair in own]}.items():
        if pairs:
            without, with_guard = np.mean(pairs, axis=0)
            yield f"steps saved on the way to PPO's last success, {name}, {len(pairs)} pairs: {without:.2f} unguarded, "
            yield f"{with_guard:.2f} guarded" + (f", kept: {with_guard / without:.2f}" if without > 0 else "")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training success of every arm, a panel per task and prior."""
    figure, axes = plt.subplots(len(TASKS), len(PRIORS), figsize=(15, 3 * len(TASKS)), sharey=True)
    for line, task in zip(axes, TASKS, strict=True):
        for axis, kind in zip(line, PRIORS, strict=True):
            axis.set_title(f"{task}, {kind.replace('_', ' ')}", fontsize=9)
            for arm, own, colour in (("ppo", "", "0.5"), ("lago", kind, "tab:red"), ("guarded", kind, "tab:blue")):
                curves = [r["curve"] for r in rows if (r["task"], r["arm"], r["prior"]) == (task, arm, own)]
                grid = np.linspace(0, TASKS[task].train.steps_per_task, 40)
                if curves:
                    each = [np.interp(grid, c["env_steps"], c["success"], left=0.0) for c in curves]
                    axis.plot(grid, 100 * np.mean(each, axis=0), color=colour, label=arm)
                    axis.fill_between(grid, *(100 * np.quantile(each, q, axis=0) for q in (0.25, 0.75)),
                                      color=colour, alpha=0.2)  # fmt: skip
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("env steps")
    figure.supylabel("training success, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--report", action="store_true", help="print the table of the rows that are there")
    parser.add_argument("--plot", type=Path, help="draw the curves of the rows that are there")
    options = parser.parse_args()
    rows = read(options.out)
    if options.report or options.plot:
        print("\n".join(report(rows)))
        if options.plot:
            plot(rows, options.plot)
        return
    folder = options.out.absolute().parent
    for task in options.tasks:
        record(task, folder)
    done = set(map(key, rows))
    order = [(seed, arm) for arms in (NEEDED, BESIDE) for seed in SEEDS for arm in arms]
    jobs = [
        (task, seed, *arm, folder) for seed, arm in order for task in options.tasks if (task, seed, *arm) not in done
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as workers, options.out.open("a", encoding="utf-8") as lines:
        for row in workers.imap_unordered(run, jobs):
            print(json.dumps(row), file=lines, flush=True)
            print(*key(row), row["success"], flush=True)


if __name__ == "__main__":
    main()
