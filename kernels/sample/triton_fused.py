"""Actions with log-probability, entropy and KL to a prior in Triton; on CPU tensors by Triton's interpreter.

The generator is the reference's, word for word; the rows are computed as in the losses.
Test: pytest tests/kernels/test_triton_gae_sample.py tests/kernels/test_triton_aot.py
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# (a kernel's parameters have no Python types)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import CategoricalInputs, Direction, GaussianInputs, Outputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MAX_BLOCK_A = 2048  # columns held at once, 8 elements a thread in 8 warps
TILE_ELEMENTS = 1024  # 8 a thread in 4 warps
FULL_GPU = 256  # programs that leave no multiprocessor idle; tiles shrink below it
# the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
# Below every logit that counts, but finite: differences of maxima stay finite.
LOWEST = tl.constexpr(-1e30)
HALF_LOG_2PI = tl.constexpr(0.5 * math.log(2 * math.pi))
TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def _philox(row, block, state_ptr):
    """Return four random 32-bit words for each counter (row, block, step low, step high)."""
    seed, step = tl.load(state_ptr), tl.load(state_ptr + 1)
    c0, c1 = row.to(tl.uint32), block.to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + step.to(tl.uint32), tl.zeros_like(c0) + (step >> 32).to(tl.uint32)
    k0, k1 = tl.zeros_like(c0) + seed.to(tl.uint32), tl.zeros_like(c0) + (seed >> 32).to(tl.uint32)
    factor0, factor1 = tl.full(c0.shape, 0xD2511F53, tl.uint32), tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    step0, step1 = tl.full(c0.shape, 0x9E3779B9, tl.uint32), tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(factor0, c0), tl.umulhi(factor1, c2)
        c1, c3 = high1 ^ c1 ^ k0, high0 ^ c3 ^ k1
        c0, c2, c1, c3 = c1, c3, factor1 * c2, factor0 * c0
        k0, k1 = k0 + step0, k1 + step1
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """Return the words as numbers in (0, 1), exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, o_col, inv_temperature, A: tl.constexpr):
    """Load [rows, columns] of the logits and of the tempered prior, which is the policy where there is none."""
    o = o_row[:, None] * A + o_col[None, :]
    m = (o_col < A)[None, :]
    x = tl.load(logits_ptr + o, mask=m, other=float("-inf")).to(tl.float32)
    p = x
    if prior_ptr is not None:
        p = tl.load(prior_ptr + o, mask=m, other=float("-inf")).to(tl.float32) * inv_temperature
    if mask_ptr is not None:
        allowed = tl.load(mask_ptr + o, mask=m, other=0) != 0
        x = tl.where(allowed, x, float("-inf"))
        p = tl.where(allowed, p, float("-inf"))
    return x, p


@triton.jit
def _rescaled(dot, total, moved, scale):
    """Return sum e^(x - max) (y - shift) after the max and the shift moved; all of it may have vanished."""
    return tl.where(scale == 0, 0.0, scale * (dot + total * moved))


@triton.jit
def _add_actions(x, p, sums, PRIOR_POLICY: tl.constexpr):
    """Add columns to the sums of each row, online: the maximum moves as it must.

    Of the policy: max, sum e^(x - max), sum e^(x - max) (x - max); of the prior: the first two; of the KL: the
    left side's sum e^(left - max) ((left - max) - (right - max)).
    """
    x_max, x_sum, x_dot, p_max, p_sum, gap_dot = sums
    x_top = tl.maximum(x_max, tl.max(x, axis=1))
    p_top = tl.maximum(p_max, tl.max(p, axis=1))
    x_moved, p_moved = x_max - x_top, p_max - p_top
    x_scale, p_scale = tl.exp(x_moved), tl.exp(p_moved)
    x, p = x - x_top[:, None], p - p_top[:, None]
    x_exp, p_exp = tl.exp(x), tl.exp(p)
    # 0 log 0 = 0
    x_dot = _rescaled(x_dot, x_sum, x_moved, x_scale) + tl.sum(tl.where(x_exp == 0, 0.0, x_exp * x), axis=1)
    if PRIOR_POLICY:
        gap = tl.sum(tl.where(p_exp == 0, 0.0, p_exp * (p - x)), axis=1)
        gap_dot = _rescaled(gap_dot, p_sum, p_moved - x_moved, p_scale) + gap
    else:
        gap = tl.sum(tl.where(x_exp == 0, 0.0, x_exp * (x - p)), axis=1)
        gap_dot = _rescaled(gap_dot, x_sum, x_moved - p_moved, x_scale) + gap
    x_sum = x_sum * x_scale + tl.sum(x_exp, axis=1)
    p_sum = p_sum * p_scale + tl.sum(p_exp, axis=1)
    return x_top, x_sum, x_dot, p_top, p_sum, gap_dot


@triton.jit(do_not_specialize=["n_rows"])
def categorical_kernel(
    logits_ptr,
    prior_ptr,
    mask_ptr,
    temperature_ptr,
    state_ptr,
    actions_ptr,
    log_prob_ptr,
    entropy_ptr,
    kl_ptr,
    n_rows,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    PRIOR_POLICY: tl.constexpr,
):
    """Draw an action for each row of a tile by inverting the cumulative distribution; KL where there is a prior."""
    # rows past the last one repeat it
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_row = o_row < n_rows
    o_row = tl.minimum(o_row, n_rows - 1)
    inv_temperature = tl.div_rn(1.0, tl.load(temperature_ptr))
    none = tl.zeros([ROWS], tl.float32)
    lowest = tl.full([ROWS], LOWEST, tl.float32)
    sums = lowest, none, none, lowest, none, none
    for start in range(0, A, BLOCK_A):
        o_col = start + tl.arange(0, BLOCK_A)
        x, p = _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, o_col, inv_temperature, A)
        sums = _add_actions(x, p, sums, PRIOR_POLICY)
    x_max, x_sum, x_dot, _, p_sum, gap_dot = sums

    target = _uniform(_philox(o_row, tl.zeros_like(o_row), state_ptr)[0]) * x_sum
    passed = none
    action = tl.full([ROWS], A, tl.int32)
    last = tl.zeros([ROWS], tl.int32)
    for start in range(0, A, BLOCK_A):
        o_col = (start + tl.arange(0, BLOCK_A))[None, :]
        x = _load_actions(logits_ptr, None, mask_ptr, o_row, start + tl.arange(0, BLOCK_A), 1.0, A)[0]
        weight = tl.exp(x - x_max[:, None])
        # a parallel sum may round down between two actions: only what can be taken is considered
        is_past = (passed[:, None] + tl.cumsum(weight, axis=1) > target[:, None]) & (weight > 0)
        action = tl.minimum(action, tl.min(tl.where(is_past, o_col, A), axis=1))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, o_col, 0), axis=1))
        passed += tl.sum(weight, axis=1)
    # rounding may leave the last sum below the target
    action = tl.where(action < A, action, last)

    taken = tl.load(logits_ptr + o_row * A + action).to(tl.float32)
    tl.store(actions_ptr + o_row, action.to(tl.int64), mask=m_row)
    tl.store(log_prob_ptr + o_row, taken - x_max - tl.log(x_sum), mask=m_row)
    tl.store(entropy_ptr + o_row, tl.log(x_sum) - x_dot / x_sum, mask=m_row)
    if kl_ptr is not None:
        if PRIOR_POLICY:
            kl = gap_dot / p_sum - tl.log(p_sum) + tl.log(x_sum)
        else:
            kl = gap_dot / x_sum - tl.log(x_sum) + tl.log(p_sum)
        tl.store(kl_ptr + o_row, kl, mask=m_row)


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
    state_ptr,
    actions_ptr,
    log_prob_ptr,
    entropy_ptr,
    kl_ptr,
    n_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STD_PER_ROW: tl.constexpr,
    PRIOR_STD_PER_ROW: tl.constexpr,
    PRIOR_POLICY: tl.constexpr,
):
    """Draw mean + std z for each row of a tile, with z by Box and Muller; KL where there is a prior."""
    # rows past the last one repeat it
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_row = o_row < n_rows
    o_row = tl.minimum(o_row, n_rows - 1)
    o_col = tl.arange(0, BLOCK_D)
    m_col = (o_col < D)[None, :]
    mean = _load_dims(mean_ptr, o_row, o_col, True, D)
    log_std = _load_dims(log_std_ptr, o_row, o_col, STD_PER_ROW, D)

    # four dimensions share a block of words: (cos, sin) of the first pair, then of the second
    block = tl.zeros_like(o_row)[:, None] + (o_col // 4)[None, :]
    w0, w1, w2, w3 = _philox(tl.zeros_like(block) + o_row[:, None], block, state_ptr)
    is_first, is_cos = (o_col % 4 < 2)[None, :], (o_col % 2 == 0)[None, :]
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(tl.where(is_first, w0, w2))))
    angle = TWO_PI * _uniform(tl.where(is_first, w1, w3))
    z = tl.where(m_col, radius * tl.where(is_cos, tl.cos(angle), tl.sin(angle)), 0.0)

    o, m = o_row[:, None] * D + o_col[None, :], m_row[:, None] & m_col
    tl.store(actions_ptr + o, mean + tl.exp(log_std) * z, mask=m)
    log_prob = tl.sum(-0.5 * z * z - log_std, axis=1) - D * HALF_LOG_2PI
    tl.store(log_prob_ptr + o_row, log_prob, mask=m_row)
    entropy = tl.sum(log_std + tl.zeros_like(mean), axis=1) + D * (0.5 + HALF_LOG_2PI)
    tl.store(entropy_ptr + o_row, entropy, mask=m_row)
    if kl_ptr is not None:
        # p^(1/tau) of a Gaussian is the Gaussian with variance tau * sigma^2
        half_log_temperature = 0.5 * tl.log(tl.load(temperature_ptr))
        prior_log_std = _load_dims(prior_log_std_ptr, o_row, o_col, PRIOR_STD_PER_ROW, D) + half_log_temperature
        distance = mean - _load_dims(prior_mean_ptr, o_row, o_col, True, D)
        if PRIOR_POLICY:
            gap, inv_right = log_std - prior_log_std, tl.exp(-log_std)
        else:
            gap, inv_right = prior_log_std - log_std, tl.exp(-prior_log_std)
        std_ratio, scaled = tl.exp(-gap), distance * inv_right
        terms = gap + 0.5 * (std_ratio * std_ratio + scaled * scaled - 1.0)
        tl.store(kl_ptr + o_row, tl.sum(tl.where(m_col, terms, 0.0), axis=1), mask=m_row)


INTERPRETED = not isinstance(categorical_kernel, triton.JITFunction)


def _tile(n_rows: int, block: int) -> tuple[int, int]:
    """Return the rows of a program's tile with `block` columns, and its warps."""
    # as many rows as fit, fewer where the whole GPU would not get a tile, at least one element a thread
    spread = max(triton.next_power_of_2(triton.cdiv(n_rows, FULL_GPU)), TILE_ELEMENTS // 8 // block)
    rows = max(min(TILE_ELEMENTS // block, spread), 1)
    return rows, 4 if rows * block <= TILE_ELEMENTS else 8


def _check_first(name: str, tensor: Tensor, prior_temperature: Tensor, state: Tensor, direction: Direction) -> None:
    """Refuse a policy that is not a matrix on a device for Triton, and what is not beside it."""
    device, c = tensor.device, prior_temperature
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name}: expected two dimensions, the second at least 1, got {list(tensor.shape)}")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"{name}: expected a CUDA tensor, got one on {device}; choose another impl")
    if c.dtype is not torch.float32 or c.numel() != 1 or c.device != device:
        raise ValueError(
            f"prior_temperature: expected a 0-D float32 tensor on {device}, got {c.dtype} {list(c.shape)} on {c.device}"
        )
    if state.dtype is not torch.int64 or state.shape != (2,) or state.device != device or not state.is_contiguous():
        raise ValueError(
            f"state: expected contiguous int64 [2] on {device}, got {state.dtype} {list(state.shape)} on {state.device}"
        )
    if direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"direction: expected 'policy_prior' or 'prior_policy', got {direction!r}")


def _readable(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device, dtypes: tuple = FLOATS
) -> Tensor | None:
    """Return an input as the kernels read it, contiguous, or refuse it; None stays None."""
    if tensor is None:
        return None
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as the policy is, got one on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    return tensor.detach().contiguous()


def _outputs(actions: Tensor, has_prior: bool) -> Outputs:
    """Return `actions` with room for what is known of them, [B] each."""
    log_prob, entropy, kl = torch.empty(3, len(actions), dtype=torch.float32, device=actions.device).unbind()
    return Outputs(actions, log_prob, entropy, kl if has_prior else None)


def categorical(inputs: CategoricalInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row by inverting the cumulative distribution at the row's uniform number.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    _check_first("logits", inputs.logits, prior_temperature, state, direction)
    shape, device = inputs.logits.shape, inputs.logits.device
    logits = _readable("logits", inputs.logits, shape, device)
    prior = _readable("prior_log_probs", inputs.prior_log_probs, shape, device)
    mask = _readable("action_mask", inputs.action_mask, shape, device, (torch.bool,))
    n_rows, n_actions = shape
    out = _outputs(torch.empty(n_rows, dtype=torch.int64, device=device), prior is not None)
    if n_rows > 0:
        block_a = min(triton.next_power_of_2(n_actions), MAX_BLOCK_A)
        rows, warps = _tile(n_rows, block_a)
        sizes = n_rows, n_actions, rows, block_a, direction == "prior_policy"
        with torch.cuda.device_of(inputs.logits):
            categorical_kernel[(triton.cdiv(n_rows, rows),)](
                logits, prior, mask, prior_temperature, state, *out, *sizes, num_warps=warps, **OPTIONS
            )
    return out


def gaussian(inputs: GaussianInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row: mean + std * z, with z of the reference's `normal`; float32.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape, or half a prior.
    """
    _check_first("mean", inputs.mean, prior_temperature, state, direction)
    if (inputs.prior_mean is None) != (inputs.prior_log_std is None):
        raise ValueError("prior_mean: expected together with prior_log_std, or neither")
    shape, device = inputs.mean.shape, inputs.mean.device
    x = []
    for name, tensor in inputs._asdict().items():
        is_shared = name in ("log_std", "prior_log_std") and tensor is not None and tensor.dim() == 1
        x.append(_readable(name, tensor, shape[1:] if is_shared else shape, device))
    n_rows, n_dims = shape
    out = _outputs(torch.empty(shape, dtype=torch.float32, device=device), inputs.prior_mean is not None)
    if n_rows > 0:
        block_d = triton.next_power_of_2(n_dims)
        rows, warps = _tile(n_rows, block_d)
        per_row = inputs.log_std.dim() == 2, inputs.prior_log_std is not None and inputs.prior_log_std.dim() == 2
        sizes = n_rows, n_dims, rows, block_d, *per_row, direction == "prior_policy"
        with torch.cuda.device_of(inputs.mean):
            gaussian_kernel[(triton.cdiv(n_rows, rows),)](
                *x, prior_temperature, state, *out, *sizes, num_warps=warps, **OPTIONS
            )
    return out
