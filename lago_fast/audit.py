"""What the prior says to a trained policy: both on the same states, in words, with their KL and the prior's trust.

Test: pytest tests/test_audit.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.envs.vec_env import ArrayVecEnv
from lago_fast.errors import UnsupportedArgument, check_seed
from lago_fast.priors.base import ActionPrior, PriorOutput, match_instructions, prior_kl


class Visited(NamedTuple):
    """Rows of whole episodes, in no order that matters."""

    observation: np.ndarray  # [n, O], as the policy saw it
    state: np.ndarray  # [n, S], raw
    instruction_id: np.ndarray  # [n], of the env
    task_id: np.ndarray  # [n]
    step: np.ndarray  # [n], from 0
    success: np.ndarray  # [n] bool, of the episode, at any step

    def take(self, index: np.ndarray) -> "Visited":
        """Return some of the rows."""
        return Visited(*(column[index] for column in self))


class Comparison(NamedTuple):
    """Policy and prior on n sampled states."""

    rows: Visited
    policy: PriorOutput  # in the prior's terms, [n, ...] on the CPU
    prior: PriorOutput
    kl_nats: np.ndarray  # [n], in the direction that was asked for
    trust: np.ndarray | None  # [n]; None: this prior gives none
    places: np.ndarray | None  # [n, 2], the prior's latents on their two widest directions; None: it has none
    demonstrated: np.ndarray | None  # [K, 2], likewise, of the states that the prior was fitted to
    explained: float  # share of the latents' variance in those directions


def audit(
    model: FastKLPPO,
    prior: ActionPrior,
    env: ArrayVecEnv,
    *,
    states: int,
    seed: int,
    kl_direction: str = "policy_prior",
) -> Comparison:
    """Play one episode in every env, and ask policy and prior about a sample of the states, even over the tasks.

    Args:
        model: whose policy plays, deterministically.
        prior: that is asked about the same states.
        env: of the tasks, with the table that the policy was trained with.
        states: to sample, at most.
        seed: of the sample.
        kl_direction: as `FastKLPPO`'s.

    Raises:
        PriorMismatch: the prior does not know the env's states or instructions.
        UnsupportedArgument: a policy with a distribution that no prior has, or fewer states than tasks.
    """
    prior_id = match_instructions(prior, env.instructions)
    check_states(states, len(env.tasks))  # before they are played for
    rows = sample(play(model, env), states, seed)
    said = prior.query(torch.from_numpy(rows.state), prior_id[torch.from_numpy(rows.instruction_id)])
    said = PriorOutput(*(None if column is None else column.cpu() for column in said))
    policy = policy_output(model, rows.observation)
    kl = prior_kl(policy, said) if kl_direction == "policy_prior" else prior_kl(said, policy)
    known = getattr(prior, "demonstrated", None)
    places, demonstrated, explained = project(said.latent, None if known is None else known.latents.cpu())
    return Comparison(
        rows,
        policy,
        said,
        kl.numpy(),
        None if said.trust is None else said.trust.numpy(),
        places,
        demonstrated,
        explained,
    )


def play(model: FastKLPPO, env: ArrayVecEnv) -> Visited:
    """Play one episode in every env with the deterministic policy, and return all rows."""
    observation, instruction_id = env.reset()
    over, success = np.zeros((2, env.num_envs), bool)
    columns: list[tuple[np.ndarray, ...]] = []
    while not over.all():
        playing = np.flatnonzero(~over)
        steps = np.full(len(playing), len(columns))
        columns.append((observation[playing], instruction_id[playing], env.task_id[playing], steps, playing))
        step = env.step(model.predict(observation, deterministic=True)[0])
        success |= step.success & ~over
        over |= step.terminated | step.truncated
        observation, instruction_id = step.observation, step.instruction_id
    seen, ids, task_id, step_of, env_of = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return Visited(seen, seen[:, : env.state_dim], ids, task_id, step_of, success[env_of])


def check_states(count: int, tasks: int) -> None:
    """Raise UnsupportedArgument for fewer states than tasks, of which one would then be judged by nothing."""
    if count < tasks:
        raise UnsupportedArgument(f"states: {count}; sample at least one of each task, {tasks}")


def sample(rows: Visited, count: int, seed: int) -> Visited:
    """Return at most `count` rows, as many of each task as there are, in the order of task and step."""
    check_seed("seed", seed)
    rng, tasks = np.random.default_rng(seed), np.unique(rows.task_id)
    check_states(count, len(tasks))
    shares = [len(part) for part in np.array_split(np.arange(count), len(tasks))]
    chosen = [
        rng.permutation(np.flatnonzero(rows.task_id == task))[:share] for task, share in zip(tasks, shares, strict=True)
    ]
    index = np.concatenate(chosen)
    return rows.take(index[np.lexsort((rows.step[index], rows.task_id[index]))])


@torch.no_grad()
def policy_output(model: FastKLPPO, observation: np.ndarray) -> PriorOutput:
    """Return what a policy says about observations [n, O], on the CPU.

    Raises UnsupportedArgument for a distribution that is neither Gaussian nor categorical.
    """
    seen = torch.as_tensor(observation, device=model.device)
    said = model.policy.get_distribution(seen).distribution
    if isinstance(said, torch.distributions.Categorical):
        return PriorOutput(log_probs=said.logits.cpu())
    if isinstance(said, torch.distributions.Normal):
        return PriorOutput(mean=said.mean.cpu(), log_std=said.stddev.log().cpu())
    raise UnsupportedArgument(
        f"run: its policy answers with {type(said).__name__}; an audit knows Box and Discrete actions without gSDE"
    )


def project(latent: Tensor | None, others: Tensor | None) -> tuple[np.ndarray | None, np.ndarray | None, float]:
    """Return latents [n, Z] and others [K, Z] on the two directions in which both vary most, and that share.

    The directions are principal components, with signs such that the largest weight of each is positive.
    """
    if latent is None:
        return None, None, 0.0
    cloud = latent if others is None else torch.cat([latent, others])
    centre = cloud.mean(dim=0)
    _, spread, directions = torch.linalg.svd((cloud - centre).double(), full_matrices=False)
    two = directions[:2].float()
    two = two * two.gather(1, two.abs().argmax(dim=1, keepdim=True)).sign()
    places = ((cloud - centre) @ two.T).numpy()
    if places.shape[1] < 2:  # of a single row, or of one number
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    variance = spread.square()
    explained = float(variance[:2].sum() / variance.sum().clamp(min=torch.finfo(torch.float64).tiny))
    return places[: len(latent)], None if others is None else places[len(latent) :], explained


def in_words(answer: PriorOutput, names: Sequence[str], top_k: int) -> list[str]:
    """Return each row of an answer as text: its likeliest actions with probabilities, or mean and std of each one.

    Args:
        answer: [n, ...].
        names: of the actions or dimensions; empty: their numbers.
        top_k: choices of a categorical that are named.
    """
    if answer.log_probs is not None:
        names = names or [str(i) for i in range(answer.log_probs.shape[1])]
        best = answer.log_probs.exp().topk(min(top_k, len(names)), dim=1)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [", ".join(f"{names[i]} {p:.2f}" for p, i in zip(ps, numbers, strict=True)) for ps, numbers in pairs]
    assert answer.mean is not None
    assert answer.log_std is not None
    names = names or [str(i) for i in range(answer.mean.shape[1])]
    rows = zip(answer.mean.tolist(), answer.log_std.exp().tolist(), strict=True)
    return [
        ", ".join(f"{name} {m:+.2f} ± {s:.2f}" for name, m, s in zip(names, mean, std, strict=True))
        for mean, std in rows
    ]
