"""The KL of each row and, where wanted, its gradients by CUDA kernels; no host synchronisation, one launch.

Native side: prior_kl.cu, in builds with -DLAGO_CUDA=ON.
Test: pytest tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py
"""

from types import ModuleType

import torch
from torch import Tensor

from .autograd import CategoricalGrads, GaussianGrads
from .reference import CategoricalInputs, Direction, GaussianInputs

# the numbers of csrc/cuda/types.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> Tensor:
    """Return an input as the kernels read it, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as the policy, got one on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    return tensor.detach().contiguous()


def _check(name: str, policy: Tensor, temperature: Tensor, direction: Direction) -> None:
    if policy.dim() != 2 or policy.shape[1] == 0:
        raise ValueError(f"{name}: expected two dimensions, the second of at least 1, got {list(policy.shape)}")
    if direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"direction: expected 'policy_prior' or 'prior_policy', got {direction!r}")
    _readable("prior_temperature", temperature, (), policy.device, torch.float32)


def _stream(name: str, policy: Tensor) -> int:
    if not policy.is_cuda:
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {policy.device}; choose another impl")
    return torch.cuda.current_stream(policy.device).cuda_stream


def launch_categorical(
    native: ModuleType,
    stream: int,
    inputs: CategoricalInputs,
    prior_temperature: Tensor,
    direction: Direction,
    needs_grad: bool,
) -> tuple[Tensor, CategoricalGrads | None]:
    """Check the arguments and have `native` compute on `stream`, on the device that `logits` lie on."""
    _check("logits", inputs.logits, prior_temperature, direction)
    device, matrix = inputs.logits.device, inputs.logits.shape
    logits = _readable("logits", inputs.logits, matrix, device, *TYPES)
    prior = _readable("prior_log_probs", inputs.prior_log_probs, matrix, device, *TYPES)
    if logits.dtype != prior.dtype:
        logits, prior = logits.float(), prior.float()
    mask = inputs.action_mask
    if mask is not None:
        mask = _readable("action_mask", mask, matrix, device, torch.bool)
    kl = torch.empty(matrix[0], dtype=torch.float32, device=device)
    grad = torch.empty_like(logits) if needs_grad else None
    native.prior_kl_categorical(
        [0 if t is None else t.data_ptr() for t in (logits, prior, mask, prior_temperature, kl, grad)],
        TYPES[logits.dtype],
        *matrix,
        direction == "prior_policy",
        (device.index or 0, stream),
    )
    return kl, None if grad is None else CategoricalGrads(grad.to(inputs.logits.dtype))


def launch_gaussian(
    native: ModuleType,
    stream: int,
    inputs: GaussianInputs,
    prior_temperature: Tensor,
    direction: Direction,
    needs_grad: bool,
) -> tuple[Tensor, GaussianGrads | None]:
    """Check the arguments and have `native` compute on `stream`, on the device that `mean` lies on."""
    _check("mean", inputs.mean, prior_temperature, direction)
    device, matrix = inputs.mean.device, inputs.mean.shape
    arrays = [
        _readable(name, t, matrix[1:] if "log_std" in name and t.dim() == 1 else matrix, device, *TYPES)
        for name, t in inputs._asdict().items()
    ]
    if len({t.dtype for t in arrays}) > 1:
        arrays = [t.float() for t in arrays]
    kl = torch.empty(matrix[0], dtype=torch.float32, device=device)
    grads = [torch.empty_like(arrays[0]) if needs_grad else None for _ in range(2)]
    native.prior_kl_gaussian(
        [0 if t is None else t.data_ptr() for t in (*arrays, prior_temperature, kl, *grads)],
        TYPES[arrays[0].dtype],
        *matrix,
        inputs.log_std.dim() == 2,
        inputs.prior_log_std.dim() == 2,
        direction == "prior_policy",
        (device.index or 0, stream),
    )
    mean_grad, log_std_grad = grads
    if mean_grad is None or log_std_grad is None:
        return kl, None
    return kl, GaussianGrads(mean_grad.to(inputs.mean.dtype), log_std_grad.to(inputs.log_std.dtype))


def categorical(
    inputs: CategoricalInputs, prior_temperature: Tensor, *, direction: Direction, needs_grad: bool
) -> tuple[Tensor, CategoricalGrads | None]:
    """Return the KL [B] in nats, float32, and the gradients of each row's own where they are wanted.

    Args:
        inputs: shapes at the fields; float32, bfloat16 or float16, computed in float32.
        prior_temperature: 0-D float32 on the same device.
        direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        needs_grad: whether gradients are wanted.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    # here, not above: the tests import this file where the module is not built
    from lago_fast import _cuda

    stream = _stream("logits", inputs.logits)
    return launch_categorical(_cuda, stream, inputs, prior_temperature, direction, needs_grad)


def gaussian(
    inputs: GaussianInputs, prior_temperature: Tensor, *, direction: Direction, needs_grad: bool
) -> tuple[Tensor, GaussianGrads | None]:
    """Return the KL [B] in nats, float32, and the gradients of each row's own; arguments as for `categorical`."""
    from lago_fast import _cuda

    stream = _stream("mean", inputs.mean)
    return launch_gaussian(_cuda, stream, inputs, prior_temperature, direction, needs_grad)
