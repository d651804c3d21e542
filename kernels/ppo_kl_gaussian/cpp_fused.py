"""The Gaussian loss and its gradients in one pass of native code, on CPU tensors.

Native side: csrc/ops/ppo_kl_gaussian.cc. Test: pytest tests/kernels/test_ppo_kl_gaussian_cpp.py
"""

import torch
from torch import Tensor

from lago_fast import _C

from ..ppo.outputs import check_outputs
from .eager import Grads
from .reference import HALF_TYPES, Coefficients, Direction, Inputs, Outputs

# Of inputs, coefficients, gradients and outputs, as `_C.addresses` names them. The braces are for the two log stds.
KINDS = "E{0}RERRRRRE{1}R" + "SSSSSS" + "E{0}R" + "SSSSSSS"
KINDS_BY_STDS = {(a, b): KINDS.format("WE"[a - 1], "WE"[b - 1]) for a in (1, 2) for b in (1, 2)}


def _readable(inputs: Inputs) -> Inputs:
    """Return the inputs as native code reads them, contiguous and float32, or refuse one."""
    element = inputs.mean.shape
    converted = {}
    for name, t in inputs._asdict().items():
        if name == "kl_weight" and t is None:
            continue
        if name in ("log_std", "prior_log_std"):
            shape = element if t.dim() == 2 else element[1:]
        else:
            shape = element if name in ("mean", "actions", "prior_mean") else element[:1]
        converted[name] = _converted(name, t, shape)
    return inputs._replace(**converted)


def _converted(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor in float32, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}; choose another impl")
    if tensor.dtype is not torch.float32 and tensor.dtype not in HALF_TYPES:
        raise ValueError(f"{name}: expected float32 or a half type, got {tensor.dtype}; use impl='reference'")
    return tensor.detach().float().contiguous()


def _check_coefficients(coefficients: Coefficients) -> None:
    for name, c in zip(Coefficients._fields, coefficients, strict=True):
        if c is not None and (c.dtype is not torch.float32 or c.numel() != 1 or not c.is_cpu):
            raise ValueError(
                f"{name}: expected a 0-D float32 CPU tensor, got {c.dtype} {list(c.shape)} on {c.device}; "
                "see ops.coefficients_on"
            )


def _writable(grads: Grads, inputs: Inputs) -> Grads:
    """Return where native code writes the gradients, which is float32, or refuse what the caller gave."""
    for name, grad in zip(Grads._fields, grads, strict=True):
        like = getattr(inputs, name)
        if grad.dtype is not like.dtype or grad.shape != like.shape or not (grad.is_cpu and grad.is_contiguous()):
            raise ValueError(
                f"out[1].{name}: expected contiguous {like.dtype} {list(like.shape)} on the CPU, "
                f"got {grad.dtype} {list(grad.shape)} on {grad.device}"
            )
    if all(grad.dtype is torch.float32 for grad in grads):
        return grads
    return Grads(*(torch.empty_like(grad, dtype=torch.float32) for grad in grads))


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    out: tuple[Outputs, Grads] | None = None,
    lanes: int = 16,
) -> tuple[Outputs, Grads]:
    """Return the outputs, and d loss / d (mean, log_std, values).

    Args:
        inputs: shapes at the fields of `Inputs`; float32, or half types, which are computed in float32.
        coefficients: 0-D float32.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        out: what an earlier call with inputs of the same shapes and dtypes returned, to be overwritten and returned.
        lanes: floats at once, at most: 16 (AVX-512), 8 (AVX2) or 4, as a processor that has no more.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"kl_direction: expected 'policy_prior' or 'prior_policy', got {kl_direction!r}")
    shape = inputs.mean.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"mean: expected shape [B, D] with D at least 1, got {list(shape)}")
    rows, dims = shape
    if out is None:
        outputs = Outputs(*coefficients.clip_range.new_empty(len(Outputs._fields)).unbind())
        grads = Grads(*[torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:3]])
    else:
        outputs, grads = out
    stds = inputs.log_std.dim(), inputs.prior_log_std.dim()
    kinds = KINDS_BY_STDS.get(stds)
    options = (
        rows,
        dims,
        stds[0] == 2,
        stds[1] == 2,
        kl_direction == "prior_policy",
        normalize_advantage,
        lanes,
        torch.get_num_threads(),
    )
    written = grads
    if kinds is None or not _C.ppo_kl_gaussian((*inputs, *coefficients, *grads, *outputs), kinds, *options):
        # something is to be converted or refused, or torch is too old for that short way
        x, written = _readable(inputs), _writable(grads, inputs)
        _check_coefficients(coefficients)
        check_outputs(outputs, torch.device("cpu"))
        tensors = (*x, *coefficients, *written, *outputs)
        addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
        _C.ppo_kl_gaussian(addresses, "A" * len(tensors), *options)
    if written is not grads:
        for buffer, grad in zip(grads, written, strict=True):
            buffer.copy_(grad)
    return outputs, grads
