"""The door to the kernels: one function per op, with `impl=` to choose who computes it.

    impl         for
    "auto"       the fastest that runs on the tensors' device: cuda, triton, reference; on a CPU cpp, reference
    "reference"  the definition, eager PyTorch; anywhere
    "cpp"        native code on CPU tensors
    others       are listed in the table below where they exist

An explicit name never falls back: it raises ImplUnavailable. Needs torch alone.
Test: pytest tests/kernels
"""

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lago_fast.errors import ImplUnavailable
from lago_fast.kernels.gae.reference import Outputs as GaeOutputs
from lago_fast.kernels.ppo_kl_categorical.eager import Grads as CategoricalGrads
from lago_fast.kernels.ppo_kl_categorical.reference import Coefficients as CategoricalCoefficients
from lago_fast.kernels.ppo_kl_categorical.reference import Direction
from lago_fast.kernels.ppo_kl_categorical.reference import Inputs as CategoricalInputs
from lago_fast.kernels.ppo_kl_categorical.reference import Outputs as CategoricalOutputs
from lago_fast.kernels.ppo_kl_gaussian.eager import Grads as GaussianGrads
from lago_fast.kernels.ppo_kl_gaussian.reference import Coefficients as GaussianCoefficients
from lago_fast.kernels.ppo_kl_gaussian.reference import Inputs as GaussianInputs
from lago_fast.kernels.ppo_kl_gaussian.reference import Outputs as GaussianOutputs

logger = logging.getLogger(__name__)

# op -> impl -> (module below lago_fast.kernels, device types it runs on), in the order that "auto" prefers
IMPLEMENTATIONS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "gae": {
        "cpp": ("gae.cpp_fused", ("cpu",)),
        "reference": ("gae.reference", ("cpu", "cuda")),
    },
    "ppo_kl_gaussian": {
        "cpp": ("ppo_kl_gaussian.cpp_fused", ("cpu",)),
        "reference": ("ppo_kl_gaussian.eager", ("cpu", "cuda")),
    },
    "ppo_kl_categorical": {"reference": ("ppo_kl_categorical.eager", ("cpu", "cuda"))},
    "prior_kl": {"reference": ("prior_kl.reference", ("cpu", "cuda"))},
}
IMPL_NAMES = ("auto", "reference", "inductor", "cpp", "triton", "cuda")


@cache
def resolve(op: str, device_type: str, impl: str = "auto") -> tuple[str, ModuleType]:
    """Return the name and the module of the implementation that `impl` means for an op on a device type.

    Raises:
        ImplUnavailable: the name is unknown, not written for this op, or cannot run on this device.
    """
    table = IMPLEMENTATIONS[op]
    if impl not in IMPL_NAMES:
        raise ImplUnavailable(f"impl={impl!r} is unknown; choose one of {', '.join(IMPL_NAMES)}")
    if impl == "auto":
        impl = next(name for name, (_, devices) in table.items() if device_type in devices)
    if impl not in table:
        raise ImplUnavailable(f"impl={impl!r}: {op} has only {', '.join(table)}; choose one of these or 'auto'")
    module, devices = table[impl]
    if device_type not in devices:
        raise ImplUnavailable(f"impl={impl!r}: {op} runs on {', '.join(devices)}, not on {device_type}; use 'auto'")
    logger.info("%s on %s: %s", op, device_type, impl)
    return impl, importlib.import_module(f"lago_fast.kernels.{module}")


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    impl: str = "auto",
) -> GaeOutputs:
    """Return advantages and returns of a rollout by generalised advantage estimation.

    Args:
        rewards, values, next_values: [T, N] float32; `next_values` is V of what each step returned, which at an end
            must be the episode's true last observation (it is bootstrapped unless `terminated`).
        terminated, truncated, valid: [T, N] bool; an invalid row has advantage 0 and passes nothing on.
        gamma, gae_lambda: discount and lambda.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.

    Source: arXiv 1506.02438, equation 16.
    """
    module = resolve("gae", rewards.device.type, impl)[1]
    return module.gae(rewards, values, next_values, terminated, truncated, valid, gamma, gae_lambda)


def ppo_kl_gaussian(
    inputs: GaussianInputs,
    coefficients: GaussianCoefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    impl: str = "auto",
) -> tuple[GaussianOutputs, GaussianGrads]:
    """Return PPO's loss with the exact KL to a prior, and its gradients, for a diagonal Gaussian policy.

    Args:
        inputs: shapes stand at the fields of `GaussianInputs`; float32, or bfloat16/float16 computed in float32.
        coefficients: 0-D tensors on the inputs' device.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        impl: see the module's docstring.

    Returns:
        The loss and its statistics (0-D, detached), and the gradients with respect to mean, log_std and values.

    Raises:
        ImplUnavailable: `impl` cannot run here.

    Source: kernels/README.md.
    """
    module = resolve("ppo_kl_gaussian", inputs.mean.device.type, impl)[1]
    return module.loss_and_grads(
        inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage
    )


def ppo_kl_categorical(
    inputs: CategoricalInputs,
    coefficients: CategoricalCoefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    impl: str = "auto",
) -> tuple[CategoricalOutputs, CategoricalGrads]:
    """Return PPO's loss with the exact KL to a prior, and its gradients, for a categorical policy.

    Args:
        inputs: shapes stand at the fields of `CategoricalInputs`; float32, or bfloat16/float16 computed in float32.
        coefficients: 0-D tensors on the inputs' device.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        impl: see the module's docstring.

    Returns:
        The loss and its statistics (0-D, detached), and the gradients with respect to logits and values.

    Raises:
        ImplUnavailable: `impl` cannot run here.

    Source: kernels/README.md.
    """
    module = resolve("ppo_kl_categorical", inputs.logits.device.type, impl)[1]
    return module.loss_and_grads(
        inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage
    )


def prior_kl_gaussian(
    mean: Tensor,
    log_std: Tensor,
    prior_mean: Tensor,
    prior_log_std: Tensor,
    *,
    kl_direction: Direction = "policy_prior",
    impl: str = "auto",
) -> Tensor:
    """Return the exact KL [B] in nats between a diagonal Gaussian policy and prior; differentiable.

    Args:
        mean, prior_mean: [B, D].
        log_std, prior_log_std: [D] or [B, D].
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    module = resolve("prior_kl", mean.device.type, impl)[1]
    return module.gaussian(mean, log_std, prior_mean, prior_log_std, kl_direction)


def prior_kl_categorical(
    log_probs: Tensor,
    prior_log_probs: Tensor,
    *,
    kl_direction: Direction = "policy_prior",
    impl: str = "auto",
) -> Tensor:
    """Return the exact KL [B] in nats between a categorical policy and prior; differentiable.

    Args:
        log_probs, prior_log_probs: [B, A], normalised.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    module = resolve("prior_kl", log_probs.device.type, impl)[1]
    return module.categorical(log_probs, prior_log_probs, kl_direction)


def coefficients_on(device: torch.device, **values: float | None) -> dict[str, Tensor | None]:
    """Return each coefficient as a 0-D float32 tensor on `device`; None stays None."""
    return {k: None if v is None else torch.tensor(v, dtype=torch.float32, device=device) for k, v in values.items()}
