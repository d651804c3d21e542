"""The categorical loss and its gradients in Triton, on CUDA tensors; on CPU tensors by Triton's interpreter.

Three launches: moments of the advantages, rows (gradients and partial sums), statistics; few rows take one launch.
A program holds its rows in registers; above MAX_BLOCK_A actions it walks them twice, with an online softmax.
Derivation: kernels/README.md.
Test: pytest tests/kernels/test_triton_ppo_kl_categorical.py tests/kernels/test_triton_aot.py
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# (a kernel's parameters have no Python types)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ppo.outputs import packed
from .eager import Grads
from .reference import Coefficients, Direction, Inputs, Outputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MAX_BLOCK_A = 4096  # 16 elements a thread in 8 warps, all in registers; more actions are walked in blocks
TILE_ELEMENTS = 1024  # 8 a thread in 4 warps, which lets four programs and more live on a multiprocessor
ALONE_ELEMENTS = 4096  # up to here one program for everything saves two launches
MAX_ROWS = 256  # of a tile, two a thread: a row has many numbers of its own
FULL_GPU = 256  # programs that leave no multiprocessor idle; tiles shrink below it
MAX_PROGRAMS = 1024  # they loop over the tiles, so that few partial sums are left to add
MOMENT_PROGRAMS = 128
MOMENT_ROWS = 1024
N_SUMS = tl.constexpr(7)  # partial sums of a program
# the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}
# Below every logit that counts, but finite: differences of maxima stay finite.
LOWEST = tl.constexpr(-1e30)


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


@triton.jit
def _logits_grad(x, p, is_action, sums, entropy, kl, derivatives, PRIOR_POLICY: tl.constexpr):
    """Return d loss / d logits [rows, columns], given its derivatives by log pi(a), entropy and KL of each row."""
    x_max, x_sum, _, p_max, p_sum, _ = sums
    by_log_prob, by_entropy, by_kl = derivatives
    x, p = x - x_max[:, None], p - p_max[:, None]
    q = tl.exp(x) * (1.0 / x_sum)[:, None]
    log_q = x - tl.log(x_sum)[:, None]
    slope = -by_log_prob[:, None] - by_entropy[:, None] * (log_q + entropy[:, None])
    if PRIOR_POLICY:
        prior = tl.exp(p) * (1.0 / p_sum)[:, None]
        pull = by_kl[:, None] * (q - prior)
    else:
        slope += by_kl[:, None] * (log_q - p + tl.log(p_sum)[:, None] - kl[:, None])
        pull = 0.0
    return tl.where(is_action, by_log_prob[:, None], 0.0) + tl.where(q == 0, 0.0, q * slope) + pull


@triton.jit
def _store_grad(logits_grad_ptr, grad, o_row, o_col, m_row, counts, A: tl.constexpr):
    """Write columns of the gradient, exactly 0 in rows of weight 0."""
    o = o_row[:, None] * A + o_col[None, :]
    tl.store(logits_grad_ptr + o, tl.where(counts[:, None], grad, 0.0), mask=m_row[:, None] & (o_col < A)[None, :])


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
    logits_ptr,
    values_ptr,
    actions_ptr,
    old_log_prob_ptr,
    advantages_ptr,
    returns_ptr,
    old_values_ptr,
    weight_ptr,
    prior_ptr,
    mask_ptr,
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
    logits_grad_ptr,
    values_grad_ptr,
    n_rows,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
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
        count, mean, squares = _moments(advantages, weights)
    else:
        count, mean, squares = _all_moments(moments_ptr, MOMENTS)
    shift, scale = 0.0, 1.0
    if NORMALIZES:
        std = tl.sqrt_rn(squares / tl.maximum(count - 1.0, 1.0))
        shift = tl.where(count > 1, mean, 0.0)
        scale = tl.where(count > 1, 1.0 / (std + 1e-8), 1.0)
    inv_rows = 1.0 / tl.maximum(count, 1.0)
    clip_range, ent_coef = tl.load(clip_range_ptr), tl.load(ent_coef_ptr)
    vf_coef, kl_coef = tl.load(vf_coef_ptr), tl.load(kl_coef_ptr)
    inv_temperature = tl.div_rn(1.0, tl.load(temperature_ptr))

    policy_sum = tl.zeros([ROWS], tl.float32)
    error_sum, entropy_sum, kl_sum = policy_sum, policy_sum, policy_sum
    k3_sum, outside_sum, weighted_kl_sum = policy_sum, policy_sum, policy_sum
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        # rows past the last one repeat it with weight 0
        o_row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < n_rows
        o_row = tl.minimum(o_row, n_rows - 1)
        o_col = tl.arange(0, BLOCK_A)
        weight = tl.load(weight_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)
        counts = weight != 0
        action = tl.load(actions_ptr + o_row)

        none = tl.zeros([ROWS], tl.float32)
        lowest = tl.full([ROWS], LOWEST, tl.float32)
        sums = lowest, none, none, lowest, none, none
        if A <= BLOCK_A:
            x, p = _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, o_col, inv_temperature, A)
            sums = _add_actions(x, p, sums, PRIOR_POLICY)
        else:
            for start in range(0, A, BLOCK_A):
                x, p = _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, start + o_col, inv_temperature, A)
                sums = _add_actions(x, p, sums, PRIOR_POLICY)
        x_max, x_sum, x_dot, _, p_sum, gap_dot = sums
        entropy = tl.log(x_sum) - x_dot / x_sum
        if PRIOR_POLICY:
            kl = gap_dot / p_sum - tl.log(p_sum) + tl.log(x_sum)
        else:
            kl = gap_dot / x_sum - tl.log(x_sum) + tl.log(p_sum)

        # an action that does not exist makes the loss NaN
        m_action = (action >= 0) & (action < A)
        taken = tl.load(logits_ptr + o_row * A + action, mask=m_action, other=float("nan")).to(tl.float32)
        if mask_ptr is not None:
            allowed = tl.load(mask_ptr + o_row * A + action, mask=m_action, other=1) != 0
            taken = tl.where(allowed, taken, float("-inf"))
        log_prob = taken - x_max - tl.log(x_sum)
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
        derivatives = -share * slope, -ent_coef * share, kl_coef * share * kl_weight
        if A <= BLOCK_A:
            is_action = o_col[None, :] == action[:, None]
            grad = _logits_grad(x, p, is_action, sums, entropy, kl, derivatives, PRIOR_POLICY)
            _store_grad(logits_grad_ptr, grad, o_row, o_col, m_row, counts, A)
        else:
            for start in range(0, A, BLOCK_A):
                x, p = _load_actions(logits_ptr, prior_ptr, mask_ptr, o_row, start + o_col, inv_temperature, A)
                is_action = start + o_col[None, :] == action[:, None]
                grad = _logits_grad(x, p, is_action, sums, entropy, kl, derivatives, PRIOR_POLICY)
                _store_grad(logits_grad_ptr, grad, o_row, start + o_col, m_row, counts, A)

    policy, squared_error = tl.sum(policy_sum, axis=0), tl.sum(error_sum, axis=0)
    entropy, kl = tl.sum(entropy_sum, axis=0), tl.sum(kl_sum, axis=0)
    k3, outside = tl.sum(k3_sum, axis=0), tl.sum(outside_sum, axis=0)
    weighted_kl = _weighted_kl(kl_weight_ptr, weighted_kl_sum, kl)
    totals = policy, squared_error, entropy, kl, k3, outside, weighted_kl
    if partials_ptr is None:
        _write_statistics(statistics_ptr, count, totals, ent_coef, vf_coef, kl_coef)
    else:
        for k in tl.static_range(N_SUMS):
            tl.store(partials_ptr + k * tl.num_programs(0) + tl.program_id(0), totals[k])


@triton.jit
def _total(partials_ptr, k, n_partials, PARTIALS: tl.constexpr):
    """Add row k of [7, n_partials], always as the same tree."""
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
    n_partials,
    PARTIALS: tl.constexpr,
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


INTERPRETED = not isinstance(rows_kernel, triton.JITFunction)


def _tile(n_rows: int, n_actions: int) -> tuple[int, int, int, bool]:
    """Return rows and columns of a program's tile, its warps, and whether one program holds all rows."""
    all_rows, block_a = triton.next_power_of_2(n_rows), triton.next_power_of_2(n_actions)
    if all_rows <= MAX_ROWS and all_rows * block_a <= ALONE_ELEMENTS:
        return all_rows, block_a, 4 if all_rows * block_a <= TILE_ELEMENTS else 8, True
    block_a = min(block_a, MAX_BLOCK_A)
    # as many rows as fit, fewer where the whole GPU would not get a tile, at least four elements a thread
    spread = max(triton.next_power_of_2(triton.cdiv(n_rows, FULL_GPU)), TILE_ELEMENTS // 2 // block_a)
    rows = max(min(TILE_ELEMENTS // block_a, spread, MAX_ROWS), 1)
    return rows, block_a, 4 if rows * block_a <= TILE_ELEMENTS else 8, False


def _launch(x: Inputs, c: Coefficients, grads: Grads, statistics: Tensor, prior_policy: bool, normalizes: bool) -> None:
    """Fill `grads` and `statistics` [7] from contiguous inputs on one device."""
    n_rows, n_actions = x.logits.shape
    rows, block_a, warps, alone = _tile(n_rows, n_actions)
    programs = min(triton.cdiv(n_rows, rows), MAX_PROGRAMS)
    moments = partials = None
    if not alone:
        moments = torch.empty(3, MOMENT_PROGRAMS, dtype=torch.float32, device=statistics.device)
        partials = torch.empty(N_SUMS.value, programs, dtype=torch.float32, device=statistics.device)
        tiles = n_rows, MOMENT_ROWS, MOMENT_PROGRAMS
        moments_kernel[(MOMENT_PROGRAMS,)](x.advantages, x.weight, moments, *tiles, num_warps=4, **OPTIONS)
    shape = n_rows, n_actions, rows, block_a
    switches = prior_policy, normalizes, MOMENT_PROGRAMS
    rows_kernel[(programs,)](
        *x, *c, moments, partials, statistics, *grads, *shape, *switches, num_warps=warps, **OPTIONS
    )
    if not alone:
        scales = c.ent_coef, c.vf_coef, c.kl_coef
        sizes = programs, MAX_PROGRAMS, MOMENT_PROGRAMS
        statistics_kernel[(1,)](partials, moments, *scales, statistics, *sizes, num_warps=4, **OPTIONS)


def _readable(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtypes: tuple) -> Tensor:
    """Return an input as the kernels read it, contiguous, or refuse it."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, as logits is, got one on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    return tensor.detach().contiguous()


def _checked(inputs: Inputs) -> Inputs:
    """Return the inputs as the kernels read them, or refuse the first that does not fit `logits`."""
    element, device = inputs.logits.shape, inputs.logits.device
    if len(element) != 2 or element[1] == 0:
        raise ValueError(f"logits: expected shape [B, A] with A at least 1, got {list(element)}")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"logits: expected a CUDA tensor, got one on {device}; choose another impl")
    made = {}
    for name, tensor in inputs._asdict().items():
        if name in ("action_mask", "kl_weight") and tensor is None:
            continue
        shape = element if name in ("logits", "prior_log_probs", "action_mask") else element[:1]
        dtypes = {"actions": (torch.int64,), "action_mask": (torch.bool,)}.get(name, FLOATS)
        made[name] = _readable(name, tensor, shape, device, dtypes)
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
    """Return the outputs, and d loss / d (logits, values), each of its input's dtype.

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
    _check_coefficients(coefficients, x.logits.device)
    if out is None:
        statistics = torch.empty(len(Outputs._fields), dtype=torch.float32, device=x.logits.device)
        outputs = Outputs(*statistics.unbind())
        grads = Grads(torch.empty_like(x.logits), torch.empty_like(x.values))
    else:
        outputs, grads = out
        _check_grads(grads, x)
        statistics = packed(outputs, x.logits.device)
    if len(x.logits) == 0:
        statistics.zero_()
    else:
        with torch.cuda.device_of(x.logits):
            _launch(x, coefficients, grads, statistics, kl_direction == "prior_policy", normalize_advantage)
    return outputs, grads
