"""The categorical loss and its gradients in one pass of CUDA kernels; no host synchronisation, two launches.

Native side: ppo_kl_categorical.cu, in builds with -DLAGO_CUDA=ON.
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
COLUMNS = ("values", "old_log_prob", "advantages", "returns", "old_values", "weight")


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype) -> Tensor:
    """Return an input as the kernels read it, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} as logits, got one on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
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
    """Check the arguments and have `native` compute on `stream`, on the device that `logits` lie on."""
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"kl_direction: expected 'policy_prior' or 'prior_policy', got {kl_direction!r}")
    device, matrix = inputs.logits.device, inputs.logits.shape
    if len(matrix) != 2 or matrix[1] == 0:
        raise ValueError(f"logits: expected shape [B, A] with A at least 1, got {list(matrix)}")
    logits = _readable("logits", inputs.logits, matrix, device, *TYPES)
    prior = _readable("prior_log_probs", inputs.prior_log_probs, matrix, device, *TYPES)
    if logits.dtype != prior.dtype:
        logits, prior = logits.float(), prior.float()
    mask = inputs.action_mask
    if mask is not None:
        mask = _readable("action_mask", mask, matrix, device, torch.bool)
    actions = _readable("actions", inputs.actions, matrix[:1], device, torch.int64)
    columns = [_readable(name, getattr(inputs, name), matrix[:1], device, *TYPES) for name in COLUMNS]
    kl_weight = inputs.kl_weight
    if kl_weight is not None:
        kl_weight = _readable("kl_weight", kl_weight, matrix[:1], device, *TYPES)
    _check_coefficients(coefficients, device)
    if out is None:
        statistics = torch.empty(len(Outputs._fields), dtype=torch.float32, device=device)
        outputs = Outputs(*statistics.unbind())
        returned = Grads(torch.empty(matrix, dtype=inputs.logits.dtype, device=device), torch.empty_like(columns[0]))
    else:
        outputs, returned = out
        _check_grads(returned, inputs)
        statistics = packed(outputs, device)

    # the gradient is written in the type that is read
    logits_grad = returned.logits if returned.logits.dtype == logits.dtype else torch.empty_like(logits)
    workspace = torch.empty(native.categorical_workspace(matrix[0]), dtype=torch.float32, device=device)
    native.ppo_kl_categorical(
        [0 if t is None else t.data_ptr() for t in (logits, prior, mask, actions, logits_grad)],
        TYPES[logits.dtype],
        [(0, 0) if t is None else (t.data_ptr(), TYPES[t.dtype]) for t in (*columns, kl_weight, returned.values)],
        [0 if t is None else t.data_ptr() for t in coefficients],
        statistics.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        *matrix,
        kl_direction == "prior_policy",
        normalize_advantage,
        (device.index or 0, stream),
    )
    if logits_grad is not returned.logits:
        returned.logits.copy_(logits_grad)
    return outputs, returned


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    out: tuple[Outputs, Grads] | None = None,
) -> tuple[Outputs, Grads]:
    """Return the outputs, and d loss / d (logits, values).

    Args:
        inputs: shapes at the fields of `Inputs`; float32, bfloat16 or float16, computed in float32. Where `logits`
            and `prior_log_probs` differ in type, both are converted to float32 first.
        coefficients: 0-D float32 on the same device.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        out: what an earlier call with inputs of the same shapes and dtypes returned, to be overwritten and returned.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    # here, not above: the tests import this file where the module is not built
    from lago_fast import _cuda

    if not inputs.logits.is_cuda:
        raise ValueError(f"logits: expected a CUDA tensor, got one on {inputs.logits.device}; choose another impl")
    stream = torch.cuda.current_stream(inputs.logits.device).cuda_stream
    return launch(_cuda, stream, inputs, coefficients, kl_direction, normalize_advantage, out)
