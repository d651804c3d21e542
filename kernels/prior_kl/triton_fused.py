"""The KL of each state and its gradients in Triton, on CUDA tensors; on CPU tensors by Triton's interpreter.

Derivation: kernels/README.md.
Test: pytest tests/kernels/test_triton_prior_kl.py tests/kernels/test_triton_aot.py
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# (a kernel's parameters have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .autograd import CategoricalGrads, GaussianGrads
from .reference import CategoricalInputs, Direction, GaussianInputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MAX_BLOCK_A = 4096  # 16 elements a thread in 8 warps, all in registers; more actions are walked in blocks
TILE_ELEMENTS = 1024  # 8 a thread in 4 warps
FULL_GPU = 256  # programs that leave no multiprocessor idle; tiles shrink below it
# the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
# Below every logit that counts, but finite: differences of maxima stay finite.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, o_col, inv_temperature, A: tl.constexpr):
    """Load [rows, columns] of the logits and of the tempered prior; -inf where an action is not allowed."""
    o = o_row[:, None] * A + o_col[None, :]
    m = (o_col < A)[None, :]
    x = tl.load(logits_ptr + o, mask=m, other=float("-inf")).to(tl.float32)
    p = tl.load(prior_ptr + o, mask=m, other=float("-inf")).to(tl.float32) * inv_temperature
    if mask_ptr is not None:
        allowed = tl.load(mask_ptr + o, mask=m, other=0) != 0
        x = tl.where(allowed, x, float("-inf"))
        p = tl.where(allowed, p, float("-inf"))
    return x, p


@triton.jit
def _add_actions(x, p, sums, PRIOR_POLICY: tl.constexpr):
    """Add columns to the sums of each row, online: the maximum moves as it must.

    Of policy and prior: max, sum e^(x - max); of the KL: the left side's sum e^(left - max) ((left - max) -
    (right - max)).
    """
    x_max, x_sum, p_max, p_sum, gap_dot = sums
    x_top = tl.maximum(x_max, tl.max(x, axis=1))
    p_top = tl.maximum(p_max, tl.max(p, axis=1))
    x_moved, p_moved = x_max - x_top, p_max - p_top
    x_scale, p_scale = tl.exp(x_moved), tl.exp(p_moved)
    x, p = x - x_top[:, None], p - p_top[:, None]
    x_exp, p_exp = tl.exp(x), tl.exp(p)
    # 0 log 0 = 0, also for what vanished when the maximum moved
    if PRIOR_POLICY:
        gap_dot = tl.where(p_scale == 0, 0.0, p_scale * (gap_dot + p_sum * (p_moved - x_moved)))
        gap_dot += tl.sum(tl.where(p_exp == 0, 0.0, p_exp * (p - x)), axis=1)
    else:
        gap_dot = tl.where(x_scale == 0, 0.0, x_scale * (gap_dot + x_sum * (x_moved - p_moved)))
        gap_dot += tl.sum(tl.where(x_exp == 0, 0.0, x_exp * (x - p)), axis=1)
    x_sum = x_sum * x_scale + tl.sum(x_exp, axis=1)
    p_sum = p_sum * p_scale + tl.sum(p_exp, axis=1)
    return x_top, x_sum, p_top, p_sum, gap_dot


@triton.jit
def _store_logits_grad(grad_ptr, x, p, sums, kl, o_row, o_col, m_row, A: tl.constexpr, PRIOR_POLICY: tl.constexpr):
    """Write d KL / d logits of [rows, columns]."""
    x_max, x_sum, p_max, p_sum, _ = sums
    x, p = x - x_max[:, None], p - p_max[:, None]
    q = tl.exp(x) * (1.0 / x_sum)[:, None]
    if PRIOR_POLICY:
        grad = q - tl.exp(p) * (1.0 / p_sum)[:, None]
    else:
        gap = x - p - (tl.log(x_sum) - tl.log(p_sum) + kl)[:, None]
        grad = tl.where(q == 0, 0.0, q * gap)
    o = o_row[:, None] * A + o_col[None, :]
    tl.store(grad_ptr + o, grad, mask=m_row[:, None] & (o_col < A)[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def categorical_kernel(
    logits_ptr,
    prior_ptr,
    mask_ptr,
    temperature_ptr,
    kl_ptr,
    grad_ptr,
    n_rows,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PRIOR_POLICY: tl.constexpr,
):
    """Write the KL of a tile of rows, and its gradient unless `grad_ptr` is None."""
    # rows past the last one repeat it
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_row = o_row < n_rows
    o_row = tl.minimum(o_row, n_rows - 1)
    o_col = tl.arange(0, BLOCK_A)
    inv_temperature = tl.div_rn(1.0, tl.load(temperature_ptr))
    none = tl.zeros([ROWS], tl.float32)
    lowest = tl.full([ROWS], LOWEST, tl.float32)
    sums = lowest, none, lowest, none, none
    if A <= BLOCK_A:
        x, p = _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, o_col, inv_temperature, A)
        sums = _add_actions(x, p, sums, PRIOR_POLICY)
    else:
        for start in range(0, A, BLOCK_A):
            x, p = _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, start + o_col, inv_temperature, A)
            sums = _add_actions(x, p, sums, PRIOR_POLICY)
    _, x_sum, _, p_sum, gap_dot = sums
    if PRIOR_POLICY:
        kl = gap_dot / p_sum - tl.log(p_sum) + tl.log(x_sum)
    else:
        kl = gap_dot / x_sum - tl.log(x_sum) + tl.log(p_sum)
    tl.store(kl_ptr + o_row, kl, mask=m_row)
    if grad_ptr is not None:
        if A <= BLOCK_A:
            _store_logits_grad(grad_ptr, x, p, sums, kl, o_row, o_col, m_row, A, PRIOR_POLICY)
        else:
            for start in range(0, A, BLOCK_A):
                x, p = _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, start + o_col, inv_temperature, A)
                _store_logits_grad(grad_ptr, x, p, sums, kl, o_row, start + o_col, m_row, A, PRIOR_POLICY)


@triton.jit
def _load_dims(ptr, o_row, o_col, PER_ROW: tl.constexpr, D: tl.constexpr):
    """Load [rows, dims], or [1, dims] of what all rows share; 0 past the last dimension."""
    o = o_col[None, :]
    if PER_ROW:
        o = o_row[:, None] * D + o
    return tl.load(ptr + o, mask=(o_col < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n_rows"])
def gaussian_kernel(
    mean_ptr,
    log_std_ptr,
    prior_mean_ptr,
    prior_log_std_ptr,
    temperature_ptr,
    kl_ptr,
    mean_grad_ptr,
    log_std_grad_ptr,
    n_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STD_PER_ROW: tl.constexpr,
    PRIOR_STD_PER_ROW: tl.constexpr,
    PRIOR_POLICY: tl.constexpr,
):
    """Write the KL of a tile of rows, and its gradients unless their pointers are None."""
    # rows past the last one repeat it
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_row = o_row < n_rows
    o_row = tl.minimum(o_row, n_rows - 1)
    o_col = tl.arange(0, BLOCK_D)
    # p^(1/tau) of a Gaussian is the Gaussian with variance tau * sigma^2
    half_log_temperature = 0.5 * tl.log(tl.load(temperature_ptr))
    log_std = _load_dims(log_std_ptr, o_row, o_col, STD_PER_ROW, D)
    prior_log_std = _load_dims(prior_log_std_ptr, o_row, o_col, PRIOR_STD_PER_ROW, D) + half_log_temperature
    distance = _load_dims(mean_ptr, o_row, o_col, True, D) - _load_dims(prior_mean_ptr, o_row, o_col, True, D)
    # KL(1 || 2) = s2 - s1 + (v1 / v2 + d^2 / v2 - 1) / 2 with s the log std and v the variance
    if PRIOR_POLICY:
        gap, inv_right = log_std - prior_log_std, tl.exp(-log_std)
    else:
        gap, inv_right = prior_log_std - log_std, tl.exp(-prior_log_std)
    variance_ratio = tl.exp(-gap)
    variance_ratio *= variance_ratio
    pull = distance * inv_right * inv_right
    excess = variance_ratio + distance * pull - 1.0
    m_col = (o_col < D)[None, :]
    tl.store(kl_ptr + o_row, tl.sum(tl.where(m_col, gap + 0.5 * excess, 0.0), axis=1), mask=m_row)
    if mean_grad_ptr is not None:
        o, m = o_row[:, None] * D + o_col[None, :], m_row[:, None] & m_col
        by_log_std = -excess if PRIOR_POLICY else variance_ratio - 1.0
        tl.store(mean_grad_ptr + o, pull, mask=m)
        tl.store(log_std_grad_ptr + o, by_log_std + tl.zeros_like(pull), mask=m)


INTERPRETED = not isinstance(categorical_kernel, triton.JITFunction)


def _tile(n_rows: int, block: int) -> tuple[int, int]:
    """Return the rows of a program's tile with `block` columns, and its warps."""
    # as many rows as fit, fewer where the whole GPU would not get a tile, at least four elements a thread
    spread = max(triton.next_power_of_2(triton.cdiv(n_rows, FULL_GPU)), TILE_ELEMENTS // 2 // block)
    rows = max(min(TILE_ELEMENTS // block, spread), 1)
    return rows, 4 if rows * block <= TILE_ELEMENTS else 8


def _check_first(name: str, tensor: Tensor, prior_temperature: Tensor) -> None:
    """Refuse a policy that is not a matrix on a device for Triton, and a temperature that is not beside it."""
    device, c = tensor.device, prior_temperature
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name}: expected two dimensions, the second at least 1, got {list(tensor.shape)}")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {device}; choose another impl")
    if c.dtype is not torch.float32 or c.numel() != 1 or c.device != device:
        raise ValueError(
            f"prior_temperature: expected a 0-D float32 tensor on {device}, got {c.dtype} {list(c.shape)} on {c.device}"
        )


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtypes: tuple) -> Tensor:
    """Return an input as the kernels read it, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as the policy is, got one on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    return tensor.detach().contiguous()


def _is_prior_policy(direction: Direction) -> bool:
    if direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"direction: expected 'policy_prior' or 'prior_policy', got {direction!r}")
    return direction == "prior_policy"


def categorical(
    inputs: CategoricalInputs, prior_temperature: Tensor, *, direction: Direction, needs_grad: bool
) -> tuple[Tensor, CategoricalGrads | None]:
    """Return KL [B] in nats, float32, and where asked for each row's gradient, of the logits' dtype.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    _check_first("logits", inputs.logits, prior_temperature)
    prior_policy = _is_prior_policy(direction)
    shape, device = inputs.logits.shape, inputs.logits.device
    logits = _readable("logits", inputs.logits, shape, device, FLOATS)
    prior = _readable("prior_log_probs", inputs.prior_log_probs, shape, device, FLOATS)
    mask = inputs.action_mask
    if mask is not None:
        mask = _readable("action_mask", mask, shape, device, (torch.bool,))
    n_rows, n_actions = shape
    kl = torch.empty(n_rows, dtype=torch.float32, device=device)
    grads = CategoricalGrads(torch.empty_like(logits)) if needs_grad else None
    if n_rows > 0:
        block_a = min(triton.next_power_of_2(n_actions), MAX_BLOCK_A)
        rows, warps = _tile(n_rows, block_a)
        grad = None if grads is None else grads.logits
        sizes = n_rows, n_actions, rows, block_a
        with torch.cuda.device_of(logits):
            categorical_kernel[(triton.cdiv(n_rows, rows),)](
                logits, prior, mask, prior_temperature, kl, grad, *sizes, prior_policy, num_warps=warps, **OPTIONS
            )
    return kl, grads


def gaussian(
    inputs: GaussianInputs, prior_temperature: Tensor, *, direction: Direction, needs_grad: bool
) -> tuple[Tensor, GaussianGrads | None]:
    """Return KL [B] in nats, float32, and where asked for each row's gradients [B, D], of their inputs' dtypes.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    _check_first("mean", inputs.mean, prior_temperature)
    prior_policy = _is_prior_policy(direction)
    shape, device = inputs.mean.shape, inputs.mean.device
    x = []
    for name, tensor in inputs._asdict().items():
        is_shared = name in ("log_std", "prior_log_std") and tensor.dim() == 1
        x.append(_readable(name, tensor, shape[1:] if is_shared else shape, device, FLOATS))
    n_rows, n_dims = shape
    kl = torch.empty(n_rows, dtype=torch.float32, device=device)
    grads = None
    if needs_grad:
        grads = GaussianGrads(torch.empty_like(x[0]), torch.empty(shape, dtype=x[1].dtype, device=device))
    if n_rows > 0:
        block_d = triton.next_power_of_2(n_dims)
        rows, warps = _tile(n_rows, block_d)
        sizes = n_rows, n_dims, rows, block_d
        switches = x[1].dim() == 2, x[3].dim() == 2, prior_policy
        with torch.cuda.device_of(x[0]):
            gaussian_kernel[(triton.cdiv(n_rows, rows),)](
                *x, prior_temperature, kl, *(grads or (None, None)), *sizes, *switches, num_warps=warps, **OPTIONS
            )
    return kl, grads
