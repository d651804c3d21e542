"""The Gaussian loss and its gradients in Triton, on CUDA tensors; on CPU tensors by Triton's interpreter.

Three launches: moments of the advantages, rows (gradients and partial sums), statistics; few rows take one launch.
Derivation: kernels/README.md.
Test: pytest tests/kernels/test_triton_ppo_kl_gaussian.py tests/kernels/test_triton_aot.py
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# (a kernel's parameters have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ppo.outputs import packed
from .eager import Grads
from .reference import HALF_LOG_2PI, Coefficients, Direction, Inputs, Outputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

TILE_ELEMENTS = 512  # 4 a thread in 4 warps: an element has nine numbers that live long
ALONE_ELEMENTS = 2048  # up to here one program for everything saves two launches
MAX_ROWS = 256  # of a tile, two a thread: a row has many numbers of its own
FULL_GPU = 256  # programs that leave no multiprocessor idle; tiles shrink below it
MAX_PROGRAMS = 1024  # they loop over the tiles, so that few partial sums are left to add
MOMENT_PROGRAMS = 128
MOMENT_ROWS = 1024
N_SUMS = tl.constexpr(7)  # partial sums of a program, beside one for each dimension of a shared log std
GRAD_DIMS = 8  # dimensions that the last kernel adds at a time
LOG_PROB_CONSTANT = tl.constexpr(HALF_LOG_2PI)  # of one dimension
# the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _moments(advantage, weight):
    """Return the count, the mean and the sum of centred squares over the rows of one block."""
    counts = weight != 0
    count = tl.sum(weight, axis=0)
    total = tl.sum(tl.where(counts, weight * advantage, 0.0), axis=0)
    mean = total / tl.where(count > 0, count, 1.0)
    centred = tl.where(counts, advantage - mean, 0.0)
    return count, mean, tl.sum(weight * centred * centred, axis=0)


@triton.jit
def _all_moments(moments_ptr, PROGRAMS: tl.constexpr):
    """Return the moments of the union of all blocks: always the same tree of sums."""
    o = tl.arange(0, PROGRAMS)
    count, mean = tl.load(moments_ptr + o), tl.load(moments_ptr + PROGRAMS + o)
    total = tl.sum(count, axis=0)
    grand_mean = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    distance = mean - grand_mean
    squares = tl.load(moments_ptr + 2 * PROGRAMS + o) + count * distance * distance
    return total, grand_mean, tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["n_rows"])
def moments_kernel(advantages_ptr, weight_ptr, moments_ptr, n_rows, ROWS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Write count, mean and centred squares [3, PROGRAMS] of the rows of each program."""
    count, mean, squares = 0.0, 0.0, 0.0
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), PROGRAMS):
        o_row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < n_rows
        weight = tl.load(weight_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)
        advantage = tl.load(advantages_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)
        b_count, b_mean, b_squares = _moments(advantage, weight)
        # two sets of rows into one, without a difference of large sums
        distance = b_mean - mean
        share = b_count / tl.maximum(count + b_count, 1.0)
        squares += b_squares + count * share * distance * distance
        mean += share * distance
        count += b_count
    tl.store(moments_ptr + tl.program_id(0), count)
    tl.store(moments_ptr + PROGRAMS + tl.program_id(0), mean)
    tl.store(moments_ptr + 2 * PROGRAMS + tl.program_id(0), squares)


@triton.jit
def _surrogate(log_ratio, advantage, clip_range):
    """Return the smaller branch, its derivative by log pi(a), k3, and 1 where the ratio is outside of the clip."""
    ratio = tl.exp(log_ratio)
    # exp(x) - 1 - x by its series near 0, where the difference cancels
    x = log_ratio
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    series = x * x * (0.5 + x * (1 / 6 + x * series))
    k3 = tl.where(tl.abs(x) < 0.5, series, ratio - 1.0 - x)
    # compared so that a NaN stays one
    low, high = 1.0 - clip_range, 1.0 + clip_range
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    free, held = advantage * ratio, advantage * clipped
    is_held = held < free
    outside = tl.where(tl.abs(ratio - 1.0) > clip_range, 1.0, 0.0)
    return tl.where(is_held, held, free), tl.where(is_held, 0.0, free), k3, outside


@triton.jit
def _value_error(value, old_value, target, clip_range_vf_ptr):
    """Return the error of the value, and half the derivative of its square by the value."""
    error = value - target
    slope = error
    if clip_range_vf_ptr is not None:
        reach = tl.load(clip_range_vf_ptr)
        step = value - old_value
        error = old_value + tl.where(step < -reach, -reach, tl.where(step > reach, reach, step)) - target
        slope = tl.where(tl.abs(step) > reach, 0.0, error)
    return error, slope


@triton.jit
def _load_dims(ptr, o_row, o_col, PER_ROW: tl.constexpr, D: tl.constexpr):
    """Load [rows, dims], or [1, dims] of what all rows share; 0 past the last dimension."""
    o = o_col[None, :]
    if PER_ROW:
        o = o_row[:, None] * D + o
    return tl.load(ptr + o, mask=(o_col < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _kl(mean, log_std, inv_std, prior_mean, prior_log_std, PRIOR_POLICY: tl.constexpr):
    """Return the KL of each dimension and its derivatives by mean and log std."""
    # KL(1 || 2) = s2 - s1 + (v1 / v2 + d^2 / v2 - 1) / 2 with s the log std and v the variance
    distance = mean - prior_mean
    if PRIOR_POLICY:
        std_ratio, scale, gap = tl.exp(prior_log_std - log_std), inv_std, log_std - prior_log_std
    else:
        std_ratio, scale, gap = tl.exp(log_std - prior_log_std), tl.exp(-prior_log_std), prior_log_std - log_std
    pull = distance * scale * scale
    excess = std_ratio * std_ratio + distance * pull - 1.0
    by_log_std = -excess if PRIOR_POLICY else std_ratio * std_ratio - 1.0
    return gap + 0.5 * excess, pull, by_log_std


@triton.jit
def _kl_weight(kl_weight_ptr, o_row):
    """Return what each row's KL weighs in the loss."""
    kl_weight = 1.0
    if kl_weight_ptr is not None:
        kl_weight = tl.load(kl_weight_ptr + o_row).to(tl.float32)
    return kl_weight


@triton.jit
def _weighted_kl(kl_weight_ptr, weighted_kl_sum, kl):
    """Return the sum of the weighed KLs, which is that of the KLs where nothing weighs them."""
    total = kl
    if kl_weight_ptr is not None:
        total = tl.sum(weighted_kl_sum, axis=0)
    return total


@triton.jit
def _write_statistics(statistics_ptr, count, totals, ent_coef, vf_coef, kl_coef):
    """Turn the sums over all rows into the seven outputs."""
    inv_rows = 1.0 / tl.maximum(count, 1.0)
    policy, squared_error, entropy, kl, k3, outside, weighted_kl = totals
    policy_loss, value_loss = -policy * inv_rows, squared_error * inv_rows
    entropy, kl = entropy * inv_rows, kl * inv_rows
    tl.store(statistics_ptr, policy_loss + vf_coef * value_loss - ent_coef * entropy + kl_coef * weighted_kl * inv_rows)
    tl.store(statistics_ptr + 1, policy_loss)
    tl.store(statistics_ptr + 2, value_loss)
    tl.store(statistics_ptr + 3, entropy)
    tl.store(statistics_ptr + 4, kl)
    tl.store(statistics_ptr + 5, k3 * inv_rows)
    tl.store(statistics_ptr + 6, outside * inv_rows)


@triton.jit(do_not_specialize=["n_rows"])
def rows_kernel(
    mean_ptr,
    log_std_ptr,
    values_ptr,
    actions_ptr,
    old_log_prob_ptr,
    advantages_ptr,
    returns_ptr,
    old_values_ptr,
    weight_ptr,
    prior_mean_ptr,
    prior_log_std_ptr,
    kl_weight_ptr,
    clip_range_ptr,
    ent_coef_ptr,
    vf_coef_ptr,
    kl_coef_ptr,
    temperature_ptr,
    clip_range_vf_ptr,
    moments_ptr,
    partials_ptr,
    statistics_ptr,
    mean_grad_ptr,
    log_std_grad_ptr,
    values_grad_ptr,
    n_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STD_PER_ROW: tl.constexpr,
    PRIOR_STD_PER_ROW: tl.constexpr,
    PRIOR_POLICY: tl.constexpr,
    NORMALIZES: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Write the gradients of all rows, and the sums of each program; without `partials_ptr` the statistics."""
    if partials_ptr is None:
        # one program with one tile: the advantages are all here
        o_all = tl.arange(0, ROWS)
        weights = tl.load(weight_ptr + o_all, mask=o_all < n_rows, other=0.0).to(tl.float32)
        advantages = tl.load(advantages_ptr + o_all, mask=o_all < n_rows, other=0.0).to(tl.float32)
        count, advantage_mean, squares = _moments(advantages, weights)
    else:
        count, advantage_mean, squares = _all_moments(moments_ptr, MOMENTS)
    shift, scale = 0.0, 1.0
    if NORMALIZES:
        std = tl.sqrt_rn(squares / tl.maximum(count - 1.0, 1.0))
        shift = tl.where(count > 1, advantage_mean, 0.0)
        scale = tl.where(count > 1, 1.0 / (std + 1e-8), 1.0)
    inv_rows = 1.0 / tl.maximum(count, 1.0)
    clip_range, ent_coef = tl.load(clip_range_ptr), tl.load(ent_coef_ptr)
    vf_coef, kl_coef = tl.load(vf_coef_ptr), tl.load(kl_coef_ptr)
    # p^(1/tau) of a Gaussian is the Gaussian with variance tau * sigma^2
    half_log_temperature = 0.5 * tl.log(tl.load(temperature_ptr))
    o_col = tl.arange(0, BLOCK_D)
    m_col = (o_col < D)[None, :]

    policy_sum = tl.zeros([ROWS], tl.float32)
    error_sum, entropy_sum, kl_sum = policy_sum, policy_sum, policy_sum
    k3_sum, outside_sum, weighted_kl_sum = policy_sum, policy_sum, policy_sum
    log_std_sum = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        # rows past the last one repeat it with weight 0
        o_row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < n_rows
        o_row = tl.minimum(o_row, n_rows - 1)
        weight = tl.load(weight_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)
        counts = weight != 0

        mean = _load_dims(mean_ptr, o_row, o_col, True, D)
        log_std = _load_dims(log_std_ptr, o_row, o_col, STD_PER_ROW, D)
        prior_log_std = _load_dims(prior_log_std_ptr, o_row, o_col, PRIOR_STD_PER_ROW, D) + half_log_temperature
        inv_std = tl.exp(-log_std)
        z = (_load_dims(actions_ptr, o_row, o_col, True, D) - mean) * inv_std
        log_prob = tl.sum(-0.5 * z * z - log_std, axis=1) - D * LOG_PROB_CONSTANT
        entropy = tl.sum(log_std + tl.zeros_like(mean), axis=1) + D * (0.5 + LOG_PROB_CONSTANT)
        prior_mean = _load_dims(prior_mean_ptr, o_row, o_col, True, D)
        kl_terms, pull, kl_by_log_std = _kl(mean, log_std, inv_std, prior_mean, prior_log_std, PRIOR_POLICY)
        kl = tl.sum(tl.where(m_col, kl_terms, 0.0), axis=1)

        advantage = (tl.load(advantages_ptr + o_row).to(tl.float32) - shift) * scale
        log_ratio = log_prob - tl.load(old_log_prob_ptr + o_row).to(tl.float32)
        surrogate, slope, k3, outside = _surrogate(log_ratio, advantage, clip_range)
        value = tl.load(values_ptr + o_row).to(tl.float32)
        old_value = tl.load(old_values_ptr + o_row).to(tl.float32)
        target = tl.load(returns_ptr + o_row).to(tl.float32)
        error, value_slope = _value_error(value, old_value, target, clip_range_vf_ptr)

        # selected, not multiplied: a row of weight 0 may hold an infinite ratio or KL
        policy_sum += tl.where(counts, weight * surrogate, 0.0)
        error_sum += tl.where(counts, weight * error * error, 0.0)
        entropy_sum += tl.where(counts, weight * entropy, 0.0)
        kl_sum += tl.where(counts, weight * kl, 0.0)
        kl_weight = _kl_weight(kl_weight_ptr, o_row)
        weighted_kl_sum += tl.where(counts, weight * kl_weight * kl, 0.0)
        k3_sum += tl.where(counts, weight * k3, 0.0)
        outside_sum += tl.where(counts, weight * outside, 0.0)

        share = weight * inv_rows
        value_grad = tl.where(counts, 2.0 * vf_coef * share * value_slope, 0.0)
        tl.store(values_grad_ptr + o_row, value_grad, mask=m_row)
        by_log_prob, by_kl = (-share * slope)[:, None], (kl_coef * share * kl_weight)[:, None]
        o, m = o_row[:, None] * D + o_col[None, :], m_row[:, None] & m_col
        mean_grad = by_log_prob * z * inv_std + by_kl * pull
        tl.store(mean_grad_ptr + o, tl.where(counts[:, None], mean_grad, 0.0), mask=m)
        log_std_grad = by_log_prob * (z * z - 1.0) + by_kl * kl_by_log_std - (ent_coef * share)[:, None]
        log_std_grad = tl.where(counts[:, None], log_std_grad, 0.0)
        if STD_PER_ROW:
            tl.store(log_std_grad_ptr + o, log_std_grad, mask=m)
        else:
            log_std_sum += tl.sum(log_std_grad, axis=0)

    policy, squared_error = tl.sum(policy_sum, axis=0), tl.sum(error_sum, axis=0)
    entropy, kl = tl.sum(entropy_sum, axis=0), tl.sum(kl_sum, axis=0)
    k3, outside = tl.sum(k3_sum, axis=0), tl.sum(outside_sum, axis=0)
    weighted_kl = _weighted_kl(kl_weight_ptr, weighted_kl_sum, kl)
    totals = policy, squared_error, entropy, kl, k3, outside, weighted_kl
    if partials_ptr is None:
        _write_statistics(statistics_ptr, count, totals, ent_coef, vf_coef, kl_coef)
        if not STD_PER_ROW:
            tl.store(log_std_grad_ptr + o_col, log_std_sum, mask=o_col < D)
    else:
        for k in tl.static_range(N_SUMS):
            tl.store(partials_ptr + k * tl.num_programs(0) + tl.program_id(0), totals[k])
        if not STD_PER_ROW:
            o_partial = (o_col + N_SUMS) * tl.num_programs(0) + tl.program_id(0)
            tl.store(partials_ptr + o_partial, log_std_sum, mask=o_col < D)


@triton.jit
def _total(partials_ptr, k, n_partials, PARTIALS: tl.constexpr):
    """Add row k of the partial sums, always as the same tree."""
    o = tl.arange(0, PARTIALS)
    return tl.sum(tl.load(partials_ptr + k * n_partials + o, mask=o < n_partials, other=0.0), axis=0)


@triton.jit(do_not_specialize=["n_partials"])
def statistics_kernel(
    partials_ptr,
    moments_ptr,
    ent_coef_ptr,
    vf_coef_ptr,
    kl_coef_ptr,
    statistics_ptr,
    log_std_grad_ptr,
    n_partials,
    D: tl.constexpr,
    STD_PER_ROW: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Add the partial sums of all programs and write the statistics; one program."""
    count, _, _ = _all_moments(moments_ptr, MOMENTS)
    policy = _total(partials_ptr, 0, n_partials, PARTIALS)
    squared_error = _total(partials_ptr, 1, n_partials, PARTIALS)
    entropy = _total(partials_ptr, 2, n_partials, PARTIALS)
    kl = _total(partials_ptr, 3, n_partials, PARTIALS)
    k3 = _total(partials_ptr, 4, n_partials, PARTIALS)
    outside = _total(partials_ptr, 5, n_partials, PARTIALS)
    weighted_kl = _total(partials_ptr, 6, n_partials, PARTIALS)
    totals = policy, squared_error, entropy, kl, k3, outside, weighted_kl
    coefficients = tl.load(ent_coef_ptr), tl.load(vf_coef_ptr), tl.load(kl_coef_ptr)
    _write_statistics(statistics_ptr, count, totals, *coefficients)
    if not STD_PER_ROW:
        o = tl.arange(0, PARTIALS)[None, :]
        for start in range(0, D, BLOCK_D):
            o_col = start + tl.arange(0, BLOCK_D)
            m = (o_col < D)[:, None] & (o < n_partials)
            grads = tl.load(partials_ptr + (o_col + N_SUMS)[:, None] * n_partials + o, mask=m, other=0.0)
            tl.store(log_std_grad_ptr + o_col, tl.sum(grads, axis=1), mask=o_col < D)


INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)


def _tile(n_rows: int, n_dims: int) -> tuple[int, int, int, bool]:
    """Return rows and columns of a program's tile, its warps, and whether one program holds all rows."""
    all_rows, block_d = triton.next_power_of_2(n_rows), triton.next_power_of_2(n_dims)
    if all_rows <= MAX_ROWS and all_rows * block_d <= ALONE_ELEMENTS:
        return all_rows, block_d, 4 if all_rows * block_d <= TILE_ELEMENTS else 8, True
    # as many rows as fit, fewer where the whole GPU would not get a tile, at least two elements a thread
    spread = max(triton.next_power_of_2(triton.cdiv(n_rows, FULL_GPU)), TILE_ELEMENTS // 2 // block_d)
    rows = max(min(TILE_ELEMENTS // block_d, spread, MAX_ROWS), 1)
    return rows, block_d, 4 if rows * block_d <= TILE_ELEMENTS else 8, False


def _launch(x: Inputs, c: Coefficients, grads: Grads, statistics: Tensor, prior_policy: bool, normalizes: bool) -> None:
    """Fill `grads` and `statistics` [7] from contiguous inputs on one device."""
    n_rows, n_dims = x.mean.shape
    rows, block_d, warps, alone = _tile(n_rows, n_dims)
    programs = min(triton.cdiv(n_rows, rows), MAX_PROGRAMS)
    std_per_row, prior_std_per_row = x.log_std.dim() == 2, x.prior_log_std.dim() == 2
    moments = partials = None
    if not alone:
        n_sums = N_SUMS.value + (0 if std_per_row else n_dims)
        moments = torch.empty(3, MOMENT_PROGRAMS, dtype=torch.float32, device=statistics.device)
        partials = torch.empty(n_sums, programs, dtype=torch.float32, device=statistics.device)
        tiles = n_rows, MOMENT_ROWS, MOMENT_PROGRAMS
        moments_kernel[(MOMENT_PROGRAMS,)](x.advantages, x.weight, moments, *tiles, num_warps=4, **OPTIONS)
    shape = n_rows, n_dims, rows, block_d
    switches = std_per_row, prior_std_per_row, prior_policy, normalizes, MOMENT_PROGRAMS
    rows_kernel[(programs,)](
        *x, *c, moments, partials, statistics, *grads, *shape, *switches, num_warps=warps, **OPTIONS
    )
    if not alone:
        scales = c.ent_coef, c.vf_coef, c.kl_coef
        sizes = programs, n_dims, std_per_row, MAX_PROGRAMS, GRAD_DIMS, MOMENT_PROGRAMS
        outs = statistics, grads.log_std
        statistics_kernel[(1,)](partials, moments, *scales, *outs, *sizes, num_warps=8, **OPTIONS)


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an input as the kernels read it, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as mean is, got one on {tensor.device}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32 or a half type, got {tensor.dtype}")
    return tensor.detach().contiguous()


def _checked(inputs: Inputs) -> Inputs:
    """Return the inputs as the kernels read them, or refuse the first that does not fit `mean`."""
    element, device = inputs.mean.shape, inputs.mean.device
    if len(element) != 2 or element[1] == 0:
        raise ValueError(f"mean: expected shape [B, D] with D at least 1, got {list(element)}")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"mean: expected a CUDA tensor, got one on {device}; choose another impl")
    made = {}
    for name, tensor in inputs._asdict().items():
        if name == "kl_weight" and tensor is None:
            continue
        shape = element if name in ("mean", "actions", "prior_mean") else element[:1]
        if name in ("log_std", "prior_log_std"):
            shape = element if tensor.dim() == 2 else element[1:]
        made[name] = _readable(name, tensor, shape, device)
    return Inputs(**made)


def _check_coefficients(coefficients: Coefficients, device: torch.device) -> None:
    for name, c in coefficients._asdict().items():
        if c is None and name == "clip_range_vf":
            continue
        if c.dtype is not torch.float32 or c.numel() != 1 or c.device != device:
            raise ValueError(
                f"{name}: expected a 0-D float32 tensor on {device}, got {c.dtype} {list(c.shape)} on {c.device}; "
                "see ops.coefficients_on"
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


def loss_and_grads(
    inputs: Inputs,
    coefficients: Coefficients,
    *,
    kl_direction: Direction = "policy_prior",
    normalize_advantage: bool = True,
    out: tuple[Outputs, Grads] | None = None,
) -> tuple[Outputs, Grads]:
    """Return the outputs, and d loss / d (mean, log_std, values), each of its input's dtype.

    Args:
        inputs: shapes at the fields of `Inputs`; float32, or half types, which are computed in float32.
        coefficients: 0-D float32, read on the device.
        kl_direction: "policy_prior" is KL(policy || prior), "prior_policy" the other one.
        normalize_advantage: as in Stable-Baselines3, over rows of weight 1.
        out: what an earlier call with inputs of the same shapes and dtypes returned, to be overwritten and returned.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    if kl_direction not in ("policy_prior", "prior_policy"):
        raise ValueError(f"kl_direction: expected 'policy_prior' or 'prior_policy', got {kl_direction!r}")
    x = _checked(inputs)
    _check_coefficients(coefficients, x.mean.device)
    if out is None:
        statistics = torch.empty(len(Outputs._fields), dtype=torch.float32, device=x.mean.device)
        outputs = Outputs(*statistics.unbind())
        grads = Grads(torch.empty_like(x.mean), torch.empty_like(x.log_std), torch.empty_like(x.values))
    else:
        outputs, grads = out
        _check_grads(grads, x)
        statistics = packed(outputs, x.mean.device)
    if len(x.mean) == 0:
        statistics.zero_()
        grads.log_std.zero_()
    else:
        with torch.cuda.device_of(x.mean):
            _launch(x, coefficients, grads, statistics, kl_direction == "prior_policy", normalize_advantage)
    return outputs, grads
