"""Does a prior fit a model and its env? Checked once, before anything is trained.

Test: pytest tests/algorithms/test_fast_kl_ppo.py tests/algorithms/test_prior_match.py
"""

import math
from os import PathLike
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from lago_fast.algorithms.heads import CategoricalHead, GaussianHead
from lago_fast.algorithms.lanes import array_lane_of
from lago_fast.errors import PriorMismatch, QuantizedTooFar, UnsupportedArgument
from lago_fast.priors.base import ActionPrior, check_frozen, match_instructions


def check_prior(prior: ActionPrior, head: GaussianHead | CategoricalHead, digest: str | None) -> None:
    """Raise when a prior is trainable, quantized too far, of another action space, or not the one of `digest`.

    Args:
        prior: the candidate.
        head: of the model.
        digest: of the prior that the model was trained with, None where there was none.

    Raises:
        UnsupportedArgument: it is no prior.
        TrainablePrior, QuantizedTooFar, PriorMismatch: see above.
    """
    check_contract(prior)
    check_frozen(prior)
    check_quantization(prior)
    if digest not in (None, prior.digest):
        raise PriorMismatch(
            f"prior: this model was trained with prior {digest} and got {prior.digest}; pass the same one"
        )
    if prior.kind != head.kind or prior.action_dim != head.action_dim:
        raise PriorMismatch(
            f"prior: fitted for a {prior.kind} policy with {prior.action_dim} actions or dimensions, the env needs "
            f"{head.kind} with {head.action_dim}; fit it on demonstrations of this env"
        )


def check_contract(prior: ActionPrior) -> None:
    """Raise UnsupportedArgument when something has not all that `lago_fast.priors.base.ActionPrior` asks for."""
    if isinstance(prior, str | PathLike):
        raise UnsupportedArgument(
            f"prior: a path; load what is there, with LatentActionPrior.load({str(prior)!r}), say"
        )
    members = sorted(name for name in vars(ActionPrior) if not name.startswith("_"))
    lacking = [name for name in members if not hasattr(prior, name)]
    if lacking:
        raise UnsupportedArgument(
            f"prior: {type(prior).__name__} has no {', '.join(lacking)}; lago_fast.priors.base.ActionPrior says what a "
            "prior has"
        )


def check_quantization(prior: ActionPrior) -> None:
    """Raise QuantizedTooFar when a prior, or one behind it, is further from the exact one than its own bound.

    The bound is the prior's `max_quantization_kl`, in nats on average over held-out states; an infinite one is met
    without a measurement.
    """
    asked: Any = prior
    while asked is not None:
        if getattr(asked, "quantization", "none") != "none":
            kl, bound = asked.quantization_kl_nats, asked.max_quantization_kl
            if not kl <= bound and bound != math.inf:
                measured = "was never measured" if math.isnan(kl) else f"is {kl:.3f} nats on held-out states"
                raise QuantizedTooFar(
                    f"prior: quantized to {asked.quantization}, its KL from the exact prior {measured}, and at most "
                    f"{bound:g} are allowed; take the exact prior or another quantization, calibrate its head "
                    "(quantize_prior with calibration_states), or raise its max_quantization_kl "
                    "(--max-quantization-kl)"
                )
        # a student has its `exact` prior behind it, a cache its `inner` one
        asked = getattr(asked, "exact", None) or getattr(asked, "inner", None)


def match_env(prior: ActionPrior, env: VecEnv) -> Tensor:
    """Return the prior's id of each of the env's instructions, int64 [M], after checking the states.

    Raises:
        PriorMismatch: states of another width, or an instruction that the prior does not know.
        UnsupportedArgument: observations are normalised before the prior can see them.
    """
    normalize = unwrap_vec_normalize(env)
    if normalize is not None and normalize.norm_obs:
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
            f"it has {len(prior.instructions)}. Give the env an attribute `instructions` and its infos an "
            "`instruction_id`."
        )
    return torch.zeros(1, dtype=torch.int64)
