"""What FastKLPPO's own arguments may be, before anything is built.

Test: pytest tests/algorithms/test_fast_kl_ppo.py -k refused
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import get_device

from lago_fast.algorithms.guard import settings_of
from lago_fast.algorithms.overlapping import check_overlap
from lago_fast.errors import DeviceUnavailable, UnsupportedArgument


def check_values(
    *,
    kl_direction: str,
    kl_placement: str,
    prior_temperature: float,
    overlap: str,
    cuda_graph: bool,
    target_kl: float | None,
    device: torch.device | str,
    n_epochs: int,
    batch_size: int,
    ent_coef: float,
) -> None:
    """Raise UnsupportedArgument, or DeviceUnavailable, for a value that has no meaning or cannot be had here."""
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise UnsupportedArgument(f"kl_direction={kl_direction!r}: choose 'policy_prior' or 'prior_policy'")
    if kl_placement not in ("loss", "reward", "both"):
        raise UnsupportedArgument(f"kl_placement={kl_placement!r}: choose 'loss', 'reward' or 'both'")
    if not 0 < prior_temperature < math.inf:
        raise UnsupportedArgument(f"prior_temperature={prior_temperature}: give a number above 0")
    for name, count in (("n_epochs", n_epochs), ("batch_size", batch_size)):
        if not isinstance(count, int | np.integer) or count < 1:
            raise UnsupportedArgument(f"{name}={count!r}: give a whole number from 1 on")
    if not isinstance(ent_coef, int | float | np.number):
        raise UnsupportedArgument(f"ent_coef={ent_coef!r}: PPO has a fixed one; give a number")
    check_overlap(overlap)
    if torch.device("cpu" if device == "auto" else device).type == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable(f"device={device!r}: this machine has no CUDA device; use device='cpu' or 'auto'")
    if cuda_graph:
        check_graph(device, overlap, target_kl)


def check_loaded(model: Any, given: Mapping[str, Any]) -> None:
    """Raise UnsupportedArgument, or DeviceUnavailable, for what `load` was given in place of a model's own values.

    Args:
        model: that was made from the file and from what was given.
        given: names and values; `cuda_graph` of the file itself is passed over where there is no CUDA.
    """
    check_values(
        kl_direction=model.kl_direction,
        kl_placement=model.kl_placement,
        prior_temperature=model.prior_temperature,
        overlap=model.overlap,
        cuda_graph=bool(given.get("cuda_graph")),
        target_kl=model.target_kl,
        n_epochs=model.n_epochs,
        batch_size=model.batch_size,
        ent_coef=model.ent_coef,
        device=model.device,
    )
    check_guidance(
        has_prior=True,  # it may come later
        warm_start=model.warm_start,
        guarded=settings_of(model.guard) is not None,
        kl_placement=model.kl_placement,
        kl_coef=model.kl_coef,
    )


def check_graph(device: torch.device | str, overlap: str, target_kl: float | None = None) -> None:
    """Raise UnsupportedArgument where no gradient step can be captured in a CUDA graph."""
    if get_device(device).type != "cuda":
        raise UnsupportedArgument("cuda_graph: there are none without a CUDA device; pass cuda_graph=False")
    if target_kl is not None:
        raise UnsupportedArgument(
            "target_kl, cuda_graph: an early stop asks the host after every minibatch; pass cuda_graph=False"
        )
    if overlap != "none":
        raise UnsupportedArgument(
            "overlap, cuda_graph: a capture tolerates no other thread's work on the device; pass one of them"
        )


def check_guidance(*, has_prior: bool, warm_start: bool, guarded: bool, kl_placement: str, kl_coef: Any) -> None:
    """Raise UnsupportedArgument where a guard or a warm start has nothing to work on."""
    if warm_start and not has_prior:
        raise UnsupportedArgument("warm_start: there is nothing to start from without a prior; pass prior=")
    if guarded and (kl_placement != "loss" or kl_coef == "auto"):
        raise UnsupportedArgument(
            "guard: it weighs the KL in the loss by itself; use kl_placement='loss' and a kl_coef"
        )
    if guarded and not has_prior:
        raise UnsupportedArgument("guard: there is nothing to guard without a prior; pass prior=")
