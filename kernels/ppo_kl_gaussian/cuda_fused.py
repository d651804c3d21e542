"""The Gaussian loss and its gradients in one pass of CUDA kernels; no host synchronisation, two launches.

Native side: ppo_kl_gaussian.cu, in builds with -DLAGO_CUDA=ON.
Test: pytest tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py
"""

from types import ModuleType

import torch
from torch import Tensor

from ..ppo.outputs import packed
from .eager import Grads
from .reference import Coefficients, Direction, Inputs, Outputs

# the numbers of csrc/cuda/types.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MATRICES = ("mean", "log_std", "actions", "prior_mean", "prior_log_std")
COLUMNS = ("values", "old_log_prob", "advantages", "returns", "old_values", "weight")


def _readable(inputs: Inputs, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return an input as the kernels read it, contiguous, or refuse it."""
    tensor, device = getattr(inputs, name), inputs.mean.device
    if name in ("log_std", "prior_log_std") and tensor.dim() == 1:
        shape = shape[1:]
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as mean, got one on {tensor.device}")
    if tensor.dtype not in TYPES:
        raise ValueError(f"{name}: expected float32 or a half type, got {tensor.dtype}; use impl='reference'")
    return tensor.detach().contiguous()


def _check_coefficients(coefficients: Coefficients, device: torch.device) -> None:
    for name, tensor in coefficients._asdict().items():
        if tensor is None:
            continue
        if tensor.dtype is not torch.float32 or tensor.numel() != 1 or tensor.device != device:
            raise ValueError(
                f"{name}: expected a 0-D float32 tensor on {device}, got {tensor.dtype} {list(tensor.shape)} "
                f"on {tensor.device}; see ops.coefficients_on"
            )


def _check_grads(grads: Grads, inputs: Inputs) -> None:
    for name, grad in grads._asdict().items():
        like = getattr(inputs, name)
        fits = grad.shape == like.shape and grad.dtype is like.dtype and grad.device == like.device
        if not fits or not grad.is_contiguous():
            raise ValueError(
                f"out[1].{name}: expected contiguous {like.dtype} {list(like.shape)} on {like.device}, "
                f"got {grad.dtype} {list(grad.shape)} on {grad.device}"
            )


def launch(
    native: ModuleType,
    stream: int,
    inputs: Inputs,
    coefficients: Coefficients,
    kl_direction: Direction,
    normalize_advantage: bool,
    out: tuple[Outputs, Grads] | None,
) -> tuple[Outputs, Grads]:
    """Check the arguments and have `native` compute on `stream`, on the device that `mean` lies on."""
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"kl_direction: expected 'policy_prior' or 'prior_policy', got {kl_direction!r}")
    device, matrix = inputs.mean.device, inputs.mean.shape
    if len(matrix) != 2 or not 1 <= matrix[1] <= native.MAX_DIMS:
        raise ValueError(f"mean: expected shape [B, D] with D in 1..{native.MAX_DIMS}, got {list(matrix)}")
    matrices = [_readable(inputs, name, matrix) for name in MATRICES]
    if len({t.dtype for t in matrices}) > 1:
        matrices = [t.float() for t in matrices]
    columns = [_readable(inputs, name, matrix[:1]) for name in COLUMNS]
    kl_weight = None if inputs.kl_weight is None else _readable(inputs, "kl_weight", matrix[:1])
    _check_coefficients(coefficients, device)
    policy = (inputs.mean, inputs.log_std, inputs.values)
    if out is None:
        statistics = torch.empty(len(Outputs._fields), dtype=torch.float32, device=device)
        outputs = Outputs(*statistics.unbind())
        returned = Grads(*(torch.empty(t.shape, dtype=t.dtype, device=device) for t in policy))
    else:
        outputs, returned = out
        _check_grads(returned, inputs)
        statistics = packed(outputs, device)

    # gradients are written in the type that is read
    dtype = matrices[0].dtype
    grads = [g if g.dtype == dtype else torch.empty(g.shape, dtype=dtype, device=device) for g in returned[:2]]
    per_row = inputs.log_std.dim() == 2
    workspace = torch.empty(native.gaussian_workspace(*matrix, per_row), dtype=torch.float32, device=device)
    native.ppo_kl_gaussian(
        [t.data_ptr() for t in (*matrices, *grads)],
        TYPES[dtype],
        [(0, 0) if t is None else (t.data_ptr(), TYPES[t.dtype]) for t in (*columns, kl_weight, returned.values)],
        [0 if t is None else t.data_ptr() for t in coefficients],
        statistics.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        *matrix,
        per_row,
        inputs.prior_log_std.dim() == 2,
        kl_direction == "prior_policy",
        normalize_advantage,
        (device.index or 0, stream),
    )
    for buffer, grad in zip(returned, grads, strict=False):
        if grad is not buffer:
            buffer.copy_(grad)
    return outputs, returned


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    out: tuple[Outputs, Grads] | None = None,
) -> tuple[Outputs, Grads]:
    """Return the outputs, and d loss / d (mean, log_std, values).

    Args:
        inputs: shapes at the fields of `Inputs`; float32, bfloat16 or float16, computed in float32. Where means, log
            stds and actions differ in type, all of them are converted to float32 first.
        coefficients: 0-D float32 on the same device.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        out: what an earlier call with inputs of the same shapes and dtypes returned, to be overwritten and returned.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape, or of more dimensions than the kernels hold.
    """
    # here, not above: the tests import this file where the module is not built
    from lago_fast import _cuda

    if not inputs.mean.is_cuda:
        raise ValueError(f"mean: expected a CUDA tensor, got one on {inputs.mean.device}; choose another impl")
    stream = torch.cuda.current_stream(inputs.mean.device).cuda_stream
    return launch(_cuda, stream, inputs, coefficients, kl_direction, normalize_advantage, out)
