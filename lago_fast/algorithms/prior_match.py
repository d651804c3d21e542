"""Does a prior fit a model and its env? Checked once, before anything is trained.

Test: pytest tests/algorithms/test_fast_kl_ppo.py
"""

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor

from lago_fast.algorithms.heads import CategoricalHead, GaussianHead
from lago_fast.algorithms.lanes import array_lane_of
from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import ActionPrior, check_frozen, match_instructions


def check_prior(prior: ActionPrior, head: GaussianHead | CategoricalHead, digest: str | None) -> None:
    """Raise when a prior is trainable, answers for another action space, or is not the one of `digest`.

    Args:
        prior: the candidate.
        head: of the model.
        digest: of the prior that the model was trained with, None where there was none.

    Raises:
        TrainablePrior, PriorMismatch: see above.
    """
    check_frozen(prior)
    if digest not in (None, prior.digest):
        raise PriorMismatch(
            f"prior: this model was trained with prior {digest} and got {prior.digest}; pass the same one"
        )
    if prior.kind != head.kind or prior.action_dim != head.action_dim:
        raise PriorMismatch(
            f"prior: fitted for a {prior.kind} policy with {prior.action_dim} actions or dimensions, the env needs "
            f"{head.kind} with {head.action_dim}; fit it on demonstrations of this env"
        )


def match_env(prior: ActionPrior, env: VecEnv) -> Tensor:
    """Return the prior's id of each of the env's instructions, int64 [M], after checking the states.

    Raises:
        PriorMismatch: states of another width, or an instruction that the prior does not know.
        UnsupportedArgument: observations are normalised before the prior can see them.
    """
    if isinstance(env, VecNormalize) and env.norm_obs:
        raise UnsupportedArgument("env: a prior needs raw states; use VecNormalize(norm_obs=False)")
    about = array_lane_of(env) or env
    state_dim = getattr(about, "state_dim", int(np.prod(env.observation_space.shape or (1,))))
    if prior.state_dim != state_dim:
        raise PriorMismatch(
            f"prior: fitted for states of {prior.state_dim} numbers, the env has {state_dim}; "
            "fit it on demonstrations of this env"
        )
    instructions = getattr(about, "instructions", None)
    if instructions is not None:
        return match_instructions(prior, instructions)
    if len(prior.instructions) != 1:
        raise PriorMismatch(
            "prior: the env names no instructions, so the prior must have exactly one; "
            f"it has {len(prior.instructions)}. Give the env an attribute `instructions` and ids in its infos."
        )
    return torch.zeros(1, dtype=torch.int64)
