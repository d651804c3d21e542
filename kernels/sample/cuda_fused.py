"""Actions with log-probability, entropy and KL to a prior by CUDA kernels; no host synchronisation, one launch.

Native side: sample.cu, in builds with -DLAGO_CUDA=ON.
Test: pytest tests/kernels/test_cuda_emulated.py tests/kernels/test_cuda.py
"""

from types import ModuleType

import torch
from torch import Tensor

from .reference import CategoricalInputs, Direction, GaussianInputs, Outputs

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


def _check(name: str, policy: Tensor, temperature: Tensor, state: Tensor, direction: Direction) -> Tensor:
    """Return the state as the kernels read it."""
    if policy.dim() != 2 or policy.shape[1] == 0:
        raise ValueError(f"{name}: expected two dimensions, the second of at least 1, got {list(policy.shape)}")
    if direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"direction: expected 'policy_prior' or 'prior_policy', got {direction!r}")
    _readable("prior_temperature", temperature, (), policy.device, torch.float32)
    return _readable("state", state, (2,), policy.device, torch.int64)


def _stream(name: str, policy: Tensor) -> int:
    if not policy.is_cuda:
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {policy.device}; choose another impl")
    return torch.cuda.current_stream(policy.device).cuda_stream


def launch_categorical(
    native: ModuleType,
    stream: int,
    inputs: CategoricalInputs,
    prior_temperature: Tensor,
    state: Tensor,
    direction: Direction,
) -> Outputs:
    """Check the arguments and have `native` draw on `stream`, on the device that `logits` lie on."""
    state = _check("logits", inputs.logits, prior_temperature, state, direction)
    device, matrix = inputs.logits.device, inputs.logits.shape
    logits = _readable("logits", inputs.logits, matrix, device, *TYPES)
    prior, mask = inputs.prior_log_probs, inputs.action_mask
    if prior is not None:
        prior = _readable("prior_log_probs", prior, matrix, device, *TYPES)
        if prior.dtype != logits.dtype:
            logits, prior = logits.float(), prior.float()
    if mask is not None:
        mask = _readable("action_mask", mask, matrix, device, torch.bool)
    actions = torch.empty(matrix[0], dtype=torch.int64, device=device)
    log_prob, entropy, kl = (torch.empty(matrix[0], dtype=torch.float32, device=device) for _ in range(3))
    outputs = Outputs(actions, log_prob, entropy, None if prior is None else kl)
    arrays = (logits, prior, mask, prior_temperature, state, *outputs)
    native.sample_categorical(
        [0 if t is None else t.data_ptr() for t in arrays],
        TYPES[logits.dtype],
        *matrix,
        direction == "prior_policy",
        (device.index or 0, stream),
    )
    return outputs


def launch_gaussian(
    native: ModuleType,
    stream: int,
    inputs: GaussianInputs,
    prior_temperature: Tensor,
    state: Tensor,
    direction: Direction,
) -> Outputs:
    """Check the arguments and have `native` draw on `stream`, on the device that `mean` lies on."""
    state = _check("mean", inputs.mean, prior_temperature, state, direction)
    device, matrix = inputs.mean.device, inputs.mean.shape
    has_prior = inputs.prior_mean is not None
    if has_prior != (inputs.prior_log_std is not None):
        raise ValueError("prior_log_std: expected with prior_mean, or neither of them")
    arrays = [
        _readable(name, t, matrix[1:] if "log_std" in name and t.dim() == 1 else matrix, device, *TYPES)
        for name, t in (inputs._asdict() if has_prior else {"mean": inputs.mean, "log_std": inputs.log_std}).items()
    ]
    if len({t.dtype for t in arrays}) > 1:
        arrays = [t.float() for t in arrays]
    log_prob, entropy, kl = (torch.empty(matrix[0], dtype=torch.float32, device=device) for _ in range(3))
    outputs = Outputs(
        torch.empty(matrix, dtype=torch.float32, device=device), log_prob, entropy, kl if has_prior else None
    )
    prior = arrays[2:] if has_prior else (None, None)
    native.sample_gaussian(
        [0 if t is None else t.data_ptr() for t in (*arrays[:2], *prior, prior_temperature, state, *outputs)],
        TYPES[arrays[0].dtype],
        *matrix,
        arrays[1].dim() == 2,
        has_prior and arrays[3].dim() == 2,
        direction == "prior_policy",
        (device.index or 0, stream),
    )
    return outputs


def categorical(inputs: CategoricalInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row by inverting the cumulative distribution at the row's uniform number.

    Args:
        inputs: shapes at the fields; float32, bfloat16 or float16, computed in float32.
        prior_temperature: 0-D float32 on the same device.
        state: [2] int64 on the same device: seed and step.
        direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    # here, not above: the tests import this file where the module is not built
    from lago_fast import _cuda

    stream = _stream("logits", inputs.logits)
    return launch_categorical(_cuda, stream, inputs, prior_temperature, state, direction)


def gaussian(inputs: GaussianInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row: mean + std * z, with z as the reference's; arguments as for `categorical`."""
    from lago_fast import _cuda

    stream = _stream("mean", inputs.mean)
    return launch_gaussian(_cuda, stream, inputs, prior_temperature, state, direction)
