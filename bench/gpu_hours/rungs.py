"""The arms: each opens what it needs, and then costs one iteration, whole or as a slice that is scaled up.

A slice is never scaled across what it does not contain: collection by its steps, asking by its rows, an update by its
minibatches. Test: pytest tests/bench/test_gpu_hours.py
"""

import atexit
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from bench.gpu_hours.accounting import Cost, measured
from bench.gpu_hours.first_user import AutoModelPrior, PriorPPO
from bench.gpu_hours.plain_ppo import PlainPPO
from bench.gpu_hours.user_env import make_user_env
from bench.gpu_hours.work import Stage, Work
from lago_fast import FastKLPPO, make_metaworld
from lago_fast.envs.metaworld import STATE_DIM
from lago_fast.envs.official import official_makers

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = 10**12  # env steps of a run that a slice is taken from the middle of


class Part(NamedTuple):
    """A measured part of an iteration, and how often it is in one."""

    name: str
    cost: Cost
    times: float


class Measured(NamedTuple):
    """One iteration of an arm."""

    parts: list[Part]
    env_steps: int  # of the iteration, valid ones

    @property
    def cost(self) -> Cost:
        """Return the cost of the whole iteration."""
        total = None
        for part in self.parts:
            cost = part.cost.scaled(part.times)
            total = cost if total is None else total.plus(cost)
        assert total is not None
        return total


Slice = Callable[[], Measured]


class Arm(NamedTuple):
    """A rung or a peer."""

    name: str
    adds: str  # what it has that the one before has not
    tag: str  # baseline, exact, refit, approximate, stale; peers: peer
    facts: dict[str, Any]  # the success or the KL that the tag stands on
    open: Callable[[], Any]  # context manager that yields a Slice


def ladder(work: Work, stage: Stage, carried: str, *, python_envs: bool = True) -> list[Arm]:
    """Return the rungs from 1 to 8.

    Args:
        work: of an iteration.
        stage: forms of the prior.
        carried: "shared" or "quantized", which of rungs 3 and 4 the later ones ask.
        python_envs: whether Python Meta-World is installed; without it rungs 1 to 4 step EnvPool, and say so.
    """
    ask_prompt = AutoModelPrior(stage.prompt.prior)
    later, student = getattr(stage, carried), stage.student
    exact_or = "exact" if carried == "shared" else "approximate"
    where = "" if python_envs else ", on EnvPool (Python Meta-World is not installed)"
    by_user = partial(_by_user, work, python_envs=python_envs)
    return [
        Arm(
            "1 first user",
            f"SB3 PPO, subprocess Python Meta-World, the full prompt in every minibatch of every epoch{where}",
            "baseline",
            stage.prompt.facts,
            partial(by_user, ask_prompt, in_every_minibatch=True),
        ),
        Arm(
            "2 careful user",
            f"the prior asked once per step{where}",
            "exact",
            stage.prompt.facts,
            partial(by_user, ask_prompt, in_every_minibatch=False),
        ),
        Arm(
            "3 shared instruction",
            "prefix KV"
            if stage.shared_is == "exact"
            else "the instruction pooled into one token, of which the keys and values are kept",
            stage.shared_is,
            stage.shared.facts,
            partial(by_user, asker(stage.shared.prior), in_every_minibatch=False),
        ),
        Arm(
            f"4 {stage.quantized.facts['quantization']}",
            "fewer bits" + ("" if carried == "quantized" else " (slower here: not carried on)"),
            "approximate",
            stage.quantized.facts,
            partial(by_user, asker(stage.quantized.prior), in_every_minibatch=False),
        ),
        Arm(
            "5 EnvPool",
            f"native stepping, with the prior of rung {3 if carried == 'shared' else 4}",
            exact_or,
            later.facts,
            partial(_by_user, work, asker(later.prior), in_every_minibatch=False, python_envs=False),
        ),
        Arm("6 FastKLPPO", "fused update", exact_or, later.facts, partial(_ours, work, later.prior, groups=1)),
        Arm("7 two groups", "double-buffered collection", exact_or, later.facts, partial(_ours, work, later.prior)),
        Arm(
            "8 amortised",
            "a student asked",
            "approximate",
            student.facts,
            partial(_ours, work, student.prior),
        ),
    ]


def side_row(work: Work, stage: Stage, carried: str) -> Arm:
    """Return what stands beside rung 7: the next rollout is collected during the update, and one update stale."""
    later = getattr(stage, carried)
    adds = "rung 7 with overlap='update', one update stale"
    return Arm("side row: overlapped", adds, "stale", later.facts, partial(steady, work, later.prior, overlap="update"))


def peers(work: Work, sbx_python: str | None, skrl_python: str | None = None, *, python_envs: bool = True) -> list[Arm]:
    """Return plain PPO, by this package and by others; `sbx_python`, `skrl_python`: interpreters that have these."""
    arms = [
        Arm("FastKLPPO, no prior", "this package", "peer", {}, partial(_ours, work, None)),
        Arm(
            "SB3 on EnvPool",
            "Stable-Baselines3's PPO on this package's lane",
            "peer",
            {},
            partial(_sb3, make_env, work),
        ),
        Arm(
            "SB3 on EnvPool, wrapped by its user",
            "the same on EnvPool's own API, VecMonitor and VecNormalize",
            "peer",
            {},
            partial(_sb3, make_user_env, work),
        ),
        Arm("CleanRL style on EnvPool", "one file of eager PyTorch", "peer", {}, partial(_plain, work)),
    ]
    for name, adds, python in (("sbx", "SB3's PPO in JAX", sbx_python), ("skrl", "its PPO in PyTorch", skrl_python)):
        if python is not None:
            elsewhere = partial(_elsewhere, work, python, f"bench.gpu_hours.{name}_worker")
            arms.append(Arm(f"{name} on EnvPool", adds, "peer", {}, elsewhere))
    if python_envs:
        arms.append(
            Arm("SB3 on Python Meta-World", "SB3's PPO", "peer", {}, partial(_by_user, work, None, python_envs=True))
        )
    return arms


def make_env(work: Work, groups: int = 1) -> Any:
    """Return the native env of the work."""
    return make_metaworld(
        [work.task],
        work.num_envs,
        groups=groups,
        seed=work.seed,
        max_episode_steps=work.max_episode_steps,
        phrasings="first",
        normalize_reward=True,
        gamma=work.gamma,
    )


def asker(prior: Any) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return a prior as rungs 2 to 5 ask it: states and instruction ids to mean and std."""

    def ask(states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer = prior.query(states, ids)
        return answer.mean, answer.log_std.exp()

    return ask


@contextmanager
def _ours(work: Work, prior: Any, groups: int = 2) -> Iterator[Slice]:
    """Whole iterations of FastKLPPO."""
    env = make_env(work, groups)
    model = FastKLPPO("MlpPolicy", env, **work.ppo(), prior=prior, kl_coef=work.kl_coef if prior is not None else 0.0)
    yield partial(iteration, model)
    env.close()


@contextmanager
def steady(work: Work, prior: Any, overlap: str = "none") -> Iterator[Slice]:
    """Iterations of FastKLPPO in the middle of a run: an update, and the rollout beside it or behind it."""
    env = make_env(work, 2)
    kl_coef = work.kl_coef if prior is not None else 0.0
    model = FastKLPPO("MlpPolicy", env, **work.ppo(), prior=prior, kl_coef=kl_coef, overlap=overlap)
    _, callback = model._setup_learn(ENDLESS)

    def collect() -> None:
        model.collect_rollouts(env, callback, model.rollout_buffer, work.n_steps)

    def slice_() -> Measured:
        before = model.num_timesteps
        with measured() as cost:
            model.train()
            collect()
        return Measured([Part("iteration", cost(), 1)], model.num_timesteps - before)

    collect()
    yield slice_
    env.close()


@contextmanager
def _sb3(make: Callable[[Work], VecEnv], work: Work) -> Iterator[Slice]:
    env = make(work)
    yield partial(iteration, PPO("MlpPolicy", env, **work.ppo()))
    env.close()


@contextmanager
def _plain(work: Work) -> Iterator[Slice]:
    env = make_env(work)
    yield partial(iteration, PlainPPO(env.array_lane, work))
    env.close()


def iteration(model: Any) -> Measured:
    """Train a model for one rollout and its update."""
    before = model.num_timesteps
    with measured() as cost:
        model.learn(1, log_interval=1000, reset_num_timesteps=before == 0)  # one step more is one rollout more
    return Measured([Part("iteration", cost(), 1)], model.num_timesteps - before)


@contextmanager
def _elsewhere(work: Work, python: str, worker_module: str) -> Iterator[Slice]:
    """Iterations of a peer in another interpreter (`bench.gpu_hours.worker`)."""
    command = [python, "-m", worker_module, json.dumps(work.__dict__)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None

        def slice_() -> Measured:
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            return Measured([Part("iteration", Cost(**answer["cost"]), 1)], answer["env_steps"])

        yield slice_
        worker.stdin.close()


@contextmanager
def _by_user(work: Work, ask: Any, *, python_envs: bool, in_every_minibatch: bool = False) -> Iterator[Slice]:
    """Slices of an iteration of Stable-Baselines3's PPO, with a prior or (`ask` None) without."""
    with ExitStack() as opened:
        env = opened.enter_context(_stepped(work, python_envs))
        small = work.slice_steps * work.num_envs
        settings = {**work.ppo(), "n_steps": work.slice_steps, "batch_size": min(work.batch_size, small)}
        model: PPO
        if ask is None:
            model = PPO("MlpPolicy", env, **settings)
        else:
            guided = {"ask": ask, "kl_coef": work.kl_coef, "in_every_minibatch": in_every_minibatch}
            model = PriorPPO("MlpPolicy", env, **settings, **guided)
        _, callback = model._setup_learn(work.env_steps, None)
        # a minibatch of fewer rows, scaled by rows: of so slow an update the language model is nearly all
        model.batch_size = work.slice_rows if in_every_minibatch else work.batch_size
        full = _filled(model, work)
        yield lambda: _sliced(model, full, env, callback, work)


def _sliced(model: PPO, full: Any, env: VecEnv, callback: Any, work: Work) -> Measured:
    small = model.rollout_buffer
    with measured() as collecting:
        model.collect_rollouts(env, callback, small, work.slice_steps)
    parts = [Part("collection", collecting(), work.n_steps / work.slice_steps)]
    model.rollout_buffer, of_rows = full, work.env_steps / work.slice_rows
    if isinstance(model, PriorPPO) and model.in_every_minibatch:
        with measured() as updating:
            model.train(limit=1)
        parts.append(Part("update", updating(), work.n_epochs * of_rows))
    else:
        if isinstance(model, PriorPPO):
            with measured() as asking:
                model.ask_once(work.slice_rows)
            parts.append(Part("prior", asking(), of_rows))
            model.repeat_answers(work.env_steps)
        with measured() as updating:
            model.train()
        parts.append(Part("update", updating(), 1))
    model.rollout_buffer = small
    return Measured(parts, work.env_steps)


def _filled(model: PPO, work: Work) -> Any:
    """Return a whole rollout's buffer, of random content: an update costs the same whatever it learns from."""
    rng = np.random.default_rng(work.seed)
    own = model.rollout_buffer
    full = type(own)(
        work.n_steps, model.observation_space, model.action_space, model.device, gamma=work.gamma, n_envs=work.num_envs
    )
    shape = (work.num_envs, STATE_DIM)
    for _ in range(work.n_steps):
        observation = rng.normal(size=shape).astype(np.float32)
        with torch.no_grad():
            actions, values, log_prob = model.policy(torch.as_tensor(observation, device=model.device))
        reward, start = rng.normal(size=work.num_envs), np.zeros(work.num_envs)
        full.add(observation, actions.cpu().numpy(), reward, start, values, log_prob)
    full.compute_returns_and_advantage(values.flatten(), np.zeros(work.num_envs))
    return full


@contextmanager
def _stepped(work: Work, python_envs: bool) -> Iterator[VecEnv]:
    if python_envs:
        yield _python_envs(work)  # which all arms share: the workers of one are as many processes as envs
        return
    env = make_env(work)
    yield env
    env.close()


@cache
def _python_envs(work: Work) -> VecEnv:
    makers = official_makers((work.task,), work.num_envs, work.max_episode_steps, None)
    # fork: the workers share what is imported already
    env = SubprocVecEnv(makers, start_method="fork")
    atexit.register(env.close)
    return env
