"""Policy-based learning of text games with a language prior: PPO's variational form, and how any learner is scored.

`make_text_ppo` maximises E[sum_t gamma^t (r_t - alpha KL(policy || prior))] with kl_placement="both" and kl_coef alpha;
"loss" and "reward" are the two terms of its gradient, each by itself.
Source: arXiv 2410.07927 (its policy-based variant). Test: pytest tests/test_text_training.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.algorithms.text_policy import TextActionPolicy
from lago_fast.envs.sb3_adapter import SB3VecEnv
from lago_fast.envs.text_env import TextState, TextVecEnv
from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.text_base import TextActionPrior, TextEncoder
from lago_fast.text_lane import NumberedPrior, NumberedTexts, TextLane

PRIOR_FLOOR = 0.01
EVALUATION_SEED = 1_000_000  # by which nothing else in the package is seeded unasked


def make_text_ppo(
    env: TextVecEnv,
    prior: TextActionPrior | None,
    encoder: TextEncoder,
    *,
    max_actions: int | None = None,
    prior_floor: float = PRIOR_FLOOR,
    net_arch: Sequence[int] = (64, 64),
    activation: str = "relu",
    **arguments: Any,
) -> FastKLPPO:
    """Return `FastKLPPO` with a policy over the texts of a game's actions.

    Args:
        env: text games stepped together.
        prior: frozen, asked once about each collected step; None: plain PPO, and nothing else changes.
        encoder: frozen, of the texts.
        max_actions: A, the most admissible actions of a state; None: the env's own.
        prior_floor: weight of the uniform distribution that is mixed into the prior (`text_lane.NumberedPrior`).
        net_arch, activation: of the policy (`algorithms.text_policy`).
        arguments: of `FastKLPPO`, such as n_steps, kl_coef and kl_placement.

    Raises:
        UnsupportedArgument: a value that cannot be honoured, or an env that does not know A.
        TrainablePrior: the prior has a parameter that requires a gradient.
    """
    lane, numbered = _lane_and_prior(env, prior, encoder, max_actions, prior_floor)
    kwargs = {"width": encoder.width, "net_arch": tuple(net_arch), "activation": activation}
    return FastKLPPO(
        TextActionPolicy, lane, policy_kwargs={**kwargs, **arguments.pop("policy_kwargs", {})}, prior=numbered,
        **arguments,
    )  # fmt: skip


def load_text_ppo(
    path: str | Path,
    encoder: TextEncoder,
    *,
    prior: TextActionPrior | None = None,
    env: TextVecEnv | None = None,
    max_actions: int | None = None,
    prior_floor: float = PRIOR_FLOOR,
    **arguments: Any,
) -> FastKLPPO:
    """Return a model that was saved, to predict or, with an env, to go on learning; no code from the file is run.

    Args:
        path: of the file that `save` wrote.
        encoder, prior, max_actions, prior_floor: the ones that it was trained with; a prior needs an env.
        env: to go on learning.
        arguments: of `FastKLPPO.load`.

    Raises:
        EncoderMismatch, PriorMismatch: another encoder, prior or floor.
        UnsupportedArgument: a prior without an env.
    """
    if env is None:
        if prior is not None:
            raise UnsupportedArgument("prior: it is needed to go on learning only; pass an env too, or leave it out")
        model = FastKLPPO.load(path, **arguments)
    else:
        lane, numbered = _lane_and_prior(env, prior, encoder, max_actions, prior_floor)
        model = FastKLPPO.load(path, lane, prior=numbered, **arguments)
    if not isinstance(model.policy, TextActionPolicy):
        raise UnsupportedArgument(f"path: {path} holds a {type(model.policy).__name__}, no policy over texts")
    model.policy.attach(encoder)
    return model


def _lane_and_prior(
    env: TextVecEnv, prior: TextActionPrior | None, encoder: TextEncoder, max_actions: int | None, floor: float
) -> tuple[SB3VecEnv, NumberedPrior | None]:
    width = env.max_actions if max_actions is None else max_actions
    if width is None:
        raise UnsupportedArgument(
            "max_actions: this game does not say how many actions a state can have; give a number that is enough"
        )
    texts = NumberedTexts(encoder, width)
    return SB3VecEnv(TextLane(env, texts)), None if prior is None else NumberedPrior(prior, texts, floor)


class Chooses(Protocol):
    """`FastKLPPO` over texts, `DQNPrior`, `CQLPrior` and `PosteriorSampler` are such."""

    def predict(self, observation: TextState, deterministic: bool = False) -> tuple[np.ndarray, Any]: ...


class TextScores(NamedTuple):
    """Whole episodes, one entry each."""

    success: np.ndarray  # [E] bool, at any step
    total_reward: np.ndarray  # [E]
    length: np.ndarray  # [E] int64, env steps


def evaluate_text(
    model: Chooses, env: TextVecEnv, episodes: int = 100, seed: int = EVALUATION_SEED, deterministic: bool = True
) -> TextScores:
    """Play episodes of a text game and return what came of them.

    Each environment plays the same number of episodes, so that short ones are not counted more often than long ones.

    Args:
        model: chooses.
        env: reset here.
        episodes: at least so many are played, a multiple of the number of environments.
        seed: of the episodes; keep it apart from the seeds of training, as the default is from the games' own.
        deterministic: whether the model chooses its best action.

    Raises:
        UnsupportedArgument: episodes is below 1.
    """
    if episodes < 1:
        raise UnsupportedArgument(f"episodes={episodes}: give at least 1")
    n = env.num_envs
    quota = -(-episodes // n)
    played = np.zeros(n, np.int64)
    total, length, success = np.zeros(n), np.zeros(n, np.int64), np.zeros(n, bool)
    found: list[tuple[bool, float, int]] = []
    state = env.reset(seed)
    while (played < quota).any():
        step = env.step(np.asarray(model.predict(state, deterministic=deterministic)[0]))
        state = step.state
        total += step.reward
        length += step.valid
        success |= step.success & step.valid
        for row in np.flatnonzero(step.terminated | step.truncated):
            if played[row] < quota:
                found.append((bool(success[row]), float(total[row]), int(length[row])))
            played[row] += 1
            total[row], length[row], success[row] = 0, 0, False
    return TextScores(*(np.array(column) for column in zip(*found, strict=True)))
