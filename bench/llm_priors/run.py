"""Language priors on text games: baselines, value-based and policy-based learners, offline data, posterior sampling.

    python -m bench.llm_priors.run OUT [--workers 2] [--seeds 0 1 2 3 4] [--games ...] [--smoke]
    python -m bench.llm_priors.report OUT

OUT is a folder: `runs.jsonl` gets one line per finished run, runs that are there are not run again; `texts.mdb` keeps
vectors of texts, and `games` what was generated. protocol.md says what is fixed.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from bench.llm_priors.work import (
    CQL,
    DATA_SEED,
    DQN,
    DRAWS,
    ENVS,
    EVAL_SEED,
    FITTED,
    FRACTIONS,
    GAMES,
    KL_COEF,
    NOISE,
    PPO,
    SAMPLING_FRACTION,
    SEEDS,
    Counted,
    Made,
    budget,
    embedder,
    evaluation_env,
    games,
    make_prior,
    prior_alone,
    record,
    together,
    walkthroughs,
)
from lago_fast import runs
from lago_fast.algorithms.cql_prior import CQLPrior
from lago_fast.algorithms.dqn_prior import DQNPrior
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from lago_fast.algorithms.posterior_sampler import PosteriorSampler
from lago_fast.envs.text_transitions import take_episodes
from lago_fast.text_training import Chooses, TextScores, evaluate_text, make_text_ppo

ONLINE = ("dqn", "dqn_prior", "ppo", "kl_ppo_loss", "kl_ppo_reward", "kl_ppo_both")
OFFLINE = ("cql", "cql_walk", "cql_prior")  # cql_walk: CQL, given the walkthroughs too
NEEDS_PRIOR = ("prior", "dqn_prior", "kl_ppo_loss", "kl_ppo_reward", "kl_ppo_both", "cql_prior")
ROWS = "runs.jsonl"


class Job(NamedTuple):
    game: str
    seed: int
    arm: str
    prior: str  # "" without one
    fraction: float  # of the offline data; 0 online
    smoke: bool
    folder: Path

    @property
    def key(self) -> tuple[str, int, str, str, float]:
        """Return what tells runs apart."""
        return self[:5]


def jobs(seeds: tuple[int, ...], folder: Path, smoke: bool) -> Iterator[Job]:
    """Yield every run, seed by seed, so that what is cut off leaves whole seeds."""
    for seed in seeds:
        for name, game in GAMES.items():
            arms = [("random", 0.0), ("prior", 0.0), *((arm, 0.0) for arm in ONLINE)]
            if game.offline:
                arms += [(arm, fraction) for arm in OFFLINE for fraction in FRACTIONS]
            for arm, fraction in arms:
                for prior in game.priors if arm in NEEDS_PRIOR else ("",):
                    yield Job(name, seed, arm, prior, fraction, smoke, folder)


class Curve(BaseCallback):
    """Scores of the learner as it acts, at evenly spaced env steps.

    Args:
        score: plays the evaluation.
        every: env steps.
        counted: whose questions an evaluation is not to count.
    """

    def __init__(self, score: Any, every: int, counted: Counted | None) -> None:
        super().__init__()
        self._score, self._every, self._counted, self._next = score, every, counted, every
        self.env_steps: list[int] = []
        self.success: list[float] = []
        self.total_reward: list[float] = []

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._next:
            self._next += self._every
            if self._counted is not None:
                self._counted.counting = False
            scores = self._score(self.model)
            if self._counted is not None:
                self._counted.counting = True
            self.env_steps.append(self.num_timesteps)
            self.success.append(float(scores.success.mean()))
            self.total_reward.append(float(scores.total_reward.mean()))
        return True


def run(job: Job) -> dict[str, Any]:
    """Train and evaluate one arm with one seed; return its line."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    made = make_prior(job.prior, job.game, job.seed, job.folder) if job.prior else None
    done = _offline(job, made) if job.fraction else _played(job, made)
    return {
        **dict(zip(("game", "seed", "arm", "prior", "fraction"), job.key, strict=True)),
        "walkthrough_steps": made.walkthrough_steps if made else 0,
        **done,
        "wall_s": round(time.perf_counter() - started, 2),
        "commit": runs.provenance()["commit"],
    }


def _score(job: Job, model: Chooses, deterministic: bool = False) -> TextScores:
    """Play an evaluation; DQN without a prior explores there as little as at the end of its training."""
    env, episodes = evaluation_env(job.game, job.seed, job.folder), budget(job.game, job.smoke).episodes
    if not isinstance(model, DQNPrior):
        return evaluate_text(model, env, episodes, EVAL_SEED + job.seed, deterministic)
    # what an evaluation draws must not change the training
    drawn, rate = model.generator.get_state(), model.exploration_rate
    model.exploration_rate = model.exploration_eps[1]
    scores = evaluate_text(model, env, episodes, EVAL_SEED + job.seed, deterministic)
    model.exploration_rate = rate
    model.generator.set_state(drawn)
    return scores


def _summary(scores: TextScores) -> dict[str, float]:
    return {"success": float(scores.success.mean()), "total_reward": float(scores.total_reward.mean())}


def _both(job: Job, model: Chooses) -> dict[str, float]:
    """Return the scores of a learner as it acts, and the success of its best actions."""
    greedy = float(_score(job, model, deterministic=True).success.mean())
    return {**_summary(_score(job, model)), "greedy_success": greedy}


def _played(job: Job, made: Made | None) -> dict[str, Any]:
    """Return the line of an arm without data: one that does not learn, or that learns online."""
    prior, embeds, given = made.prior if made else None, embedder(job.folder), budget(job.game, job.smoke)
    if job.arm in ("random", "prior"):
        return _both(job, prior_alone(prior, job.seed))
    env = games(job.game, job.seed, ENVS, job.folder, "train")
    model: Any
    if job.arm in ("dqn", "dqn_prior"):
        model = DQNPrior(env, prior, embeds, seed=job.seed, **DQN)
    else:
        placement = job.arm.removeprefix("kl_ppo_") if prior else "loss"
        model = make_text_ppo(
            env, prior, embeds, max_actions=GAMES[job.game].max_actions, seed=job.seed, kl_placement=placement,
            kl_coef=LinearSchedule(*KL_COEF[placement], 0.5), **PPO,
        )  # fmt: skip
    steps = given.value_steps if isinstance(model, DQNPrior) else given.policy_steps
    curve = Curve(lambda m: _score(job, m), steps // given.evaluations, prior)
    model.learn(steps, callback=curve)
    queries = {"queries": prior.asked, "first_sightings": prior.first_sightings} if prior else {}
    return {
        **_both(job, model),
        **queries,
        "env_steps": model.num_timesteps,
        "curve": {"env_steps": curve.env_steps, "success": curve.success, "total_reward": curve.total_reward},
    }


def _offline(job: Job, made: Made | None) -> dict[str, Any]:
    """Return the line of an arm that learns from a fraction of the data, and of posterior sampling with its Q."""
    given, prior = budget(job.game, job.smoke), made.prior if made else None
    env = games(job.game, job.seed, ENVS, job.folder, "record")
    data = record(env, given.data_episodes, NOISE, DATA_SEED + job.seed)
    whole = len(data.success)
    # a prefix of one order: a larger fraction holds the smaller ones
    order = np.random.default_rng(job.seed).permutation(whole)
    part = take_episodes(data, order[: max(1, round(job.fraction * whole))])
    recorded = len(part.choice)
    if job.arm == "cql_walk" or job.prior == FITTED:
        # who has paid for walkthroughs of this game may learn from them
        walked = walkthroughs(job.game, job.seed, job.folder)
        spent = {"walkthrough_steps": len(walked.choice)}
        part = together(part, walked)
    else:
        spent = {}
    model = CQLPrior(part, prior, embedder(job.folder), seed=job.seed, **CQL)
    model.learn(given.offline_updates)
    found: dict[str, Any] = _summary(_score(job, model, deterministic=True))
    found["drawn_success"] = float(_score(job, model).success.mean())
    if prior is not None and job.fraction == SAMPLING_FRACTION:
        found["sampling"] = [_sampled(job, prior, model, k) for k in DRAWS]
    return {
        **found,
        **spent,
        "transitions": recorded,
        "full_transitions": len(data.choice),
        "data_success": float(data.success.mean()),
    }


def _sampled(job: Job, prior: Counted, model: CQLPrior, k: int | None) -> dict[str, Any]:
    """Return how posterior sampling with k proposals does with the model's Q."""
    sampler = PosteriorSampler(prior, model, alpha=CQL["alpha"], k=k, seed=job.seed)
    scores = _score(job, sampler)
    return {"k": k, **_summary(scores), "decisions_per_episode": float(scores.length.mean())}


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that were finished."""
    path = folder / ROWS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def key(row: dict[str, Any]) -> tuple[str, int, str, str, float]:
    """Return what tells a line's run apart."""
    return row["game"], row["seed"], row["arm"], row["prior"], row["fraction"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--smoke", action="store_true", help="every arm with hardly any steps: does it run?")
    options = parser.parse_args()
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    done = set(map(key, read(folder)))
    every = jobs(tuple(options.seeds), folder, options.smoke)
    waiting = [job for job in every if job.key not in done and job.game in options.games]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as workers, (folder / ROWS).open("a", encoding="utf-8") as lines:
        for row in workers.imap_unordered(run, waiting):
            print(json.dumps(row), file=lines, flush=True)
            print(*key(row), round(row["success"], 3), f"{row['wall_s']} s", flush=True)


if __name__ == "__main__":
    main()
