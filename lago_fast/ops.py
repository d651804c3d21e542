"""The door to the kernels: one function per op, with `impl=` to choose who computes it.

    impl         for
    "auto"       the fastest that runs on the tensors' device: cuda if built, else triton; on a CPU cpp; else reference
    "reference"  the definition, eager PyTorch; anywhere
    "inductor"   the definition, compiled by torch.compile; anywhere it has a compiler
    "cpp"        native code on CPU tensors
    "triton"     Triton kernels on CUDA tensors
    "cuda"       CUDA kernels on CUDA tensors, in builds with -DLAGO_CUDA=ON

An explicit name never falls back: it raises ImplUnavailable. Needs torch alone.
Test: pytest tests/test_ops.py tests/kernels
"""

import importlib
import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from lago_fast.errors import ImplUnavailable
from lago_fast.kernels.adam.reference import Block as AdamBlock
from lago_fast.kernels.adam.reference import Settings as AdamSettings
from lago_fast.kernels.gae.reference import Outputs as GaeOutputs
from lago_fast.kernels.mlp.reference import Activation
from lago_fast.kernels.mlp.reference import CategoricalActor as CategoricalActor
from lago_fast.kernels.mlp.reference import CategoricalColumns as CategoricalColumns
from lago_fast.kernels.mlp.reference import GaussianActor as GaussianActor
from lago_fast.kernels.mlp.reference import GaussianColumns as GaussianColumns
from lago_fast.kernels.mlp.reference import Layer as MLPLayer
from lago_fast.kernels.mlp.reference import Networks as MLPNetworks
from lago_fast.kernels.ppo.autograd import differentiable as loss_differentiable
from lago_fast.kernels.ppo.reference import Coefficients as PPOCoefficients
from lago_fast.kernels.ppo.reference import Grads as PPOGrads
from lago_fast.kernels.ppo.reference import Inputs as PPOInputs
from lago_fast.kernels.ppo.reference import Outputs as PPOOutputs
from lago_fast.kernels.ppo_kl_categorical.eager import Grads as CategoricalGrads
from lago_fast.kernels.ppo_kl_categorical.reference import Coefficients as CategoricalCoefficients
from lago_fast.kernels.ppo_kl_categorical.reference import Direction
from lago_fast.kernels.ppo_kl_categorical.reference import Inputs as CategoricalInputs
from lago_fast.kernels.ppo_kl_categorical.reference import Outputs as CategoricalOutputs
from lago_fast.kernels.ppo_kl_gaussian.eager import Grads as GaussianGrads
from lago_fast.kernels.ppo_kl_gaussian.reference import Coefficients as GaussianCoefficients
from lago_fast.kernels.ppo_kl_gaussian.reference import Inputs as GaussianInputs
from lago_fast.kernels.ppo_kl_gaussian.reference import Outputs as GaussianOutputs
from lago_fast.kernels.prior_kl.autograd import differentiable as kl_differentiable
from lago_fast.kernels.prior_kl.reference import CategoricalInputs as CategoricalKLInputs
from lago_fast.kernels.prior_kl.reference import GaussianInputs as GaussianKLInputs
from lago_fast.kernels.sample.reference import CategoricalInputs as CategoricalSampleInputs
from lago_fast.kernels.sample.reference import GaussianInputs as GaussianSampleInputs
from lago_fast.kernels.sample.reference import Outputs as SampleOutputs
from lago_fast.kernels.take_rows.reference import Columns

logger = logging.getLogger(__name__)

# in the order that "auto" prefers
DEVICES = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "cpp": ("cpu",),
    "reference": ("cpu", "cuda"),
    "inductor": ("cpu", "cuda"),
}
IMPL_NAMES = ("auto", *DEVICES)
# op -> impl -> module below lago_fast.kernels
IMPLEMENTATIONS = {
    "adam": {"cpp": "adam.cpp_fused", "reference": "adam.reference"},
    "gae": {
        "cuda": "gae.cuda_fused",
        "triton": "gae.triton_fused",
        "cpp": "gae.cpp_fused",
        "reference": "gae.reference",
    },
    "mlp": {"cpp": "mlp.cpp_fused", "reference": "mlp.reference"},
    "ppo": {"reference": "ppo.reference"},
    "ppo_kl_categorical": {
        "cuda": "ppo_kl_categorical.cuda_fused",
        "triton": "ppo_kl_categorical.triton_fused",
        "cpp": "ppo_kl_categorical.cpp_fused",
        "reference": "ppo_kl_categorical.eager",
        "inductor": "ppo_kl_categorical.inductor",
    },
    "ppo_kl_gaussian": {
        "cuda": "ppo_kl_gaussian.cuda_fused",
        "triton": "ppo_kl_gaussian.triton_fused",
        "cpp": "ppo_kl_gaussian.cpp_fused",
        "reference": "ppo_kl_gaussian.eager",
        "inductor": "ppo_kl_gaussian.inductor",
    },
    "prior_kl": {
        "cuda": "prior_kl.cuda_fused",
        "triton": "prior_kl.triton_fused",
        "cpp": "prior_kl.cpp_fused",
        "reference": "prior_kl.reference",
        "inductor": "prior_kl.inductor",
    },
    "sample": {
        "cuda": "sample.cuda_fused",
        "triton": "sample.triton_fused",
        "cpp": "sample.cpp_fused",
        "reference": "sample.reference",
    },
    "take_rows": {"cpp": "take_rows.cpp_fused", "reference": "take_rows.reference"},
}
# what an implementation needs beside torch -> how to get it
NEEDS = {
    "cuda": ("lago_fast._cuda", "build the package with CUDA: SKBUILD_CMAKE_DEFINE=LAGO_CUDA=ON pip install ."),
    "triton": ("triton", "pip install triton"),
}
# differentiated by PyTorch itself
BY_AUTOGRAD = ("reference", "inductor")


@cache
def resolve(op: str, device_type: str, impl: str = "auto") -> tuple[str, ModuleType]:
    """Return the name and the module of the implementation that `impl` means for an op on a device type.

    Raises:
        ImplUnavailable: the name is unknown, not written for this op, not installed, or not for this device.
    """
    table = IMPLEMENTATIONS[op]
    if impl not in IMPL_NAMES:
        raise ImplUnavailable(f"impl={impl!r} is unknown; choose one of {', '.join(IMPL_NAMES)}")
    if impl == "auto":
        impl = next(name for name in table if device_type in DEVICES[name] and _is_installed(name))
    if impl not in table:
        raise ImplUnavailable(f"impl={impl!r}: {op} has only {', '.join(table)}; choose one of these or 'auto'")
    if device_type not in DEVICES[impl]:
        raise ImplUnavailable(
            f"impl={impl!r}: {op} runs on {', '.join(DEVICES[impl])}, not on {device_type}; use 'auto'"
        )
    if not _is_installed(impl):
        module, remedy = NEEDS[impl]
        raise ImplUnavailable(f"impl={impl!r}: {op} needs {module}, which is not installed; {remedy}, or use 'auto'")
    logger.info("%s on %s: %s", op, device_type, impl)
    return impl, importlib.import_module(f"lago_fast.kernels.{table[impl]}")


def _is_installed(impl: str) -> bool:
    return impl not in NEEDS or find_spec(NEEDS[impl][0]) is not None


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
) -> GaussianOutputs:
    """Return PPO's loss with the exact KL to a prior for a diagonal Gaussian policy, differentiable.

    Args:
        inputs: shapes stand at the fields of `GaussianInputs`; float32, or bfloat16/float16 computed in float32.
        coefficients: 0-D float32 tensors on the inputs' device.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        impl: see the module's docstring.

    Returns:
        The loss, which backpropagates to mean, log_std and values, and its statistics; all 0-D, float32.

    Raises:
        ImplUnavailable: `impl` cannot run here.

    Source: kernels/README.md.
    """
    name, module = resolve("ppo_kl_gaussian", inputs.mean.device.type, impl)
    if name in BY_AUTOGRAD:
        loss = module.ppo_kl_gaussian
        return loss(inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage)
    outputs, grads = module.loss_and_grads(
        inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage
    )
    loss = loss_differentiable(outputs.loss, grads, inputs.mean, inputs.log_std, inputs.values)
    return outputs._replace(loss=loss)


def ppo_kl_gaussian_loss_and_grads(
    inputs: GaussianInputs,
    coefficients: GaussianCoefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    impl: str = "auto",
    out: tuple[GaussianOutputs, GaussianGrads] | None = None,
) -> tuple[GaussianOutputs, GaussianGrads]:
    """Return the loss of `ppo_kl_gaussian` and its gradients at once, past autograd: the trainer's entry.

    Args:
        inputs, coefficients, kl_direction, normalize_advantage, impl: as for `ppo_kl_gaussian`.
        out: what an earlier call with inputs of the same shapes and dtypes, and the same `impl`, returned; to be
            overwritten and returned, which spares a call its allocations.

    Returns:
        The loss and its statistics (0-D, detached), and the gradients with respect to mean, log_std and values,
        each of its input's dtype.

    Raises:
        ImplUnavailable: `impl` cannot run here.
        ValueError: `out` is not what an earlier call returned.
    """
    _check_out(out, GaussianOutputs, GaussianGrads)
    module = resolve("ppo_kl_gaussian", inputs.mean.device.type, impl)[1]
    return module.loss_and_grads(
        inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage, out=out
    )


def ppo_kl_categorical(
    inputs: CategoricalInputs,
    coefficients: CategoricalCoefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    impl: str = "auto",
) -> CategoricalOutputs:
    """Return PPO's loss with the exact KL to a prior for a categorical policy, differentiable.

    Args:
        inputs: shapes stand at the fields of `CategoricalInputs`; float32, or bfloat16/float16 computed in float32.
        coefficients: 0-D float32 tensors on the inputs' device.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        impl: see the module's docstring.

    Returns:
        The loss, which backpropagates to logits and values, and its statistics; all 0-D, float32.

    Raises:
        ImplUnavailable: `impl` cannot run here.

    Source: kernels/README.md.
    """
    name, module = resolve("ppo_kl_categorical", inputs.logits.device.type, impl)
    if name in BY_AUTOGRAD:
        loss = module.ppo_kl_categorical
        return loss(inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage)
    outputs, grads = module.loss_and_grads(
        inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage
    )
    return outputs._replace(loss=loss_differentiable(outputs.loss, grads, inputs.logits, inputs.values))


def ppo_kl_categorical_loss_and_grads(
    inputs: CategoricalInputs,
    coefficients: CategoricalCoefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    impl: str = "auto",
    out: tuple[CategoricalOutputs, CategoricalGrads] | None = None,
) -> tuple[CategoricalOutputs, CategoricalGrads]:
    """Return the loss of `ppo_kl_categorical` and its gradients at once, past autograd: the trainer's entry.

    Args:
        inputs, coefficients, kl_direction, normalize_advantage, impl: as for `ppo_kl_categorical`.
        out: what an earlier call with inputs of the same shapes and dtypes, and the same `impl`, returned; to be
            overwritten and returned, which spares a call its allocations.

    Returns:
        The loss and its statistics (0-D, detached), and the gradients with respect to logits and values,
        each of its input's dtype.

    Raises:
        ImplUnavailable: `impl` cannot run here.
        ValueError: `out` is not what an earlier call returned.
    """
    _check_out(out, CategoricalOutputs, CategoricalGrads)
    module = resolve("ppo_kl_categorical", inputs.logits.device.type, impl)[1]
    return module.loss_and_grads(
        inputs, coefficients, kl_direction=kl_direction, normalize_advantage=normalize_advantage, out=out
    )


def _check_out(out: object, outputs: type, grads: type) -> None:
    if out is None or (type(out) is tuple and len(out) == 2 and type(out[0]) is outputs and type(out[1]) is grads):
        return
    raise ValueError(
        f"out: expected the {outputs.__name__} and {grads.__name__} that an earlier call returned, "
        f"got {type(out).__name__}"
    )


def ppo_loss_and_grads(
    inputs: PPOInputs, coefficients: PPOCoefficients, *, normalize_advantage: bool = True, impl: str = "auto"
) -> tuple[PPOOutputs, PPOGrads]:
    """Return PPO's loss without a prior, for any distribution, and its gradients.

    Args:
        inputs: shapes stand at the fields of `PPOInputs`; float32.
        coefficients: 0-D float32 tensors on the inputs' device.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        impl: see the module's docstring.

    Returns:
        The loss and its statistics (0-D, detached), and the gradients with respect to log_prob, entropy and values.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    module = resolve("ppo", inputs.values.device.type, impl)[1]
    return module.loss_and_grads(inputs, coefficients, normalize_advantage=normalize_advantage)


def prior_kl_gaussian(
    mean: Tensor,
    log_std: Tensor,
    prior_mean: Tensor,
    prior_log_std: Tensor,
    *,
    prior_temperature: float | Tensor = 1.0,
    kl_direction: Direction = "policy_prior",
    impl: str = "auto",
) -> Tensor:
    """Return the exact KL [B] in nats between a diagonal Gaussian policy and prior; differentiable by the policy.

    Args:
        mean, prior_mean: [B, D].
        log_std, prior_log_std: [D] or [B, D].
        prior_temperature: the prior is raised to 1 / temperature and renormalised; a 0-D tensor follows a schedule.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    inputs = GaussianKLInputs(mean, log_std, prior_mean, prior_log_std)
    return _prior_kl("gaussian", inputs, (mean, log_std), prior_temperature, kl_direction, impl)


def prior_kl_categorical(
    logits: Tensor,
    prior_log_probs: Tensor,
    *,
    action_mask: Tensor | None = None,
    prior_temperature: float | Tensor = 1.0,
    kl_direction: Direction = "policy_prior",
    impl: str = "auto",
) -> Tensor:
    """Return the exact KL [B] in nats between a categorical policy and prior; differentiable by the policy.

    Args:
        logits, prior_log_probs: [B, A], need not be normalised.
        action_mask: [B, A] bool, True where an action is allowed, at least one per row; None: all are.
        prior_temperature: the prior is raised to 1 / temperature and renormalised; a 0-D tensor follows a schedule.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    inputs = CategoricalKLInputs(logits, prior_log_probs, action_mask)
    return _prior_kl("categorical", inputs, (logits,), prior_temperature, kl_direction, impl)


def _prior_kl(
    kind: str,
    inputs: CategoricalKLInputs | GaussianKLInputs,
    policy: tuple[Tensor, ...],
    prior_temperature: float | Tensor,
    direction: Direction,
    impl: str,
) -> Tensor:
    device = policy[0].device
    name, module = resolve("prior_kl", device.type, impl)
    temperature = _as_scalar(prior_temperature, device)
    if name in BY_AUTOGRAD:
        return getattr(module, kind)(inputs, temperature, direction)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in policy)
    kl, grads = getattr(module, kind)(inputs, temperature, direction=direction, needs_grad=needs_grad)
    return kl_differentiable(inputs, kl, grads) if needs_grad else kl


def sample_gaussian(
    mean: Tensor,
    log_std: Tensor,
    state: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_log_std: Tensor | None = None,
    prior_temperature: float | Tensor = 1.0,
    kl_direction: Direction = "policy_prior",
    impl: str = "auto",
) -> SampleOutputs:
    """Draw actions [B, D] of a diagonal Gaussian policy, with their log-probabilities, entropy and KL to the prior.

    Args:
        mean, prior_mean: [B, D].
        log_std, prior_log_std: [D] or [B, D].
        state: [2] int64 on the same device: seed and step. The same state gives the same actions, row by row, on
            every device; add 1 to the step, in place, between two calls.
        prior_temperature: the prior is raised to 1 / temperature and renormalised; a 0-D tensor follows a schedule.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    module = resolve("sample", mean.device.type, impl)[1]
    inputs = GaussianSampleInputs(mean, log_std, prior_mean, prior_log_std)
    return module.gaussian(inputs, _as_scalar(prior_temperature, mean.device), state, kl_direction)


def sample_categorical(
    logits: Tensor,
    state: Tensor,
    *,
    prior_log_probs: Tensor | None = None,
    action_mask: Tensor | None = None,
    prior_temperature: float | Tensor = 1.0,
    kl_direction: Direction = "policy_prior",
    impl: str = "auto",
) -> SampleOutputs:
    """Draw actions [B] of a categorical policy, with their log-probabilities, entropy and KL to the prior.

    Args:
        logits, prior_log_probs: [B, A], need not be normalised.
        state, prior_temperature, kl_direction, impl: as for `sample_gaussian`.
        action_mask: [B, A] bool, True where an action is allowed, at least one per row; None: all are.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    module = resolve("sample", logits.device.type, impl)[1]
    inputs = CategoricalSampleInputs(logits, prior_log_probs, action_mask)
    return module.categorical(inputs, _as_scalar(prior_temperature, logits.device), state, kl_direction)


def networks(networks: Sequence[Sequence[MLPLayer]], activation: Activation, *, impl: str = "auto") -> MLPNetworks:
    """Return multilayer perceptrons on the same rows, as one object with `forward` and `backward`.

    Args:
        networks: of each its layers; an activation stands between two layers, and none after the last.
        activation: "tanh" or "relu".
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    return resolve("mlp", networks[0][0].weight.device.type, impl)[1].Networks(networks, activation)


def actor(
    networks: MLPNetworks,
    columns: GaussianColumns | CategoricalColumns,
    log_std: Tensor | None = None,
    *,
    impl: str = "auto",
) -> GaussianActor | CategoricalActor:
    """Return what acts by an actor and a critic of `networks` and stores its answers where a rollout keeps them.

    Args:
        networks: of the same implementation: the mean of a diagonal Gaussian or logits, and a value.
        columns: shapes stand at the fields; observations are read there, and the rest is written.
        log_std: [D], of all states; of the Gaussian alone.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    module = resolve("mlp", columns.values.device.type, impl)[1]
    if isinstance(columns, CategoricalColumns):
        return module.CategoricalActor(networks, columns)
    return module.GaussianActor(networks, columns, log_std)


def clipped_adam(block: AdamBlock, settings: AdamSettings, max_norm: float, *, impl: str = "auto") -> None:
    """Scale the gradient of one block of parameters to a norm of at most `max_norm` and take a step of Adam, in place.

    Args:
        block: shapes stand at the fields of `AdamBlock`; float32.
        settings: learning rate, both decays, and what is added to the root of the second moment.
        max_norm: of the gradient.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.

    Source: arXiv 1412.6980.
    """
    resolve("adam", block.parameter.device.type, impl)[1].clipped_step(block, settings, max_norm)


def columns(columns: Sequence[Tensor], *, reuse: bool = False, impl: str = "auto") -> Columns:
    """Return columns [n, ...] of one length as an object whose `take(picked)` returns rows [B] int64 of each.

    Args:
        columns: what a minibatch is taken from.
        reuse: let a call overwrite what the one before it returned.
        impl: see the module's docstring.

    Raises:
        ImplUnavailable: `impl` cannot run here.
    """
    return resolve("take_rows", columns[0].device.type, impl)[1].Columns(columns, reuse=reuse)


def _as_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    # filled, not copied: the host does not wait for the device
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=device)


def coefficients_on(device: torch.device, **values: float | None) -> dict[str, Tensor | None]:
    """Return each coefficient as a 0-D float32 tensor on `device`; None stays None."""
    return {k: None if v is None else _as_scalar(v, device) for k, v in values.items()}
