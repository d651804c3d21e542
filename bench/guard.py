"""Does a wrong prior hurt, and does the guard keep what a good one gives? PPO against LaGO with and without it.

    python bench/guard.py OUT.jsonl [--workers 2]     # one line of JSON per run; rows that are there are not run again
    python bench/guard.py OUT.jsonl --report [--plot OUT.png]

The protocol, fixed before the first run:

- Tasks: TASKS, one at a time, with steps at which plain PPO was on its way up in a pilot with a seed of its own.
- Paired seeds: SEEDS decide policy, minibatches and env of every arm; nothing else differs between the arms of a seed.
- Settings: those of the demo (learning rate, network, epochs, KL weight 0.3 to 0.01 at half of the steps), with
  ENVS envs and episodes of HORIZON steps.
- Priors: multilayer perceptrons (no language model: the guard sees only what a prior answers), std 0.2, fitted by least
  squares. "good": to DEMOS episodes of the scripted expert; "few": to a random hundredth of their rows; "other_task":
  to as many episodes of another task; "uniform": the good one's mean with a std of 10, in a box
  of half width 1; "adversarial": the good one's mean negated.
- Success: EPISODES episodes with deterministic actions after the training, any step of the episode.
- Criteria: with the guard and each bad prior, the mean difference to PPO is at least -5 points, its 90 % interval (t,
  over the seeds and tasks) printed; with the good prior, the guard keeps at least 90 % of the steps that the unguarded
  KL saves on the way to PPO's last training success (of the last 50 episodes).

Runs are ordered by seed, those that the criteria need first, so that a run that is cut leaves whole seeds.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from stable_baselines3.common.logger import configure
from torch import Tensor, nn

from lago_fast import evaluate as evaluation
from lago_fast import runs
from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.demos import Demonstrations, load_demos, record_demos
from lago_fast.envs.metaworld import task_phrasings
from lago_fast.presets import EnvSettings, TrainSettings
from lago_fast.priors.base import PriorOutput
from lago_fast.training import SuccessCurve, kl_schedule, make_env, policy_actor, ppo_settings

# task -> its env steps, and the other task
TASKS = {"button-press": (22_000, "push"), "coffee-button": (22_000, "drawer-close")}
PRIORS = ("good", "few", "other_task", "uniform", "adversarial")
BAD = PRIORS[1:]
SEEDS = (0, 1, 2, 3, 4, 5)
ENVS, HORIZON, EPISODES, DEMOS = 16, 100, 100, 5
DEMO_SEED, EVAL_SEED, FIT_SEED, FIT_STEPS, FIT_RATE = 2_000, 900_000, 0, 1_500, 2e-3
NEEDED = [("ppo", ""), ("lago", "good"), *(("guarded", kind) for kind in PRIORS)]  # by the criteria
BESIDE = [("lago", kind) for kind in BAD]
ARMS = NEEDED + BESIDE
T_90 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833, 10: 1.812, 11: 1.796}


class MLPPrior:
    """A frozen network as the prior of one task.

    Args:
        net: from normalised states [B, S] to means [B, D].
        shift, scale: [S], the normaliser.
        task: whose instructions it knows.
        std: of every answer.
        sign: -1 negates the mean.
    """

    kind, action_dim = "gaussian", 4

    def __init__(self, net: nn.Module, shift: Tensor, scale: Tensor, task: str, std: float, sign: float) -> None:
        self.net, self.shift, self.scale, self.std, self.sign = net, shift, scale, std, sign
        self.instructions, self.state_dim = list(task_phrasings()[task]), len(shift)

    @property
    def digest(self) -> str:
        weights = [p.detach().numpy().tobytes() for p in self.parameters()]
        return hashlib.sha256(b"".join([*weights, repr((self.std, self.sign)).encode()])).hexdigest()

    @torch.no_grad()
    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        assert len(instruction_id) == len(state)
        mean = self.sign * self.net((state - self.shift) / self.scale).clamp(-1, 1)
        return PriorOutput(mean=mean, log_std=torch.full_like(mean, math.log(self.std)))

    def instruction_table(self) -> Tensor:
        return torch.ones(len(self.instructions), 1)

    def telemetry(self) -> dict[str, float]:
        return {}

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.net.parameters()


def demonstrations(task: str, folder: Path) -> Demonstrations:
    """Return the episodes of the scripted expert, recorded once."""
    path = folder / f"demos_{task}"
    if not path.exists():
        record_demos([task], DEMOS, path, seed=DEMO_SEED, max_episode_steps=HORIZON)
    return load_demos(path)


@cache
def make_prior(kind: str, task: str, folder: Path) -> MLPPrior:
    """Fit one of PRIORS for a task; the same in every run."""
    demos = demonstrations(TASKS[task][1] if kind == "other_task" else task, folder)
    states, actions = torch.from_numpy(demos.states), torch.from_numpy(demos.actions)
    shift, scale = states.mean(dim=0), states.std(dim=0) + 1e-2
    torch.manual_seed(FIT_SEED)
    if kind == "few":
        kept = torch.randperm(len(states))[: len(states) // 100]
        states, actions = states[kept], actions[kept]
    net = nn.Sequential(nn.Linear(len(shift), 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4))
    optimiser = torch.optim.Adam(net.parameters(), lr=FIT_RATE)
    for step in range(FIT_STEPS):
        optimiser.param_groups[0]["lr"] = FIT_RATE * (1 - step / FIT_STEPS)
        rows = torch.randint(len(states), (256,))
        loss = (net((states[rows] - shift) / scale) - actions[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.requires_grad_(False)
    return MLPPrior(net, shift, scale, task, 10.0 if kind == "uniform" else 0.2, -1.0 if kind == "adversarial" else 1.0)


def run(job: tuple[str, int, str, str, Path]) -> dict[str, Any]:
    """Train and evaluate one arm with one seed."""
    task, seed, arm, kind, folder = job
    torch.set_num_threads(1)
    settings = EnvSettings(tasks=(task,), num_envs=ENVS, max_episode_steps=HORIZON)
    train = TrainSettings(steps_per_task=TASKS[task][0], kl_coef=0.3, kl_coef_end=0.01, kl_coef_until=0.5)
    prior = make_prior(kind, task, folder) if kind else None
    env = make_env(settings, seed, None, num_threads=1)
    model = FastKLPPO(
        "MlpPolicy",
        env,
        seed=seed,
        **ppo_settings(train, settings),
        prior=prior,
        kl_coef=kl_schedule(train) if prior else 0.0,
        guard=True if arm == "guarded" else None,
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
    scores = evaluation.evaluate(policy_actor(model), settings, episodes_per_task=EPISODES, seed=EVAL_SEED + seed)
    return {
        "task": task,
        "seed": seed,
        "arm": arm,
        "prior": kind,
        "success": scores[task].summary()["success"],
        "return": scores[task].mean_return,
        "curve": curve.curve[task],
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
    gains: dict[str, list[float]] = {"lago": [], "guarded": []}
    for task in TASKS:
        for seed in SEEDS:
            three = [found.get((task, seed, *arm)) for arm in (("ppo", ""), ("lago", "good"), ("guarded", "good"))]
            if None in three:
                continue
            ppo, *others = three
            last = ppo["curve"]["success"][-1]
            for row in others:
                gains[row["arm"]].append(1 - steps_to(row["curve"], last) / steps_to(ppo["curve"], last))
    if gains["lago"]:
        without, with_guard = (float(np.mean(gains[arm])) for arm in ("lago", "guarded"))
        yield f"steps saved on the way to PPO's last success: {without:.2f} unguarded, {with_guard:.2f} guarded, "
        yield f"kept: {with_guard / without:.2f} ({len(gains['lago'])} pairs)"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training success of every arm, a panel per task and prior."""
    figure, axes = plt.subplots(len(TASKS), len(PRIORS), figsize=(15, 3 * len(TASKS)), sharey=True)
    for line, task in zip(axes, TASKS, strict=True):
        for axis, kind in zip(line, PRIORS, strict=True):
            axis.set_title(f"{task}, {kind.replace('_', ' ')}", fontsize=9)
            for arm, own, colour in (("ppo", "", "0.5"), ("lago", kind, "tab:red"), ("guarded", kind, "tab:blue")):
                curves = [r["curve"] for r in rows if (r["task"], r["arm"], r["prior"]) == (task, arm, own)]
                grid = np.linspace(0, TASKS[task][0], 40)
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
    for task in {*TASKS, *(other for _, other in TASKS.values())}:
        demonstrations(task, folder)
    done = set(map(key, rows))
    order = [(seed, arm) for arms in (NEEDED, BESIDE) for seed in SEEDS for arm in arms]
    jobs = [(task, seed, *arm, folder) for seed, arm in order for task in TASKS if (task, seed, *arm) not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as workers, options.out.open("a", encoding="utf-8") as lines:
        for row in workers.imap_unordered(run, jobs):
            print(json.dumps(row), file=lines, flush=True)
            print(*key(row), row["success"], flush=True)


if __name__ == "__main__":
    main()
